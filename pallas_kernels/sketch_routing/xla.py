"""The same routing in plain XLA: any device, any sizes."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.votes import is_open, stamp_of, votes_in

LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)


def scan(
    rotated: Float[Array, "K rows H"],
    chunk_scores: Float[Array, "K C Gp"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 5"],
    *,
    heads: int,
    group_size: int,
    scale: float,
) -> tuple[Float[Array, "K P Gp"], Float[Array, "K 1 2 Gp"]]:
    """Scores of the groups of the routed middle, -inf elsewhere, and their largest and sum of exp(score - largest)."""
    chunk_size = codes.shape[1] // chunk_scores.shape[1]
    pages_per_chunk = chunk_size // group_size
    unpacked = jnp.concatenate([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    levels = jnp.asarray(LEVELS, jnp.float32)[unpacked]
    rotated = sum(jnp.split(rotated.astype(jnp.float32), 2, axis=1))
    residual = jnp.einsum("kgh,ksh->ksg", rotated, levels, precision=lax.Precision.HIGHEST) * scales.astype(jnp.float32)[:, :, None]
    best = residual.reshape(residual.shape[0], -1, group_size, residual.shape[2]).max(2)
    score = (best + jnp.repeat(chunk_scores, pages_per_chunk, axis=1)) * scale
    chunk = jnp.arange(score.shape[1]) // pages_per_chunk
    live = ((chunk >= middle[0]) & (chunk < middle[1]))[:, None] & (jnp.arange(score.shape[2]) < heads)
    score = jnp.where(live, score, -jnp.inf)
    peak = score.max(1)
    total = jnp.exp(score - jnp.where(peak > -jnp.inf, peak, 0)[:, None]).sum(1)
    return score, jnp.stack([peak, total], axis=1)[:, None]


def select(
    scores: Float[Array, "K P Gp"],
    partials: Float[Array, "K programs 2 Gp"],
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    middle: Int[Array, " 5"],
    *,
    pages_per_chunk: int,
    threshold: float,
    parts: int,
    room: int,
    votes: int = 0,
    vote_share: float = 1.0,
) -> tuple[Array, ...]:
    """Threshold, stamps, page lists, figures; see kernel.select."""
    own, after = middle[2], middle[3]
    windows = jax.nn.logsumexp(window[:, :, 0], axis=1, b=window[:, :, 1])
    heads = window.shape[3]
    scores, partials = scores[:, :, :heads].swapaxes(1, 2), partials[..., :heads]
    total = jnp.logaddexp(jax.nn.logsumexp(partials[:, :, 0], axis=1, b=partials[:, :, 1]), windows)
    wanted = (scores >= (total + math.log(threshold))[..., None]).any(1) & (scores > -jnp.inf).any(1)
    kept = is_open(stamps, own, votes)
    seen = kept & (jnp.arange(stamps.shape[1]) < middle[1] * pages_per_chunk)
    fresh = wanted & ~seen
    by_part = partial(_by_part, parts=parts)
    left = jnp.maximum(room - by_part(seen).sum(2, keepdims=True), 0)
    granted = by_part(fresh) & (jnp.cumsum(by_part(fresh), axis=2) <= left)
    taken = granted.swapaxes(1, 2).reshape(granted.shape[0], -1)[:, : stamps.shape[1]]
    visible = seen | taken
    if votes:
        cast = ((scores >= (total + math.log(threshold * vote_share))[..., None]) & (scores > -jnp.inf)).sum(1) * middle[4]
        stamps = jnp.where((cast > 0) | taken, stamp_of(own, visible, votes_in(stamps, own, votes) + cast, votes), stamps)
    else:
        stamps = jnp.where(wanted & visible, own, stamps)
    refused = by_part(fresh & ~taken).sum(2)
    counts = jnp.stack([jnp.minimum(by_part(visible).sum(2), room), refused], axis=2).astype(jnp.int32)
    shares = jnp.where(visible[:, None], 0, jnp.exp(scores - total[..., None]))
    unopened = jax.vmap(by_part, 1, 3)(shares).sum(2)
    carried = is_open(stamps, after, votes) & (visible | (votes > 0))  # votes may keep more than there was room for
    return stamps, *page_list(taken, parts, room), *page_list(carried, parts, room), counts, unopened


def _by_part(x: Array, parts: int) -> Array:
    """[K, P] -> [K, parts, P / parts]: page p is number p // parts of part p % parts; missing ones zero."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % parts)))
    return x.reshape(x.shape[0], -1, parts).swapaxes(1, 2)


def page_list(chosen: Bool[Array, "K P"], parts: int, room: int) -> tuple[Int[Array, "K M"], Int[Array, "K parts"]]:
    """The chosen pages of each part, ascending, and how many they are."""
    chosen = _by_part(chosen, parts)
    page = jnp.arange(chosen.shape[2]) * parts + jnp.arange(parts)[:, None]
    rank = jnp.where(chosen, jnp.cumsum(chosen, axis=2) - 1, room)

    def one(rank: Array, page: Array) -> Array:
        return jnp.zeros((room,), jnp.int32).at[rank].set(page, mode="drop")

    ids = jax.vmap(jax.vmap(one), (0, None))(rank, page)
    return ids.reshape(len(ids), -1), jnp.minimum(chosen.sum(2), room).astype(jnp.int32)
