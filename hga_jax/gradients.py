"""The gradient of attention over windows and opened pages, once it is known what was opened.

Scores are computed again from the log-sum-exp of each row, chunk by chunk: nothing of size queries x keys is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.blocks import PAGES_AT_ONCE, Opened, window_tokens, windows_of
from hga_jax.cache import DeviceHistory
from hga_jax.config import HGAConfig
from hga_jax.pytree import varying_like
from pallas_kernels.routed_prefill_attention.backward import gradients as kernel_gradients


def routed_attention_gradient(
    d_out: Float[Array, "T N H"],
    out: Float[Array, "T N H"],
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    opened: Opened,
    config: HGAConfig,
    scale: float,
    implementation: Literal["pallas", "xla", "interpret"],
) -> tuple[Float[Array, "T N H"], Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Gradients for query, key and value from that of the outputs; sums in float32, results in the arguments' dtypes.

    out, opened: what attention gave for the first `count` queries, at positions start, start+1, ... implementation: two kernels over all
    chunks at once, or XLA chunk by chunk.
    """
    tokens, capacity = len(key), -(-len(key) // config.chunk_size) * config.chunk_size
    history = DeviceHistory.holding(key, value, config.group_size, capacity)
    live = (jnp.arange(len(query)) < count)[:, None, None]
    d_out = jnp.where(live, d_out, 0).astype(query.dtype)
    gradients = _chunk_by_chunk if implementation == "xla" else partial(_by_kernels, interpret=implementation == "interpret")
    d_query, d_pages = gradients(d_out, out, query, history, start, count, opened, config, scale)
    d_key, d_value = d_pages.transpose(2, 1, 3, 0, 4).reshape(2, capacity, *key.shape[1:])[:, :tokens]
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


def _by_kernels(
    d_out: Float[Array, "T N H"],
    out: Float[Array, "T N H"],
    query: Float[Array, "T N H"],
    history: DeviceHistory,
    start: Int[Array, ""],
    count: Int[Array, ""],
    opened: Opened,
    config: HGAConfig,
    scale: float,
    interpret: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "K P 2 g H"]]:
    length, heads = query.shape[:2]
    pages, since = (x.swapaxes(0, 1) for x in (opened.pages, opened.since))
    counts = jnp.broadcast_to(opened.counts[:, None], pages.shape[:3])
    by_row = jnp.moveaxis(opened.peaks, 3, 1).reshape(-1, heads)
    log_sums = lax.dynamic_slice_in_dim(by_row, start % config.chunk_size, length)
    return kernel_gradients(
        query, history.pages, start, count, pages, since, counts, out, log_sums, d_out, jnp.zeros_like(log_sums),
        chunk_size=config.chunk_size, sink_chunks=config.sink_chunks, local_chunks=config.local_chunks, scale=scale, config=None,
        interpret=interpret,
    )  # fmt: skip


def _chunk_by_chunk(
    d_out: Float[Array, "T N H"],
    out: Float[Array, "T N H"],
    query: Float[Array, "T N H"],
    history: DeviceHistory,
    start: Int[Array, ""],
    count: Int[Array, ""],
    opened: Opened,
    config: HGAConfig,
    scale: float,
) -> tuple[Float[Array, "T N H"], Float[Array, "K P 2 g H"]]:
    length, heads, width = query.shape
    kv_heads = history.kv_heads
    blocks, rows = opened.peaks.shape[0], opened.peaks.shape[-1]
    lead = start % config.chunk_size if rows > 1 else jnp.int32(0)  # rows of the first block before the first query

    def by_block(x: Float[Array, "T N *h"]) -> Float[Array, "B K G Q *h"]:
        room = varying_like(jnp.zeros((blocks * rows, *x.shape[1:]), x.dtype), x)
        placed = lax.dynamic_update_slice_in_dim(room, x, lead, 0)
        return jnp.moveaxis(placed.reshape(blocks, rows, kv_heads, heads // kv_heads, *x.shape[2:]), 1, 3)

    shares = by_block(jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1))
    q, d_rows = by_block(query), by_block(d_out)

    def one(b: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_query, d_pages = carry
        row = jnp.arange(rows)
        block = _Rows(q[b], d_rows[b], shares[b], opened.peaks[b], scale)
        # Rows before the first query have no outputs: their gradient is zero, whatever they see.
        windows = windows_of((start - lead + b * rows + row)[None], history, config)
        seen = jnp.tile(windows.visible[0], (heads // kv_heads, 1))
        d_block, *d_tokens = block.reshape(kv_heads, heads // kv_heads * rows).through(*window_tokens(windows, history), seen)
        d_new = _as_pages(*d_tokens, config.group_size)
        d_pages = d_pages.at[:, : windows.sinks].add(d_new[:, : windows.sinks])
        before = lax.dynamic_slice_in_dim(d_pages, windows.first, windows.span, axis=1)
        d_pages = lax.dynamic_update_slice_in_dim(d_pages, before + d_new[:, windows.sinks :], windows.first, axis=1)

        lists, slots = opened.pages.shape[2:]
        step = min(PAGES_AT_ONCE, slots)
        short = ((0, 0), (0, 0), (0, -slots % step))
        pages, since = jnp.pad(opened.pages[b], short), jnp.pad(opened.since[b], short, constant_values=rows)
        by_list = block.reshape(kv_heads, lists, heads // kv_heads // lists * rows)
        rows_of_list = jnp.tile(row, heads // kv_heads // lists)

        def some(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            d_block, d_pages = carry
            ids, first = (lax.dynamic_slice_in_dim(x, i * step, step, axis=2) for x in (pages, since))
            flat = ids.reshape(kv_heads, lists * step)
            shape = (kv_heads, lists, step * config.group_size, width)
            visible = jnp.repeat(first, config.group_size, axis=-1)[:, :, None] <= rows_of_list[:, None]
            d_more, *d_tokens = by_list.through(*(x.reshape(shape) for x in history.take(flat)), visible)
            d_new = _as_pages(*(x.reshape(kv_heads, -1, width) for x in d_tokens), config.group_size)
            return d_block + d_more, d_pages.at[jnp.arange(kv_heads)[:, None], flat].add(d_new)

        d_block, d_pages = lax.fori_loop(0, -(-opened.counts[b] // step), some, (d_block.reshape(by_list.query.shape), d_pages))
        return d_query.at[b].set(d_block.reshape(q[b].shape)), d_pages

    carry = varying_like((jnp.zeros(q.shape), jnp.zeros(history.pages.shape)), query)
    used = jnp.where(count > 0, (lead + count - 1) // rows + 1, 0)
    d_query, d_pages = lax.fori_loop(0, used, one, carry)
    d_query = jnp.moveaxis(d_query, 3, 1).reshape(blocks * rows, heads, width)
    return lax.dynamic_slice_in_dim(d_query, lead, length), d_pages


@dataclass(frozen=True)
class _Rows:
    """Query rows and what their gradient needs. shares: d_out . out of each row; peaks: log-sum-exp. Z: any batch of key sets."""

    query: Float[Array, "*Z q H"]
    d_out: Float[Array, "*Z q H"]
    shares: Float[Array, "*Z q"]
    peaks: Float[Array, "*Z q"]
    scale: float

    def reshape(self, *rows: int) -> _Rows:
        """The rows of one kv head and block [K, G, Q] in another arrangement."""
        width = self.query.shape[-1]
        query, d_out = (x.reshape(*rows, width) for x in (self.query, self.d_out))
        return _Rows(query, d_out, self.shares.reshape(rows), self.peaks.reshape(rows), self.scale)

    def through(
        self, keys: Float[Array, "*Z s H"], values: Float[Array, "*Z s H"], visible: Bool[Array, "*#Z q s"]
    ) -> tuple[Float[Array, "*Z q H"], Float[Array, "*Z s H"], Float[Array, "*Z s H"]]:
        """What flows to the queries, keys and values through these keys; float32."""

        def product(spec: str, a: Array, b: Array) -> Array:
            return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

        scores = product("...qh,...sh->...qs", self.query, keys) * self.scale
        weights = jnp.where(visible, jnp.exp(scores - self.peaks[..., None]), 0)
        d_weights = product("...qh,...sh->...qs", self.d_out, values)
        d_scores = (weights * (d_weights - self.shares[..., None]) * self.scale).astype(keys.dtype)
        d_query = product("...qs,...sh->...qh", d_scores, keys)
        d_keys = product("...qs,...qh->...sh", d_scores, self.query)
        return d_query, d_keys, product("...qs,...qh->...sh", weights.astype(values.dtype), self.d_out)


def _as_pages(keys: Float[Array, "K S H"], values: Float[Array, "K S H"], group_size: int) -> Float[Array, "K n 2 g H"]:
    by_page = (keys.shape[0], -1, group_size, keys.shape[-1])
    return jnp.stack([keys.reshape(by_page), values.reshape(by_page)], axis=2)
