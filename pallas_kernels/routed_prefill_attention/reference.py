"""Attention of queries over windows and listed pages, query by query, in float64 numpy."""

from __future__ import annotations

import numpy as np


def reference_attention(query, pages, first_position, count, page_ids, since, counts, *, chunk_size, sink_chunks, local_chunks, scale):
    """Arguments as in api.py. Returns (out [T, N, H], log-sum-exp [T, N]), zeros for rows from `count` on."""
    query, pages = np.asarray(query, np.float64), np.asarray(pages, np.float64)
    length, heads, head_dim = query.shape
    kv_heads, held, _, group_size, _ = pages.shape
    lists, ratio = page_ids.shape[2], heads // kv_heads
    keys, values = (pages[:, :, part].reshape(kv_heads, held * group_size, head_dim) for part in (0, 1))
    out, lse = np.zeros((length, heads, head_dim)), np.zeros((length, heads))
    for i in range(int(count)):
        position = int(first_position) + i
        chunk, row = divmod(position, chunk_size)
        block = chunk - int(first_position) // chunk_size
        local = max(chunk - local_chunks, 0)
        windows = set(range(min(sink_chunks, local) * chunk_size)) | set(range(local * chunk_size, position + 1))
        for head in range(heads):
            k = head // ratio
            r = 0 if lists == 1 else head % ratio
            tokens = set(windows)
            for slot in range(counts[k, block, r]):
                if since[k, block, r, slot] <= row:
                    page = int(page_ids[k, block, r, slot])
                    tokens |= set(range(page * group_size, (page + 1) * group_size))
            chosen = sorted(tokens)
            scores = keys[k, chosen] @ query[i, head] * scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values[k, chosen] / weights.sum()
            lse[i, head] = scores.max() + np.log(weights.sum())
    return out, lse
