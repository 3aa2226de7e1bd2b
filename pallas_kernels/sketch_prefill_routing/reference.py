"""What the routing must decide, in float64 numpy, one kv head, query and page at a time."""

from __future__ import annotations

import numpy as np


def reference_route(
    query, keys, sketched, stamps, first_position, count, *, chunk_size, group_size, sink_chunks, local_chunks, scale, threshold, capacity,
    screen=None, votes=0, vote_share=1.0, vote_stride=1, stride=1,
):  # fmt: skip
    """query [T, N, H]; keys [K, S, H] exact; sketched [K, S, H]. screen: None, or a dict with the fields of config.Screen.

    votes: where they count, stamps are [3, K, P] instead: the last chunk in which a page got votes, whether it was open there, how many.

    Returns visible[k][t], the pages each query sees, stamps, refused, unopened (summed over every fourth query times 4, averaged over
    heads), and the smallest |log(mass / bound)| met: how far rounding is from changing a decision.
    """
    query, keys, sketched = (np.asarray(x, np.float64) for x in (query, keys, sketched))
    stamps = np.array(stamps)
    if votes:
        touched, opened, cast = stamps
    kv_heads, ratio = len(keys), query.shape[1] // len(keys)
    per_chunk = chunk_size // group_size
    stride, request_stride = (screen["stride"], screen["request_stride"]) if screen else (stride, stride)
    visible = [{} for _ in range(kv_heads)]
    refused, unopened, closest = 0, 0.0, np.inf

    def reaches(log_score, log_bound):
        nonlocal closest
        closest = min(closest, abs(log_score - log_bound))
        return log_score >= log_bound

    def log_sum(values):
        peak = max(values)
        return peak + np.log(sum(np.exp(v - peak) for v in values))

    for k in range(kv_heads):
        wanted_before = set()
        for own in range(first_position // chunk_size, (first_position + count - 1) // chunk_size + 1):
            local = max(own - local_chunks, 0)
            middle = range(sink_chunks * per_chunk, max(local, sink_chunks) * per_chunk)
            if votes:
                kept = ((touched[k] == own) & (opened[k] > 0)) | ((touched[k] == own - 1) & (cast[k] >= votes))
                carried = np.flatnonzero(kept).tolist()
            else:
                carried = [page for page in range(stamps.shape[1]) if stamps[k, page] >= own - 1]
            voted_here = {p: cast[k, p] * (touched[k, p] == own) for p in middle} if votes else {}
            listed = dict.fromkeys(carried[:capacity], 0)
            candidates = dict.fromkeys(sorted(wanted_before)[: screen["capacity"]], 0) if screen else {}
            wanted_here, turned_down, screened = set(), set(), []
            for row in range(chunk_size):
                t = own * chunk_size + row
                if not first_position <= t < first_position + count:
                    continue
                near = [s for s in range(t + 1) if s < min(sink_chunks, local) * chunk_size or s >= local * chunk_size]
                heads = []
                for n in range(k * ratio, (k + 1) * ratio):
                    q = query[t - first_position, n]
                    tokens = {p: sketched[k, p * group_size : (p + 1) * group_size] for p in middle}
                    exact = {p: (rows @ q).max() * scale for p, rows in tokens.items()}
                    cheap = exact
                    if screen:
                        off = screen["spread"] * np.linalg.norm(q)
                        cheap = {p: (rows.mean(0) @ q + off * np.sqrt(rows.var(0).mean())) * scale for p, rows in tokens.items()}
                    heads.append((exact, cheap, log_sum(list(keys[k, near] @ q * scale))))
                if t % stride == 0:
                    if t % 4 == 0:
                        screened.append((row, [(cheap, log_sum([window, *cheap.values()])) for _, cheap, window in heads]))
                    if screen:
                        bound = np.log(threshold * screen["margin"])
                        wanted = [p for p in middle if np.any([reaches(cheap[p], window + bound) for _, cheap, window in heads])]
                        wanted_here.update(wanted)
                        for p in wanted:
                            if p not in candidates and len(candidates) < screen["capacity"]:
                                candidates[p] = row
                if t % request_stride == 0:
                    pool, bound = sorted(candidates) if screen else list(middle), np.log(threshold * (screen["threshold"] if screen else 1))
                    totals = [log_sum([window, *(cheap[p] for p in pool)]) for _, cheap, window in heads]
                    reached = [[reaches(exact[p], total + bound) for (exact, *_), total in zip(heads, totals, strict=True)] for p in pool]
                    voters = zip(heads, totals, strict=True) if t % vote_stride == 0 else ()
                    for (exact, *_), total, p in ((*x, p) for x in voters for p in voted_here):
                        voted_here[p] += reaches(exact[p], total + bound + np.log(vote_share))
                    for p in (p for p, any_head in zip(pool, reached, strict=True) if np.any(any_head)):
                        if p not in listed and len(listed) < capacity:
                            listed[p] = row
                        if p not in listed:
                            turned_down.add(p)
                        elif not votes:
                            stamps[k, p] = own
                visible[k][t] = set(listed)
            wanted_before = wanted_here
            refused += len(turned_down)
            if votes:
                refused += len(set(carried) - set(listed) - turned_down)
                for p in middle:
                    if voted_here[p] > 0 or (p in listed and p not in carried):
                        touched[k, p], opened[k, p], cast[k, p] = own, p in listed or p in carried, voted_here[p]
            for row, heads in screened:
                for cheap, total in heads:
                    shut = [np.exp(score - total) for p, score in cheap.items() if listed.get(p, chunk_size) > row]
                    unopened += 4 * sum(shut) / query.shape[1]
    return visible, stamps, refused, unopened, closest
