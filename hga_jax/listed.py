"""Attention of all blocks of a prompt at once: first every block's page list, then one pass over windows and listed pages.

What NVIDIA GPUs run (a handful of launches a layer), and the only path that screens; elsewhere hga_jax/blocks.py goes block by block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jax import custom_batching, lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.backend import Stats
from hga_jax.blocks import LayerState, Opened, window_starts
from hga_jax.config import HGAConfig
from hga_jax.policies import PageLists, Policy
from pallas_kernels.dispatch import Implementation
from pallas_kernels.routed_prefill_attention import routed_prefill_attention


class _Blocks(NamedTuple):
    """Positions of the queries by block, B chunks of Q rows, and which of them there are."""

    positions: Int[Array, "B Q"]
    live: Bool[Array, "B Q"]


def attend_listed(
    query: Float[Array, "T N H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
    implementation: Implementation,
) -> tuple[Float[Array, "T N H"], Int[Array, "T N"], LayerState, Stats, Opened]:
    """Attention of the first `count` queries, at positions start, start+1, ... of a device history that holds them.

    Returns what blocks.attend_and_keep does; visible keys and what was opened cost nothing where they are not used.
    """
    length, heads, _ = query.shape
    lists = policy.list_pages(query, state.history.pages, state.summaries, state.stamps, start, count, implementation, state.energy)

    @custom_batching.sequential_vmap  # kernels take one sequence
    def attention(*arrays: Array) -> tuple[Array, Array]:
        return routed_prefill_attention(
            *arrays,
            chunk_size=config.chunk_size,
            sink_chunks=config.sink_chunks,
            local_chunks=config.local_chunks,
            scale=scale,
            implementation=implementation,
        )

    out, log_sums = attention(query, state.history.pages, start, count, lists.ids, lists.since, lists.counts)
    positions = start // config.chunk_size * config.chunk_size + jnp.arange(lists.ids.shape[1] * config.chunk_size)
    positions = positions.reshape(-1, config.chunk_size)
    blocks = _Blocks(positions, (positions >= start) & (positions < start + count))
    visible = _visible_keys(lists, blocks, heads, config).reshape(-1, heads)
    row = start % config.chunk_size + jnp.arange(length)
    visible = jnp.where((jnp.arange(length) < count)[:, None], visible[row], 0)
    opened = _opened(lists, log_sums, start, config)
    return out, visible, replace(state, stamps=lists.stamps), _stats(lists, blocks, config), opened


def _opened(lists: PageLists, log_sums: Float[Array, "T N"], start: Int[Array, ""], config: HGAConfig) -> Opened:
    """What the gradient needs."""
    kv_heads, blocks, _, most = lists.ids.shape
    there = jnp.arange(most) < lists.counts[..., None]
    pages, since = jnp.where(there, lists.ids, 0), jnp.where(there, lists.since, config.chunk_size)
    room = jnp.zeros((blocks * config.chunk_size, log_sums.shape[1]))
    peaks = lax.dynamic_update_slice_in_dim(room, log_sums, start % config.chunk_size, 0)
    peaks = jnp.moveaxis(peaks.reshape(blocks, config.chunk_size, kv_heads, -1), 1, 3)
    return Opened(pages.swapaxes(0, 1), since.swapaxes(0, 1), lists.counts.max((0, 2)), peaks)


def _window_keys(blocks: _Blocks, config: HGAConfig) -> Int[Array, "B Q"]:
    """Keys a query sees of sinks, local window and own chunk."""
    sinks, local = window_starts(blocks.positions[:, 0] // config.chunk_size, config)
    return blocks.positions + 1 - (local - sinks)[:, None]


def _visible_keys(lists: PageLists, blocks: _Blocks, heads: int, config: HGAConfig) -> Int[Array, "B Q N"]:
    """Keys that the softmax of each query and head runs over."""
    kv_heads, _, per_kv_head, most = lists.ids.shape
    there = jnp.arange(most) < lists.counts[..., None]
    seen = jnp.sum(there[..., None] & (lists.since[..., None] <= jnp.arange(config.chunk_size)), axis=3)  # [K, B, R, Q]
    seen = jnp.repeat(
        config.group_size * seen.transpose(1, 3, 0, 2).reshape(*blocks.positions.shape, -1), heads // (kv_heads * per_kv_head), 2
    )
    return _window_keys(blocks, config)[..., None] + seen


def _stats(lists: PageLists, blocks: _Blocks, config: HGAConfig) -> Stats:
    kv_heads, most = lists.ids.shape[0], lists.ids.shape[3]
    opened = (jnp.arange(most) < lists.counts[..., None]) & (lists.since < config.chunk_size)
    # A page opened from row s on adds its tokens to every live row from s on: 1 / (causal keys) each to the attended share.
    share = jnp.where(blocks.live, 1 / (blocks.positions + 1), 0)
    later = jnp.cumsum(share[:, ::-1], axis=1)[:, ::-1]
    block = jnp.arange(len(later))[:, None, None]
    routed = jnp.where(opened, later[block, jnp.minimum(lists.since, config.chunk_size - 1)], 0)
    routed = routed.sum() * config.group_size / (kv_heads * lists.ids.shape[2])
    attended = routed + (share * _window_keys(blocks, config)).sum()
    held = jnp.max(jnp.where(blocks.live, blocks.positions, -1), axis=1) + 1
    sinks, local = window_starts(blocks.positions[:, 0] // config.chunk_size, config)
    fetched = held - local + sinks + config.group_size * _distinct_pages(lists, opened) / kv_heads
    running = held > 0
    numbers = (
        blocks.live.sum(),
        attended,
        running.sum(),
        jnp.where(running, fetched, 0).sum(),
        jnp.where(running, fetched / jnp.maximum(held, 1), 0).sum(),
        lists.refused,
        lists.unopened,
    )
    return Stats(*(jnp.asarray(x, jnp.float32) for x in numbers))


def _distinct_pages(lists: PageLists, opened: Bool[Array, "K B R M"]) -> Int[Array, " B"]:
    """Pages opened in each block, summed over kv heads; one that several query heads opened counts once."""
    if lists.ids.shape[2] == 1:
        return opened.sum((0, 2, 3))
    ids = jnp.sort(jnp.where(opened, lists.ids, -1).reshape(*lists.ids.shape[:2], -1), axis=-1)
    new = jnp.concatenate([ids[..., :1] >= 0, (ids[..., 1:] != ids[..., :-1]) & (ids[..., 1:] >= 0)], axis=-1)
    return new.sum((0, 2))
