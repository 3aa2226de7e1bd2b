"""The same routing in plain XLA: any device, any sizes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)


def scan(
    query: Float[Array, "K G H"],
    rotated: Float[Array, "K G H"],
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 4"],
    *,
    group_size: int,
    scale: float,
) -> Float[Array, "K G P"]:
    """Scores of the groups of the routed middle, -inf elsewhere."""
    kv_heads, heads, _ = query.shape
    chunk_size = codes.shape[1] // means.shape[1]
    unpacked = jnp.concatenate([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    levels = jnp.asarray(LEVELS, jnp.float32)[unpacked]
    residual = jnp.einsum("kgh,ksh->kgs", rotated.astype(jnp.float32), levels, precision=lax.Precision.HIGHEST)
    base = jnp.einsum("kgh,kch->kgc", query.astype(jnp.float32), means.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    best = (residual * scales.astype(jnp.float32)[:, None]).reshape(kv_heads, heads, -1, group_size).max(-1)
    score = (best + jnp.repeat(base, chunk_size // group_size, axis=-1)) * scale
    chunk = jnp.arange(score.shape[-1]) // (chunk_size // group_size)
    return jnp.where((chunk >= middle[0]) & (chunk < middle[1]), score, -jnp.inf)


def select(
    scores: Float[Array, "K G P"],
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    middle: Int[Array, " 4"],
    *,
    pages_per_chunk: int,
    threshold: float,
    capacity: int,
) -> tuple[Int[Array, "K P"], Int[Array, "K M"], Int[Array, "K 1"], Int[Array, "K M"], Int[Array, "K 1"], Int[Array, "K 2"], Array]:
    """Threshold, stamps, page lists, unopened mass; see kernel.select."""
    own, after = middle[2], middle[3]
    windows = jax.nn.logsumexp(window[:, :, 0], axis=1, b=window[:, :, 1])
    total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), windows)
    wanted = (scores >= (total + math.log(threshold))[..., None]).any(1) & (scores > -jnp.inf).any(1)
    seen = (stamps >= own - 1) & (jnp.arange(stamps.shape[1]) < middle[1] * pages_per_chunk)
    fresh = wanted & ~seen
    room = jnp.maximum(capacity - seen.sum(1, keepdims=True), 0)
    taken = fresh & (jnp.cumsum(fresh, axis=1) <= room)
    visible = seen | taken
    stamps = jnp.where(wanted & visible, own, stamps)
    refused = jnp.maximum(fresh.sum(1) - room[:, 0], 0)
    counts = jnp.stack([jnp.minimum(visible.sum(1), capacity), refused], axis=1).astype(jnp.int32)
    unopened = jnp.where(visible[:, None], 0, jnp.exp(scores - total[..., None])).sum(-1)
    return stamps, *page_list(taken, capacity), *page_list(visible & (stamps >= after - 1), capacity), counts, unopened


def page_list(chosen: Bool[Array, "K P"], capacity: int) -> tuple[Int[Array, "K M"], Int[Array, "K 1"]]:
    """The chosen pages, ascending, and how many they are."""
    page = jnp.arange(chosen.shape[1])
    rank = jnp.where(chosen, jnp.cumsum(chosen, axis=1) - 1, capacity)
    ids = jax.vmap(lambda r: jnp.zeros((capacity,), jnp.int32).at[r].set(page, mode="drop"))(rank)
    return ids, jnp.minimum(chosen.sum(1, keepdims=True), capacity).astype(jnp.int32)
