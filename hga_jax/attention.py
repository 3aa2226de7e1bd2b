"""Hierarchical global attention: exact attention over windows and routed pages, as an attention backend and as a plain function.

Queries are taken in blocks of one chunk. A block attends to its windows, is routed with the policy's summaries, then attends to the pages
opened for it, all in one online softmax. Nothing of size queries x keys is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.backend import Stats
from hga_jax.cache import DeviceHistory
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.policies import Policy, policy_for
from hga_jax.pytree import register
from hga_jax.routing import Selection
from hga_jax.summaries import empty, write

PAGES_AT_ONCE = 64  # opened pages attended to in one step: 1024 tokens, enough for full-speed matmuls
CHUNKS_AT_ONCE = 16  # chunks summarised in one step


@register
@dataclass(frozen=True)
class LayerState:
    """What HGA keeps of one layer and one sequence.

    history: K/V of all tokens (any tier). summaries: the policy's pytree; entries of chunks still open are provisional and never read.
    stamps: for policies that remember requests, the last chunk in which a query requested the page (-2: never); else None.
    """

    history: Any
    summaries: Any
    stamps: Int[Array, "K P"] | None

    @property
    def length(self) -> Int[Array, ""]:
        """Tokens held."""
        return self.history.length


@register
@dataclass(frozen=True)
class AttentionStats:
    """visible_keys: keys the softmax of each query and head ran over. totals: see backend.Stats (one per sequence)."""

    visible_keys: Int[Array, "*B T N"]
    totals: Stats


class _Softmax:
    """Online softmax over key blocks: a (peak, total, acc) triple per query row, all float32."""

    @staticmethod
    def empty(rows: tuple[int, ...], width: int) -> tuple[Array, Array, Array]:
        return jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, width))

    @staticmethod
    def add(
        carry: tuple[Array, Array, Array],
        query: Float[Array, "K R q H"],
        keys: Float[Array, "K R s H"],
        values: Float[Array, "K R s H"],
        visible: Bool[Array, "#K #R q s"],
        scale: float,
    ) -> tuple[Array, Array, Array]:
        peak, total, acc = carry
        scores = jnp.einsum("krqh,krsh->krqs", query, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(visible, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        safe = jnp.where(new_peak > -jnp.inf, new_peak, 0)  # rows that see nothing yet
        weights = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(peak - safe)
        mixed = jnp.einsum("krqs,krsh->krqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * shrink + weights.sum(-1), acc * shrink[..., None] + mixed


def window_starts(own_chunk: Int[Array, ""], config: HGAConfig) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(tokens of sink chunks before the local window, first token of the local window) for queries of `own_chunk`."""
    local = jnp.maximum(own_chunk - config.local_chunks, 0)
    return jnp.minimum(config.sink_chunks, local) * config.chunk_size, local * config.chunk_size


def _windows(
    history: Any, own_chunk: Int[Array, ""], config: HGAConfig
) -> tuple[Float[Array, "K W H"], Float[Array, "K W H"], Int[Array, " W"]]:
    """Keys, values and positions of sinks, local window and own chunk; a position of 2^30 marks a token not to be counted."""
    pages, held = config.groups_per_chunk, history.capacity // config.group_size
    sinks, local = window_starts(own_chunk, config)
    local_pages = min((config.local_chunks + 1) * pages, held)
    first = jnp.clip((own_chunk - config.local_chunks) * pages, 0, held - local_pages)  # where a clamped span really starts
    keys, values = history.span(first, local_pages)
    positions = first * config.group_size + jnp.arange(local_pages * config.group_size)
    positions = jnp.where(positions >= local, positions, 2**30)
    sink_pages = min(config.sink_chunks * pages, held)
    if sink_pages:
        sink_keys, sink_values = history.span(jnp.int32(0), sink_pages)
        sink_positions = jnp.arange(sink_pages * config.group_size)
        positions = jnp.concatenate([jnp.where(sink_positions < sinks, sink_positions, 2**30), positions])
        keys, values = jnp.concatenate([sink_keys, keys], axis=1), jnp.concatenate([sink_values, values], axis=1)
    return keys, values, positions


def attend_pages(
    carry: tuple[Array, Array, Array], query: Float[Array, "K G Q H"], selection: Selection, history: Any, config: HGAConfig, scale: float
) -> tuple[Array, Array, Array]:
    """Add the opened pages to an online softmax of rows [K, G, Q]; only slots in use cost anything."""
    kv_heads, lists, slots = selection.pages.shape
    length, width = query.shape[2:]
    step = min(PAGES_AT_ONCE, slots)
    short = -slots % step
    pages = jnp.pad(selection.pages, ((0, 0), (0, 0), (0, short)))
    since = jnp.pad(selection.since, ((0, 0), (0, 0), (0, short)), constant_values=length)
    by_list = query.reshape(kv_heads, lists, -1, width)
    rows = jnp.tile(jnp.arange(length), by_list.shape[2] // length)

    def one(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        ids = lax.dynamic_slice_in_dim(pages, i * step, step, axis=2)
        keys, values = history.take(ids.reshape(kv_heads, lists * step))
        seen = lax.dynamic_slice_in_dim(since, i * step, step, axis=2)[:, :, None, :] <= rows[:, None]
        shape = (kv_heads, lists, step * config.group_size, width)
        visible = jnp.repeat(seen, config.group_size, axis=-1)
        return _Softmax.add(carry, by_list, keys.reshape(shape), values.reshape(shape), visible, scale)

    grouped = jax.tree.map(lambda x: x.reshape(kv_heads, lists, -1, *x.shape[3:]), carry)
    done = lax.fori_loop(0, -(-selection.used // step), one, grouped)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), done, carry)


def attend_block(
    query: Float[Array, "Q N H"],
    live: Bool[Array, " Q"],
    first_position: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
) -> tuple[Float[Array, "Q N H"], Int[Array, "Q N"], LayerState, Stats]:
    """Queries at neighbouring positions of one chunk, all of whose tokens the history already holds: out, visible keys, state, stats.

    Rows that are not live request nothing; their outputs mean nothing.
    """
    length, heads, width = query.shape
    kv_heads = state.history.kv_heads
    ratio = heads // kv_heads
    own_chunk = first_position // config.chunk_size
    q = query.reshape(length, kv_heads, ratio, width).transpose(1, 2, 0, 3)  # [K, G, Q, H]
    positions = first_position + jnp.arange(length)

    keys, values, key_positions = _windows(state.history, own_chunk, config)
    visible = (key_positions <= jnp.tile(positions, ratio)[:, None])[None, None]
    carry = _Softmax.empty((kv_heads, 1, ratio * length), width)
    carry = _Softmax.add(carry, q.reshape(kv_heads, 1, -1, width), keys[:, None], values[:, None], visible, scale)
    peak, total, acc = (x.reshape(kv_heads, ratio, length, *x.shape[3:]) for x in carry)

    selection, stamps, refused, unopened = policy.route(q, live, own_chunk, state.summaries, state.stamps, peak + jnp.log(total))
    _, total, acc = attend_pages((peak, total, acc), q, selection, state.history, config, scale)
    out = (acc / total[..., None]).transpose(2, 0, 1, 3).reshape(length, heads, width).astype(query.dtype)

    opened = config.group_size * jnp.sum(selection.since[:, :, None, :] <= jnp.arange(length)[:, None], axis=-1)  # [K, R, Q]
    opened = jnp.repeat(opened, ratio // opened.shape[1], axis=1)
    sinks, local = window_starts(own_chunk, config)
    visible_keys = (positions + 1 - local + sinks)[:, None] + opened.transpose(2, 0, 1).reshape(length, heads)
    last = jnp.max(jnp.where(live, positions, 0)) + 1
    fetched = last - local + sinks + config.group_size * _distinct_pages(selection, length) / kv_heads
    attended = jnp.where(live, visible_keys.mean(-1) / (positions + 1), 0).sum()
    numbers = (live.sum(), attended, 1, fetched, fetched / last, refused, unopened)
    return out, visible_keys, replace(state, stamps=stamps), Stats(*(jnp.asarray(x, jnp.float32) for x in numbers))


def _distinct_pages(selection: Selection, length: int) -> Int[Array, ""]:
    """Pages opened, summed over kv heads; one that several query heads opened counts once."""
    kv_heads = selection.pages.shape[0]
    used = selection.since < length
    if selection.pages.shape[1] == 1:
        return jnp.sum(used)
    pages = jnp.where(used, selection.pages, -1).reshape(kv_heads, -1)
    earlier = jnp.arange(pages.shape[1])[:, None] > jnp.arange(pages.shape[1])
    repeated = jnp.any((pages[:, :, None] == pages[:, None, :]) & earlier, axis=-1)
    return jnp.sum((pages >= 0) & ~repeated)


def attend(
    query: Float[Array, "T N H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
) -> tuple[Float[Array, "T N H"], Int[Array, "T N"], LayerState, Stats]:
    """Attention of the first `count` queries, at positions start, start+1, ... of a history that holds them; chunk by chunk.

    Returns outputs, visible keys (both zero for rows from `count` on), the state with the requests remembered, and stats.
    """
    length, size = query.shape[0], config.chunk_size
    if length == 1:
        out, visible, state, stats = attend_block(query, count[None] > 0, start, state, config, policy, scale)
        return jnp.where(count > 0, out, 0), jnp.where(count > 0, visible, 0), state, stats
    # A block of margin on both sides: blocks start at chunk boundaries, wherever the queries do.
    padded = jnp.pad(query, ((size, size), (0, 0), (0, 0)))
    first_chunk = start // size

    def one(i: Array, carry: tuple) -> tuple:
        out, visible, stamps, stats = carry
        first_position = (first_chunk + i) * size
        offset = first_position - start + size
        row = offset - size + jnp.arange(size)
        live = (row >= 0) & (row < count)
        block = lax.dynamic_slice_in_dim(padded, offset, size)
        here = replace(state, stamps=stamps)
        mixed, keys, here, more = attend_block(block, live, first_position, here, config, policy, scale)
        out = lax.dynamic_update_slice_in_dim(out, jnp.where(live[:, None, None], mixed, 0), offset, 0)
        visible = lax.dynamic_update_slice_in_dim(visible, jnp.where(live[:, None], keys, 0), offset, 0)
        return out, visible, here.stamps, stats + more

    blocks = jnp.where(count > 0, (start + count - 1) // size - first_chunk + 1, 0)
    empty_out = (jnp.zeros_like(padded), jnp.zeros(padded.shape[:2], jnp.int32), state.stamps, Stats.zero())
    out, visible, stamps, stats = lax.fori_loop(0, blocks, one, empty_out)
    inside = slice(size, size + length)
    return out[inside], visible[inside], replace(state, stamps=stamps), stats


def summarise_new(state: LayerState, start: Int[Array, ""], most: int, config: HGAConfig, policy: Policy) -> LayerState:
    """Bring the summaries up to date after at most `most` tokens were appended at `start`."""
    size, chunks = config.chunk_size, state.history.capacity // config.chunk_size
    first, end = start // size, -(-state.length // size)
    step = min(CHUNKS_AT_ONCE, -(-(most - 1) // size) + 1, chunks)

    def one(i: Array, summaries: Any) -> Any:
        begin = jnp.minimum(first + i * step, chunks - step)
        keys, _ = state.history.span(begin * config.groups_per_chunk, step * config.groups_per_chunk)
        return write(summaries, policy.summarise(keys), begin, step)

    if step == 1:
        return replace(state, summaries=one(jnp.int32(0), state.summaries))
    return replace(state, summaries=lax.fori_loop(0, -(-(end - first) // step), one, state.summaries))


def _new_state(history: Any, dtype: Any, config: HGAConfig, policy: Policy) -> LayerState:
    summaries = empty(policy.summarise, history.kv_heads, history.capacity, history.head_dim, dtype)
    return LayerState(history, summaries, policy.new_stamps(history.kv_heads, history.capacity // config.group_size))


@dataclass(frozen=True)
class HGAAttention:
    """Hierarchical global attention as the decoder's attention backend: settings only.

    rope: the model's, needed by the paper policy's "mixed_rope" summaries.

    With the sketch policy any split of a prompt into prefill calls and decode steps gives the same result. With the paper policy the new
    queries of a chunk share their cuts, so results depend on the split inside the chunk where a call starts or ends.
    """

    config: HGAConfig
    rope: RopeConfig | None = None

    def init_state(self, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> LayerState:
        """An empty state with room for `capacity` tokens, rounded up to whole chunks."""
        policy = policy_for(self.config, self.rope, head_dim, 1 / math.sqrt(head_dim))
        capacity = -(-capacity // self.config.chunk_size) * self.config.chunk_size
        history = DeviceHistory.create(capacity, kv_heads, head_dim, self.config.group_size, dtype)
        return _new_state(history, dtype, self.config, policy)

    def prefill(
        self,
        query: Float[Array, "T N H"],
        key: Float[Array, "T K H"],
        value: Float[Array, "T K H"],
        state: LayerState,
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "T N H"], LayerState, Stats]:
        """Append the first `count` rows (post-RoPE) and attend from each; outputs of the other rows are zero.

        The tokens held need not end at a chunk boundary. Paper policy: only this call's queries share the cuts of their chunk.
        """
        scale = 1 / math.sqrt(query.shape[-1])
        policy = policy_for(self.config, self.rope, query.shape[-1], scale)
        start = state.length
        state = replace(state, history=state.history.append(key, value, count))
        state = summarise_new(state, start, key.shape[0], self.config, policy)
        out, _, state, stats = attend(query, start, count, state, self.config, policy, scale)
        return out, state, stats

    def decode(
        self, query: Float[Array, "N H"], key: Float[Array, "K H"], value: Float[Array, "K H"], state: LayerState
    ) -> tuple[Float[Array, "N H"], LayerState, Stats]:
        """Append one token and attend from it."""
        out, state, stats = self.prefill(query[None], key[None], value[None], state, jnp.int32(1))
        return out[0], state, stats


def hga_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "_B S K _H"],  # _: checked below, with an error that says more
    value: Float[Array, "_B _S _K _H"],
    *,
    config: HGAConfig,
    rope: RopeConfig | None = None,
    rotation: Float[Array, "H H"] | None = None,
    query_start: int | Int[Array, ""] = 0,
    scale: float | None = None,
    implementation: str | None = None,
    return_stats: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], AttentionStats]:
    """Hierarchical global attention, in the layout and habits of jax.nn.dot_product_attention with is_causal=True; jit- and vmap-safe.

    query: post-RoPE queries at positions query_start .. query_start+T-1. key, value: post-RoPE keys and values of positions 0 .. S-1,
    S = query_start + T; each of the K heads serves N / K neighbouring query heads. Any floating dtype; scores and softmax are float32.
    config: which tokens a query attends to. rope: the rotation the keys carry; only the paper policy's "mixed_rope" summaries need it.
    rotation: orthogonal matrix for the sketch policy instead of the built-in one. scale: of the scores, 1 / sqrt(H) by default.
    implementation: None or "xla".

    Returns the outputs in query's dtype; with return_stats also AttentionStats (visible_keys int32 [B, T, N]). The call is stateless: with
    the sketch policy a query sees its own requests and those of earlier queries of this call. T = 1 is the decode rule.

    Raises ValueError for arguments that do not fit together, NotImplementedError for an implementation this version lacks.
    Source: arXiv 2606.30709.
    """
    _check(query, key, value, config, rope, rotation, query_start, implementation)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    policy = policy_for(config, rope, query.shape[-1], scale, rotation)
    start, count = jnp.asarray(query_start, jnp.int32), jnp.int32(query.shape[1])

    def one(q: Float[Array, "T N H"], k: Float[Array, "S K H"], v: Float[Array, "S K H"]) -> tuple[Array, Array, Stats]:
        capacity = -(-k.shape[0] // config.chunk_size) * config.chunk_size
        state = _new_state(DeviceHistory.holding(k, v, config.group_size, capacity), k.dtype, config, policy)
        state = summarise_new(state, jnp.int32(0), capacity, config, policy)
        out, visible, _, stats = attend(q, start, count, state, config, policy, scale)
        return out, visible, stats

    out, visible, totals = jax.vmap(one)(query, key, value)
    return (out, AttentionStats(visible, totals)) if return_stats else out


def _check(query, key, value, config, rope, rotation, query_start, implementation) -> None:
    """Say at trace time what does not fit."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}: [batch, tokens, heads, head_dim] is needed")
    batch, length, heads, width = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key.shape={key.shape} and value.shape={value.shape} differ: keys and values of the same tokens are needed")
    if key.shape[0] != batch:
        raise ValueError(f"query holds {batch} sequences and key {key.shape[0]}")
    if key.shape[3] != width:
        raise ValueError(f"query's head_dim {width} differs from key's {key.shape[3]}")
    if heads % key.shape[2]:
        raise ValueError(f"query's {heads} heads are not a multiple of key's {key.shape[2]} heads")
    if length == 0:
        raise ValueError(f"query has shape {query.shape}: at least one token is needed")
    if isinstance(query_start, int) and key.shape[1] != query_start + length:
        raise ValueError(f"key holds {key.shape[1]} tokens, but {query_start=} + {length} query tokens make {query_start + length}")
    if key.shape[1] < length:
        raise ValueError(f"key holds {key.shape[1]} tokens, fewer than query's {length}: the queries' own keys belong in it")
    if rope is not None and width % 2:
        raise ValueError(f"head_dim {width} must be even for rotary embeddings")
    if rotation is not None and rotation.shape != (width, width):
        raise ValueError(f"rotation has shape {rotation.shape}: [{width}, {width}] is needed")
    if implementation == "pallas":
        raise NotImplementedError('implementation="pallas": there are no kernels for this function yet; use "xla" or None')
    if implementation not in (None, "xla"):
        raise ValueError(f'{implementation=}: choose None or "xla"')
