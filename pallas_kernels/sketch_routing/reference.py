"""What the routing must decide, in float64 numpy, one kv head and one group at a time."""

from __future__ import annotations

import numpy as np

LEVELS = np.array([-1.5104, -0.4528, 0.4528, 1.5104])


def reference_routing(
    query,
    rotated,
    means,
    codes,
    scales,
    stamps,
    window_scores,
    own_chunk,
    *,
    sink_chunks,
    local_chunks,
    group_size,
    threshold,
    parts,
    room,
    scale,
    votes=0,
    vote_share=1.0,
    voting=1,
):
    """votes: where they count, stamps are [3, K, P]: the last chunk in which a page got votes, whether it was open there, how many.

    codes are unpacked [K, S, H]; window_scores [K, G, W] exact scaled scores of the window tokens. room: pages of each remainder of the
    page id by `parts` that can be visible.

    Returns stamps, a list of visible page ids for each kv head, refused [K], and the masses [K, G, P] (0 outside the routed middle).
    """
    query, rotated, means, scales, window_scores = (np.asarray(x, np.float64) for x in (query, rotated, means, scales, window_scores))
    stamps = np.array(stamps)
    if votes:
        touched, opened, cast = stamps
    kv_heads, heads, _ = query.shape
    chunk_size = np.shape(codes)[1] // means.shape[1]
    pages_per_chunk, pages = chunk_size // group_size, stamps.shape[-1]
    masses = np.zeros((kv_heads, heads, pages))
    listed, refused = [], np.zeros(kv_heads, int)
    middle = range(sink_chunks * pages_per_chunk, max(own_chunk - local_chunks, sink_chunks) * pages_per_chunk)
    for k in range(kv_heads):
        for n in range(heads):
            scores = []
            for page in middle:
                tokens = range(page * group_size, (page + 1) * group_size)
                guess = [means[k, t // chunk_size] @ query[k, n] + scales[k, t] * (LEVELS[codes[k, t]] @ rotated[k, n]) for t in tokens]
                scores.append(max(guess) * scale)
            everything = np.concatenate([np.array(scores), window_scores[k, n]])
            shifted = np.exp(everything - everything.max())
            masses[k, n, middle.start : middle.start + len(scores)] = shifted[: len(scores)] / shifted.sum()
        wanted = [page for page in middle if (masses[k, :, page] >= threshold).any()]
        if votes:
            here, before = touched[k] == own_chunk, touched[k] == own_chunk - 1
            seen = np.flatnonzero((here & (opened[k] > 0)) | (before & (cast[k] >= votes))).tolist()
        else:
            seen = [page for page in range(pages) if stamps[k, page] >= own_chunk - 1]
        fresh = [page for page in wanted if page not in seen]
        taken = []
        for part in range(parts):
            left = room - sum(page % parts == part for page in seen)
            taken += [page for page in fresh if page % parts == part][: max(left, 0)]
        refused[k] = len(fresh) - len(taken)
        if votes:
            for page in middle:
                fresh_votes = voting * (masses[k, :, page] >= threshold * vote_share).sum()
                if fresh_votes or page in taken:
                    cast[k, page] = fresh_votes + cast[k, page] * here[page]
                    touched[k, page], opened[k, page] = own_chunk, page in seen or page in taken
        for page in wanted:
            if not votes and (page in seen or page in taken):
                stamps[k, page] = own_chunk
        listed.append(sorted(seen + taken))
    return stamps, listed, refused, masses
