"""The same routing in plain XLA: any device, any sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def route(query, chunk_sums, group_sums, middle, *, top_chunks, groups, forced, capacity):
    pages_per_chunk = group_sums.shape[1] // chunk_sums.shape[1]
    query = query.astype(jnp.float32)
    chunk = jnp.arange(chunk_sums.shape[1])
    scores = jnp.einsum("kgh,kch->kgc", query, chunk_sums.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    best, chosen = lax.top_k(jnp.where((chunk >= middle[0]) & (chunk < middle[1]), scores, -jnp.inf), top_chunks)
    chosen = jnp.where(best > -jnp.inf, chosen, -1)
    if forced:
        before = middle[2] - 1
        missing = (before >= middle[0]) & ~(chosen == before).any(-1, keepdims=True)
        chosen = jnp.where(missing & (jnp.arange(top_chunks) == top_chunks - 1), before, chosen)
    chosen = jnp.sort(chosen, axis=-1)  # ties between groups go to the lowest page
    page = (chosen[..., None] * pages_per_chunk + jnp.arange(pages_per_chunk)).reshape(*chosen.shape[:2], -1)
    sums = jax.vmap(lambda sums, ids: sums[ids])(group_sums, jnp.maximum(page, 0)).astype(jnp.float32)
    scores = jnp.einsum("kgh,kgnh->kgn", query, sums, precision=lax.Precision.HIGHEST)
    best, slots = lax.top_k(jnp.where(page >= 0, scores, -jnp.inf), min(groups, page.shape[-1]))
    opened = jnp.where(best > -jnp.inf, jnp.take_along_axis(page, slots, axis=-1), group_sums.shape[1])

    def one(opened):  # [G, n] of one kv head
        bits = jnp.int32(1) << jnp.arange(opened.shape[0])[:, None]
        marks = jnp.zeros((group_sums.shape[1],), jnp.int32).at[opened].add(jnp.broadcast_to(bits, opened.shape), mode="drop")
        visible = marks != 0
        rank = jnp.where(visible, jnp.cumsum(visible) - 1, capacity)
        ids = jnp.zeros((capacity,), jnp.int32).at[rank].set(jnp.arange(marks.shape[0]), mode="drop")
        heads = jnp.zeros((capacity,), jnp.int32).at[rank].set(marks, mode="drop")
        listed = visible.sum()
        return ids, heads, jnp.stack([jnp.minimum(listed, capacity), jnp.maximum(listed - capacity, 0)]).astype(jnp.int32)

    return jax.vmap(one)(opened)
