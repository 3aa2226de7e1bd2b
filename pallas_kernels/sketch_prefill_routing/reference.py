"""What the routing must decide, in float64 numpy, one kv head, query and page at a time."""

from __future__ import annotations

import numpy as np


def reference_route(
    query, keys, sketched, stamps, first_position, count, *, chunk_size, group_size, sink_chunks, local_chunks, scale, threshold, capacity,
    screen=None,
):  # fmt: skip
    """query [T, N, H]; keys [K, S, H] exact; sketched [K, S, H]. screen: None, or dict(stride, spread, margin, threshold, capacity).

    Returns visible[k][t], the pages each query sees, stamps, refused, unopened (summed over probing queries times stride, averaged over
    heads), and the smallest |log(mass / bound)| met: how far rounding is from changing a decision.
    """
    query, keys, sketched = (np.asarray(x, np.float64) for x in (query, keys, sketched))
    stamps = np.array(stamps)
    kv_heads, ratio = len(keys), query.shape[1] // len(keys)
    per_chunk = chunk_size // group_size
    stride = screen["stride"] if screen else 1
    visible = [{} for _ in range(kv_heads)]
    refused, unopened, closest = 0, 0.0, np.inf

    def decide(mass, bound):
        nonlocal closest
        closest = min(closest, abs(np.log(mass / bound)))
        return mass >= bound

    for k in range(kv_heads):
        candidates_before = {}
        for own in range(first_position // chunk_size, (first_position + count - 1) // chunk_size + 1):
            local = max(own - local_chunks, 0)
            middle = range(sink_chunks * per_chunk, max(local, sink_chunks) * per_chunk)
            carried = [page for page in range(stamps.shape[1]) if stamps[k, page] >= own - 1]
            listed = dict.fromkeys(carried[:capacity], 0)
            candidates = dict.fromkeys(sorted(candidates_before)[: screen["capacity"]], 0) if screen else {}
            found = {}
            probes = []
            for row in range(chunk_size):
                t = own * chunk_size + row
                if not first_position <= t < first_position + count:
                    continue
                if t % stride == 0:
                    near = [s for s in range(t + 1) if s < min(sink_chunks, local) * chunk_size or s >= local * chunk_size]
                    heads = []
                    for n in range(k * ratio, (k + 1) * ratio):
                        q = query[t - first_position, n]
                        tokens = {p: sketched[k, p * group_size : (p + 1) * group_size] for p in middle}
                        exact = {p: (rows @ q).max() * scale for p, rows in tokens.items()}
                        cheap = exact
                        if screen:
                            cheap = {
                                p: (rows.mean(0) @ q + screen["spread"] * np.linalg.norm(q) * np.sqrt(rows.var(0).mean())) * scale
                                for p, rows in tokens.items()
                            }
                        windows = (keys[k, near] @ q) * scale
                        peak = max([windows.max(), *cheap.values()])
                        total = np.exp(windows - peak).sum() + sum(np.exp(s - peak) for s in cheap.values())
                        near_share = np.exp(windows - peak).sum() / total
                        heads.append(({p: np.exp(s - peak) / total for p, s in cheap.items()}, exact, peak + np.log(total), near_share))
                    bound = threshold
                    pool = list(middle)
                    if screen:
                        wanted = [
                            p
                            for p in middle
                            if np.any([decide(mass[p], threshold * screen["margin"] * near) for mass, _, _, near in heads])
                        ]
                        found.update({p: row for p in wanted if p not in found})
                        for p in wanted:
                            if p not in candidates and len(candidates) < screen["capacity"]:
                                candidates[p] = row
                        pool, bound = sorted(candidates), threshold * screen["threshold"]
                    asked = [p for p in pool if np.any([decide(np.exp(exact[p] - log), bound) for _, exact, log, _ in heads])]
                    for p in asked:
                        if p not in listed and len(listed) < capacity:
                            listed[p] = row
                        elif p not in listed:
                            refused += 1 if p not in found.get("refused", set()) else 0
                            found.setdefault("refused", set()).add(p)
                        if p in listed:
                            stamps[k, p] = own
                    probes.append((row, heads))
                visible[k][t] = set(listed)
            candidates_before = {p for p in found if p != "refused"}
            for row, heads in probes:
                for mass, *_ in heads:
                    unopened += stride * sum(m for p, m in mass.items() if listed.get(p, chunk_size) > row) / query.shape[1]
    return visible, stamps, refused, unopened, closest
