"""Hierarchical global attention as slow float64 numpy, one token at a time: what the fast path is tested against.

It follows the method's description sentence by sentence (arXiv 2606.30709 for the paper policy, the README for the sketch policy) and
shares no code with summaries.py, routing.py or attention.py; only the rotary frequencies of a RopeConfig come from rope.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.rope import frequencies

LEVELS = np.array([-1.5104, -0.4528, 0.4528, 1.5104])  # Lloyd-Max quantiser of a unit Gaussian, four levels
THRESHOLDS = np.array([-0.9816, 0.0, 0.9816])


class Reference(NamedTuple):
    """out [T, N, H] float64; visible_keys [T, N] keys each softmax ran over; opened [T, N, groups] routed pages each query and head sees;
    requested [T, K, groups] the pages a query asked for itself (sketch policy) or whose group any of its heads requested (paper policy);
    refused: page requests turned down because `page_capacity` pages were open."""

    out: np.ndarray
    visible_keys: np.ndarray
    opened: np.ndarray
    requested: np.ndarray
    refused: int


def reference_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    config: HGAConfig,
    rope: RopeConfig | None = None,
    rotation: np.ndarray | None = None,
    query_start: int = 0,
    scale: float | None = None,
) -> Reference:
    """Attention of one call's queries: query [T, N, H] at positions query_start.., key and value [S, K, H] with S = query_start + T.

    T = 1 is a decode step of the paper policy. The sketch policy starts with no remembered requests.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    length, heads, width = query.shape
    kv_heads = key.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    groups = len(key) // config.chunk_size * config.groups_per_chunk
    route = _paper if config.policy == "paper" else _sketch
    opened, requested, refused = route(query, key, config, rope, rotation, query_start, scale)

    out = np.zeros((length, heads, width))
    visible_keys = np.zeros((length, heads), np.int64)
    for t in range(length):
        windows = _window_tokens(query_start + t, config)
        for n in range(heads):
            visible = windows.copy()
            for group in range(groups):
                if opened[t, n, group]:
                    visible[group * config.group_size : (group + 1) * config.group_size] = True
            positions = np.flatnonzero(visible)
            k = n // (heads // kv_heads)
            scores = key[positions, k] @ query[t, n] * scale
            weights = np.exp(scores - scores.max())
            out[t, n] = weights @ value[positions, k] / weights.sum()
            visible_keys[t, n] = len(positions)
    return Reference(out, visible_keys, opened, requested, refused)


def _window_tokens(position: int, config: HGAConfig) -> np.ndarray:
    """Which tokens the token at `position` always sees: sinks, local window, own chunk, causally; bool [whole chunks so far * chunk]."""
    chunk = position // config.chunk_size
    visible = np.zeros((chunk + 1) * config.chunk_size, bool)
    visible[: config.sink_chunks * config.chunk_size] = True
    visible[max(chunk - config.local_chunks, 0) * config.chunk_size :] = True
    visible[position + 1 :] = False
    return visible


def _turn(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rotate half-split pairs by `angle`."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1)


def _paper_summary(keys: np.ndarray, start: int, config: HGAConfig, rope: RopeConfig | None) -> np.ndarray:
    """Unscaled summary [K, H] of neighbouring tokens, keys [n, K, H] rotated to positions start.. ."""
    total = keys.sum(0)
    if config.summary == "mean":
        return total
    turns = frequencies(rope, keys.shape[-1])
    positions = start + np.arange(len(keys))
    raw = _turn(keys, -positions[:, None, None] * turns).sum(0)
    at_middle = _turn(raw, (start + (len(keys) - 1) // 2) * turns)
    fast = (config.chunk_size - 1) * turns > 0.5  # the cutoff uses the chunk size for groups too
    return np.where(np.concatenate([fast, fast]), total, at_middle)


def _best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda item: (-scores[item], item))[:count]


def _paper(query, key, config, rope, rotation, query_start, scale):
    length, heads = query.shape[:2]
    kv_heads, size, pages = key.shape[1], config.chunk_size, config.groups_per_chunk
    closed = len(key) // size
    chunk_sums = [_paper_summary(key[c * size : (c + 1) * size], c * size, config, rope) for c in range(closed)]
    starts = [g * config.group_size for g in range(closed * pages)]
    group_sums = [_paper_summary(key[s : s + config.group_size], s, config, rope) for s in starts]
    opened = np.zeros((length, heads, closed * pages), bool)
    requested = np.zeros((length, kv_heads, closed * pages), bool)
    for own in range(query_start // size, (query_start + length - 1) // size + 1):
        rows = [t for t in range(length) if (query_start + t) // size == own]
        middle = range(config.sink_chunks, own - config.local_chunks)
        if not middle:
            continue
        for n in range(heads):
            k = n // (heads // kv_heads)
            # Each query requests its best chunks; the block's shared score is the max over those who asked.
            asked, shared = {}, {}
            for t in rows:
                scores = {c: float(query[t, n] @ chunk_sums[c][k]) * scale for c in middle}
                asked[t] = set(_best(scores, config.top_chunks))
                for c in asked[t]:
                    shared[c] = max(shared.get(c, -np.inf), scores[c])
            selected = _best(shared, config.top_chunks)
            forced = own - 1 if config.local_chunks == 0 else None
            if forced is not None and forced not in selected:
                selected[-1] = forced
            # Groups: the same again among the groups of the chunks a query sees.
            seen, wanted, shared_groups = set(), {}, {}
            if forced is not None:
                seen.add(forced)
            for t in rows:
                seen |= asked[t] & set(selected)
                candidates = [g for c in seen for g in range(c * pages, (c + 1) * pages)]
                scores = {g: float(query[t, n] @ group_sums[g][k]) * scale for g in candidates}
                wanted[t] = set(_best(scores, config.top_groups // 2))
                for g in wanted[t]:
                    shared_groups[g] = max(shared_groups.get(g, -np.inf), scores[g])
                    requested[t, k, g] = True
            kept = set(_best(shared_groups, config.top_groups))
            visible = set()
            for t in rows:
                visible |= wanted[t] & kept
                opened[t, n, list(visible)] = True
    return opened, requested, 0


def told_coordinates(sinks: np.ndarray, chunk_size: int, pairs: int) -> np.ndarray:
    """Where sketches of one kv head remember residuals [H], told by the keys of the sinks [S, H]."""
    half = sinks.shape[1] // 2
    if pairs == half:
        return np.ones(2 * half)
    keys = sinks.reshape(-1, chunk_size, 2 * half)
    spread = ((keys - keys.mean(1, keepdims=True)) ** 2).sum((0, 1))
    best = np.argsort(-(spread[:half] + spread[half:]), kind="stable")[:pairs]
    return np.isin(np.arange(2 * half) % half, best)


def sketch_tokens(keys: np.ndarray, told: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One closed chunk of one kv head, keys [C, H]: (mean [H], codes [C, H] in 0..3, scales [C])."""
    mean = keys.mean(0)
    residual = ((keys - mean) * told) @ rotation
    size = np.sqrt((residual**2).mean(-1, keepdims=True))
    codes = np.searchsorted(THRESHOLDS, residual / np.where(size > 0, size, 1), side="right")
    levels = LEVELS[codes]
    return mean, codes, (residual * levels).sum(-1) / (levels**2).sum(-1)


def _sketch(query, key, config, rope, rotation, query_start, scale):
    length, heads, width = query.shape
    kv_heads, size, pages = key.shape[1], config.chunk_size, config.groups_per_chunk
    ratio, closed = heads // kv_heads, len(key) // size
    rotation = np.asarray(rotation, np.float64)
    estimates = np.zeros((closed * size, kv_heads, width))  # what mean + sketch remember of each key, in rotated coordinates
    means = np.zeros((closed * size, kv_heads, width))
    for c in range(closed):
        part = slice(c * size, (c + 1) * size)
        for k in range(kv_heads):
            told = told_coordinates(key[: config.sink_chunks * size, k], size, config.sketched_pairs(width))
            mean, codes, scales = sketch_tokens(key[part, k], told, rotation)
            means[part, k] = mean
            estimates[part, k] = LEVELS[codes] * scales[:, None]
    opened = np.zeros((length, heads, closed * pages), bool)
    requested = np.zeros((length, kv_heads, closed * pages), bool)
    refused = 0
    for k in range(kv_heads):
        stamps = np.full(closed * pages, -2)  # the last chunk in which a page was requested
        votes, kept, votes_of = np.zeros(closed * pages, int), np.zeros(closed * pages, bool), -1  # votes in chunk `votes_of`
        for t in range(length):
            position = query_start + t
            own = position // size
            middle = np.arange(config.sink_chunks * pages, max(own - config.local_chunks, config.sink_chunks) * pages)
            tokens = slice(config.sink_chunks * size, config.sink_chunks * size + len(middle) * config.group_size)
            windows = np.flatnonzero(_window_tokens(position, config))
            wanted = np.zeros(closed * pages, bool)
            if own != votes_of:
                kept = votes >= config.votes_for(ratio) if own == votes_of + 1 else np.zeros_like(kept)
                kept &= kept.cumsum() <= config.page_capacity
                votes, votes_of = np.zeros_like(votes), own
            for n in range(k * ratio, (k + 1) * ratio):
                exact = key[windows, k] @ query[t, n] * scale
                q_rotated = query[t, n] @ rotation
                guess = (means[tokens, k] @ query[t, n] + estimates[tokens, k] @ q_rotated) * scale
                score = guess.reshape(-1, config.group_size).max(-1) if len(middle) else np.zeros(0)
                peak = max(exact.max(), score.max(initial=-np.inf))
                mass = np.exp(score - peak) / (np.exp(exact - peak).sum() + np.exp(score - peak).sum())
                wanted[middle[mass >= config.threshold_for(ratio)]] = True
                if position % config.vote_stride == 0:
                    votes[middle[mass >= config.threshold_for(ratio) * config.vote_share]] += 1
            requested[t, k] = wanted
            seen = (stamps == own) | kept if config.counts_votes else stamps >= own - 1
            room = config.page_capacity - int(seen.sum())
            fresh = np.flatnonzero(wanted & ~seen)
            refused += max(len(fresh) - room, 0)
            wanted[fresh[max(room, 0) :]] = False
            stamps[wanted] = own
            opened[t, k * ratio : (k + 1) * ratio] = (stamps == own) | kept if config.counts_votes else stamps >= own - 1
    return opened, requested, refused
