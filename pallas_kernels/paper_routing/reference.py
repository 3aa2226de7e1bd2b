"""Which pages each query head opens, in float64 numpy with plain sorting."""

from __future__ import annotations

import numpy as np


def reference_routing(query, chunk_sums, group_sums, own_chunk, *, sink_chunks, local_chunks, top_chunks, top_groups):
    """For each kv head a dict page -> set of heads that open it."""
    query, chunk_sums, group_sums = (np.asarray(x, np.float64) for x in (query, chunk_sums, group_sums))
    pages_per_chunk = group_sums.shape[1] // chunk_sums.shape[1]
    result = []
    for k in range(query.shape[0]):
        opened: dict[int, set[int]] = {}
        for n in range(query.shape[1]):
            middle = range(sink_chunks, max(own_chunk - local_chunks, sink_chunks))
            chunks = sorted(middle, key=lambda c, k=k, n=n: (-(query[k, n] @ chunk_sums[k, c]), c))[:top_chunks]
            if local_chunks == 0 and own_chunk - 1 in middle and own_chunk - 1 not in chunks:
                chunks[-1] = own_chunk - 1
            pages = [c * pages_per_chunk + i for c in chunks for i in range(pages_per_chunk)]
            for page in sorted(pages, key=lambda p, k=k, n=n: (-(query[k, n] @ group_sums[k, p]), p))[: top_groups // 2]:
                opened.setdefault(page, set()).add(n)
        result.append(opened)
    return result
