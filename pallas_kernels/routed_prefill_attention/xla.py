"""The same attention in plain XLA, a block at a time: any device, any sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def routed_prefill_attention(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    first_position: Int[Array, ""],
    count: Int[Array, ""],
    page_ids: Int[Array, "K B R M"],
    since: Int[Array, "K B R M"],
    counts: Int[Array, "K B R"],
    *,
    chunk_size: int,
    sink_chunks: int,
    local_chunks: int,
    scale: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See api.py."""
    length, heads, width = query.shape
    kv_heads, held, _, group_size, _ = pages.shape
    _, blocks, lists, slots = page_ids.shape
    each = chunk_size // group_size
    precision = lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    first_chunk = first_position // chunk_size
    before = first_position - first_chunk * chunk_size  # rows of the first block that precede the queries
    row = jnp.arange(chunk_size)

    def one(b: Array) -> tuple[Array, Array]:
        own = first_chunk + b
        index = b * chunk_size - before + row
        live = (index >= 0) & (index < count)
        block = query.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        block = jnp.where(live[:, None, None], block, 0).reshape(chunk_size, kv_heads, lists, -1, width).transpose(1, 2, 3, 0, 4)

        local = jnp.maximum(own - local_chunks, 0)
        sinks, near, mine = jnp.arange(sink_chunks * each), local * each + jnp.arange(local_chunks * each), own * each + jnp.arange(each)
        window = jnp.concatenate([sinks, near, mine])
        open_from = jnp.concatenate([jnp.where(sinks < local * each, 0, chunk_size), jnp.where(near < own * each, 0, chunk_size)])
        open_from = jnp.concatenate([jnp.repeat(open_from, group_size), row])  # the own chunk token by token
        shape = (kv_heads, lists, window.shape[0])
        ids = jnp.concatenate([jnp.broadcast_to(window, shape), page_ids[:, b]], axis=-1)
        listed = jnp.where(jnp.arange(slots) < counts[:, b, :, None], since[:, b], chunk_size)
        open_from = jnp.concatenate(
            [jnp.broadcast_to(open_from, (*shape[:2], open_from.shape[0])), jnp.repeat(listed, group_size, axis=-1)], axis=-1
        )
        parts = jax.vmap(lambda pages, ids: pages[ids])(pages, jnp.clip(ids, 0, held - 1))  # [K, R, n, 2, g, H]
        # Tokens that no live query may see can hold anything, and zero times NaN is NaN.
        seen = open_from <= jnp.where(live, row, -1).max()
        keys, values = (jnp.where(seen[..., None], parts[:, :, :, part].reshape(kv_heads, lists, -1, width), 0) for part in (0, 1))
        scores = jnp.einsum("krnqh,krsh->krnqs", block, keys, precision=precision, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(open_from[:, :, None, None] <= row[:, None], scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None]).astype(values.dtype)
        out = jnp.einsum("krnqs,krsh->krnqh", weights, values, precision=precision, preferred_element_type=jnp.float32)
        out = jnp.where(live[:, None], out, 0).transpose(3, 0, 1, 2, 4).reshape(chunk_size, heads, width)
        return out.astype(query.dtype), jnp.where(live, lse, 0).transpose(3, 0, 1, 2).reshape(chunk_size, heads)

    out, lse = lax.map(jax.checkpoint(one), jnp.arange(blocks))
    # Back to the queries' rows; a margin after, for lists of fewer blocks than the queries may touch.
    flat = (x.reshape(-1, *x.shape[2:]) for x in (out, lse))
    padded = (jnp.pad(x, ((0, length + chunk_size), *((0, 0),) * (x.ndim - 1))) for x in flat)
    return tuple(lax.dynamic_slice_in_dim(x, before, length) for x in padded)
