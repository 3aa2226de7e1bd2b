"""Hierarchical global attention: the attention backend of the decoder, and a plain function over arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.backend import AttentionBackend, Stats, attend_whole, dense_stats, fits_cudnn
from hga_jax.blocks import LayerState, Opened, attend, attend_and_keep, new_state, summarise_new, with_query_energy
from hga_jax.cache import DeviceHistory, HostHistory
from hga_jax.cache.host import put_on_device, put_on_host
from hga_jax.cache.window import window_places
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.decoding import How, cannot_decode, close_chunk, decode_token, early_pages
from hga_jax.gradients import routed_attention_gradient
from hga_jax.listed import attend_listed
from hga_jax.policies import Policy, policy_for
from hga_jax.pytree import register
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.sketch_prefill_routing import unsupported


@register
@dataclass(frozen=True)
class AttentionStats:
    """visible_keys: keys the softmax of each query and head ran over. totals: see backend.Stats (one per sequence)."""

    visible_keys: Int[Array, "*B T N"]
    totals: Stats


@dataclass(frozen=True)
class HGAAttention(AttentionBackend):
    """Hierarchical global attention as the decoder's attention backend: settings only.

    rope: the model's, needed by the paper policy's "mixed_rope" summaries.
    tier: where the history lives, "device" or "host"; with "host" a layer's summaries are on the device only in decoding and while prefill
    is at work on that layer. bank_pages: with the host tier and the sketch policy, pages of each layer and kv head kept on the device in
    decoding. host_summaries: with the host tier, in how many layers (the last ones) decoding reads the largest array of the summaries in
    place from host memory, for want of room on the device. implementation: of decoding, None (kernels on a CUDA GPU, XLA elsewhere),
    "pallas", "xla", or "interpret": the kernels in Pallas' interpreter, for tests.

    With the sketch policy any split of a prompt into prefill calls and decode steps gives the same result. With scan_pairs (see HGAConfig)
    any split into prefill calls does, and decode scans everything; with screening candidates are not remembered from one call to the next
    either. With the paper policy the new queries of a chunk share their cuts, so results depend on the split inside the chunk where a call
    starts or ends.
    """

    config: HGAConfig
    rope: RopeConfig | None = None
    tier: Literal["device", "host"] = "device"
    bank_pages: int = 0
    host_summaries: int = 0
    implementation: Literal["pallas", "xla", "interpret"] | None = None

    def __post_init__(self):
        if self.tier not in ("device", "host"):
            raise ValueError(f"tier={self.tier!r}: choose device or host")
        if self.bank_pages and (self.tier != "host" or self.config.policy != "sketch"):
            raise ValueError(
                f"bank_pages={self.bank_pages} needs tier='host' and policy='sketch' (whose stamps say which pages are old), not "
                f"tier={self.tier!r} and policy={self.config.policy!r}"
            )
        if self.host_summaries and self.tier != "host":
            raise ValueError(f"host_summaries={self.host_summaries} needs tier='host', not tier={self.tier!r}")

    def init_state(self, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> LayerState:
        """An empty state with room for `capacity` tokens, rounded up to whole chunks."""
        policy = policy_for(self.config, self.rope, head_dim, 1 / math.sqrt(head_dim))
        capacity = -(-capacity // self.config.chunk_size) * self.config.chunk_size
        if self.tier == "host":
            state = new_state(HostHistory.create(capacity, kv_heads, head_dim, dtype, self.config), dtype, self.config, policy)
            return replace(state, summaries=jax.tree.map(put_on_host, state.summaries))
        return new_state(DeviceHistory.create(capacity, kv_heads, head_dim, self.config.group_size, dtype), dtype, self.config, policy)

    def prefill(
        self,
        query: Float[Array, "T N H"],
        key: Float[Array, "T K H"],
        value: Float[Array, "T K H"],
        state: LayerState,
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "T N H"], LayerState, Stats]:
        """Append the first `count` rows (post-RoPE) and attend from each; outputs of the other rows are zero.

        The tokens held need not end at a chunk boundary. Paper policy: only this call's queries share the cuts of their chunk. A first call
        of at most config.dense_below rows attends to everything and requests nothing.
        """
        scale = 1 / math.sqrt(query.shape[-1])
        policy = policy_for(self.config, self.rope, query.shape[-1], scale)
        start = state.length
        state = replace(state, history=state.history.append(key, value, count))
        state = summarise_new(state, start, key.shape[0], self.config, policy)
        state = with_query_energy(state, query, start, count, self.config)
        implementation = None if self.implementation == "interpret" else self.implementation

        def routed(_: None) -> tuple[Array, Array | None, Stats]:
            out, _, after, stats, _ = _attend(query, start, count, state, self.config, policy, scale, implementation)
            return out, after.stamps, stats

        def dense(_: None) -> tuple[Array, Array | None, Stats]:
            out = attend_whole(query, key, value, count)
            return out, state.stamps, dense_stats(count, -(-count // self.config.chunk_size), count)

        if 1 < query.shape[0] <= self.config.dense_up_to(fits_cudnn(query)):
            out, stamps, stats = lax.cond(start == 0, dense, routed, None)
        else:
            out, stamps, stats = routed(None)
        return out, replace(state, stamps=stamps), stats

    def decode(
        self,
        query: Float[Array, "N H"],
        key: Float[Array, "K H"],
        value: Float[Array, "K H"],
        state: LayerState,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "N H"], LayerState, Stats]:
        """Append one token and attend from it. `settle` is due when a chunk is full."""
        held = state.length
        position = held if position is None else position
        how = self._how(state, *query.shape)
        if how is None:
            state = replace(state, history=replace(state.history, length=position))
            out, state, stats = self.prefill(query[None], key[None], value[None], state, jnp.int32(1))
            out = out[0]
        else:
            out, state, stats = decode_token(query, key, value, state, position, self.config, 1 / math.sqrt(query.shape[-1]), how)
        return out, replace(state, history=replace(state.history, length=None if held is None else position + 1)), stats

    def _how(self, state: LayerState, heads: int, head_dim: int) -> How | None:
        """Which operations decode: None is the block code of prefill, the fastest on the device tier without kernels."""
        if self.implementation == "interpret":
            return How("pallas", interpret=True)
        reason = cannot_decode(self.config, heads, state.history.kv_heads, state.history.capacity, head_dim)
        chosen = choose("decoding", self.implementation, reason)
        if chosen == "xla" and isinstance(state.history, DeviceHistory):
            return None
        if chosen == "xla" and jax.default_backend() != "cpu":
            raise NotImplementedError(f"tier='host' needs the decode kernels on {jax.default_backend()}: {reason or 'they need CUDA'}")
        return How(chosen)

    @property
    def settle_every(self) -> int:
        return self.config.chunk_size

    def start_decoding(self, state: LayerState, held: Int[Array, ""]) -> LayerState:
        """The position is common to all layers: carried once, it costs no launch a layer."""
        history = state.history.typed() if isinstance(state.history, HostHistory) else state.history
        how = self._how(state, history.kv_heads, history.head_dim)
        carried = None if how is None else early_pages(state, held, self.config, how)
        return replace(state, history=replace(history, length=None), carried=carried)

    def settle(self, state: LayerState, held: Int[Array, ""]) -> LayerState:
        """Summarise the newest chunk and write its pages to the host tier, where `decode` left that to do."""
        history = state.history
        how = self._how(state, history.kv_heads, history.head_dim)
        if how is None:
            return state
        policy = policy_for(self.config, self.rope, history.head_dim, 1 / math.sqrt(history.head_dim))
        return close_chunk(state, held, self.config, policy, how)

    def finish_decoding(self, state: LayerState, held: Int[Array, ""]) -> LayerState:
        """Undo `start_decoding`."""
        return replace(state, history=replace(state.history, length=held), carried=None)

    def before_prefill(self, states: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
        """Without banks, the summaries in host memory (host tier only)."""
        if self.tier == "device":
            return states

        def one(state: LayerState) -> LayerState:
            summaries = jax.tree.map(lambda x: _moved(x, put_on_host), state.summaries)
            return replace(state, history=state.history.with_bank(0), summaries=summaries)

        return tuple(one(state) for state in states)

    def before_decoding(self, states: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
        """With empty banks, and the summaries on the device where `host_summaries` does not say otherwise (host tier only)."""
        if self.tier == "device":
            return states

        def one(layer: int, state: LayerState) -> LayerState:
            leaves, tree = jax.tree.flatten(state.summaries)
            stays = len(states) - layer <= self.host_summaries
            largest = max(range(len(leaves)), key=lambda i: leaves[i].size * leaves[i].dtype.itemsize)
            leaves = [_moved(x, put_on_host if stays and i == largest else put_on_device) for i, x in enumerate(leaves)]
            return replace(state, history=state.history.with_bank(self.bank_pages), summaries=jax.tree.unflatten(tree, leaves))

        return tuple(one(layer, state) for layer, state in enumerate(states))

    def prefill_buffer(self, state: LayerState) -> Float[Array, "K P 2 g H"] | None:
        """Pages on the device for one layer at a time (host tier only)."""
        if not isinstance(state.history, HostHistory):
            return None
        return jnp.zeros(state.history.pages.shape, state.history.pages.dtype)

    def load(self, state: LayerState, buffer: Float[Array, "K P 2 g H"] | None, held: int) -> LayerState:
        """The state with its history in the buffer and its summaries on the device.

        Older pages are copied there in bulk, far faster than gathering them block by block.
        """
        if buffer is None:
            return state
        if held:
            how = self._how(state, state.history.kv_heads, state.history.head_dim)
            buffer = _read_pages(buffer, state.history, jnp.int32(held), config=self.config, how=how)
        summaries = jax.tree.map(lambda x: _moved(x, put_on_device), state.summaries)
        return replace(state, history=DeviceHistory(buffer, jnp.int32(held)), summaries=summaries)

    def unload(
        self, state: LayerState, worked: LayerState, held: int, end: int, most: int
    ) -> tuple[LayerState, Float[Array, "K P 2 g H"] | None]:
        """The pages written since `held` tokens and the summaries go home to the host, the windows are taken anew."""
        if not isinstance(state.history, HostHistory):
            return worked, None
        buffer = worked.history.pages
        how = self._how(state, state.history.kv_heads, state.history.head_dim)
        most = min(most // self.config.group_size + 1, buffer.shape[1])
        history = _write_pages(state.history, buffer, jnp.int32(held), jnp.int32(end), config=self.config, most=most, how=how)
        summaries = jax.tree.map(lambda x: _moved(x, put_on_host), worked.summaries)
        return replace(worked, history=history, summaries=summaries), buffer


def _moved(array: Array, move: Callable[[Array], Array]) -> Array:
    """The array in the memory that `move` brings it to; the original, if another, is given up at once, whoever still refers to it."""
    done = move(array)
    if done is not array and not isinstance(array, jax.core.Tracer):
        array.delete()
    return done


@partial(jax.jit, static_argnames=("config", "how"), donate_argnames="buffer")
def _read_pages(
    buffer: Float[Array, "K P 2 g H"], history: HostHistory, held: Int[Array, ""], *, config: HGAConfig, how: How
) -> Float[Array, "K P 2 g H"]:
    return history.typed().read_into(buffer, held, config, how.plain())


@partial(jax.jit, static_argnames=("config", "most", "how"), donate_argnames="history")
def _write_pages(
    history: HostHistory,
    source: Float[Array, "K P 2 g H"],
    held: Int[Array, ""],
    end: Int[Array, ""],
    *,
    config: HGAConfig,
    most: int,
    how: How,
) -> HostHistory:
    return history.typed().with_pages_written(source, held, end, most, window_places(end, config), how.plain())


def hga_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "_B S K _H"],  # _: checked below, with an error that says more
    value: Float[Array, "_B _S _K _H"],
    *,
    config: HGAConfig,
    rope: RopeConfig | None = None,
    rotation: Float[Array | np.ndarray, "_H _H"] | None = None,
    query_start: int | Int[Array, "*starts"] = 0,
    key_value_seq_lengths: Int[Array | np.ndarray, " _B"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_stats: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], AttentionStats]:
    """Hierarchical global attention, in the layout and habits of jax.nn.dot_product_attention with is_causal=True.

    query: post-RoPE queries at positions query_start .. query_start+T-1. key, value: post-RoPE keys and values of positions 0 .. S-1,
    S = query_start + T; each of the K heads serves N / K neighbouring query heads. Any floating dtype; scores and softmax are float32.
    config: which tokens a query attends to. rope: the rotation the keys carry; only the paper policy's "mixed_rope" summaries need it.
    rotation: orthogonal matrix for the sketch policy instead of the built-in one. scale: of the scores, 1 / sqrt(H) by default.
    query_start: may be an array, also int32 [B] with one start a sequence; then S is only a bound.
    key_value_seq_lengths: int32 [B], tokens of each sequence; keys from there on are padding, and queries there get zeros.
    implementation: "pallas" (kernels), "xla", or None: kernels where they run, that is on an NVIDIA GPU, else XLA.

    Works under jit, vmap, shard_map over batch or kv heads, jax.checkpoint and reverse-mode differentiation: gradients flow through the
    tokens attended to, while the selection, piecewise constant, has none (no forward mode, no second derivatives). Differentiation keeps
    q, k, v, the outputs and the lists of opened pages (8 bytes a slot: for the sketch policy min(page_capacity, S / 16) slots a kv head and
    chunk), computes scores again chunk by chunk, and needs float32 room for one sequence's d_key and d_value.

    Returns the outputs in query's dtype; with return_stats also AttentionStats (visible_keys int32 [B, T, N]). The call is stateless: with
    the sketch policy a query sees its own requests and those of earlier queries of this call. T = 1 is the decode rule.

    Raises ValueError for arguments that do not fit together, NotImplementedError for "pallas" where the kernels cannot run.
    Source: arXiv 2606.30709.
    """
    _check(query, key, value, config, rope, rotation, query_start, key_value_seq_lengths, implementation)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    start, count = jnp.asarray(query_start, jnp.int32), jnp.int32(query.shape[1])
    if key_value_seq_lengths is not None:
        count = jnp.clip(jnp.asarray(key_value_seq_lengths, jnp.int32) - start, 0, count)
    rotation = None if rotation is None else jnp.asarray(rotation, jnp.float32)
    out, stats = _attend_batch(query, key, value, start, count, rotation, config, rope, scale, implementation)
    return (out, stats) if return_stats else out


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attend_batch(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    start: Int[Array, "*starts"],
    count: Int[Array, "*counts"],
    rotation: Float[Array, "H H"] | None,
    config: HGAConfig,
    rope: RopeConfig | None,
    scale: float,
    implementation: Implementation | None,
) -> tuple[Float[Array, "B T N H"], AttentionStats]:
    """start, count: of all sequences, or one each."""
    policy = policy_for(config, rope, query.shape[-1], scale, rotation)

    def one(q: Array, k: Array, v: Array, start: Array, count: Array) -> tuple[Array, AttentionStats]:
        out, visible, _, stats, _ = _attend(
            q, start, count, _whole_state(q, k, v, start, count, config, policy), config, policy, scale, implementation
        )
        return out, AttentionStats(visible, stats)

    return _each_sequence(one, query, key, value, start, count)


def _attend(
    query: Float[Array, "T N H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
    implementation: Implementation | None,
    keep: bool = False,
) -> tuple[Float[Array, "T N H"], Int[Array, "T N"], LayerState, Stats, Opened | None]:
    """All blocks at once by kernels where they run, or where the settings want lists; else block by block. See blocks.attend_and_keep."""
    chosen = choose("hga prefill", implementation, unsupported(query, state.history.pages, config.chunk_size, config.group_size))
    if query.shape[0] > 1 and (chosen == "pallas" or config.lists_pages):
        return attend_listed(query, start, count, state, config, policy, scale, chosen)
    if keep:
        return attend_and_keep(query, start, count, state, config, policy, scale)
    return *attend(query, start, count, state, config, policy, scale), None


def _attend_forward(query, key, value, start, count, rotation, config, rope, scale, implementation) -> tuple[Any, Any]:
    policy = policy_for(config, rope, query.shape[-1], scale, rotation)

    def one(q: Array, k: Array, v: Array, start: Array, count: Array) -> tuple[Array, AttentionStats, Opened]:
        state = _whole_state(q, k, v, start, count, config, policy)
        out, visible, _, stats, opened = _attend(q, start, count, state, config, policy, scale, implementation, keep=True)
        return out, AttentionStats(visible, stats), opened

    out, stats, opened = _each_sequence(one, query, key, value, start, count)
    return (out, stats), (query, key, value, start, count, out, opened)


def _attend_backward(config, rope, scale, implementation, kept, cotangents) -> tuple[Array, Array, Array, None, None, None]:
    query, key, value, start, count, out, opened = kept
    batch = query.shape[:1]

    def one(item: tuple) -> tuple[Array, Array, Array]:
        q, k, v, start, count, out, opened, d_out = item
        pages = jax.eval_shape(lambda: _whole_history(k, v, config).pages)
        reason = unsupported(q, pages, config.chunk_size, config.group_size)
        chosen = "xla" if len(q) == 1 else choose("hga gradient", implementation, reason)
        return routed_attention_gradient(d_out, out, q, k, v, start, count, opened, config, scale, chosen)

    starts, counts = jnp.broadcast_to(start, batch), jnp.broadcast_to(count, batch)
    gradients = jax.lax.map(one, (query, key, value, starts, counts, out, opened, cotangents[0]))
    return (*gradients, None, None, None)


_attend_batch.defvjp(_attend_forward, _attend_backward)


def _whole_state(
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    config: HGAConfig,
    policy: Policy,
) -> LayerState:
    """The state that holds all tokens of one sequence, ready for its queries."""
    history = _whole_history(key, value, config)
    state = new_state(history, key.dtype, config, policy)
    state = summarise_new(state, jnp.int32(0), history.capacity, config, policy)
    return with_query_energy(state, query, start, count, config)


def _whole_history(key: Float[Array, "S K H"], value: Float[Array, "S K H"], config: HGAConfig) -> DeviceHistory:
    return DeviceHistory.holding(key, value, config.group_size, -(-key.shape[0] // config.chunk_size) * config.chunk_size)


def _each_sequence(one: Callable, query: Array, key: Array, value: Array, start: Array, count: Array) -> Any:
    """`one` for every sequence: together when all have the same bounds, else one after the other, so that short ones cost less."""
    if start.ndim == count.ndim == 0:
        return jax.vmap(lambda *arrays: one(*arrays, start, count))(query, key, value)
    bounds = (jnp.broadcast_to(x, query.shape[:1]) for x in (start, count))
    return jax.lax.map(lambda item: one(*item), (query, key, value, *bounds))


def opened_pages(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    config: HGAConfig,
    rope: RopeConfig | None = None,
    rotation: Float[Array | np.ndarray, "H H"] | None = None,
    query_start: int | Int[Array, ""] = 0,
) -> Bool[Array, "B T N P"]:
    """Which pages hga_attention's routing opens to each query and head, for looking at; the windows, always seen, are not among them.

    Page p holds tokens p * group_size and so on. Arguments and errors are hga_attention's. The result has B * T * N * S / 16 bytes.
    """
    _check(query, key, value, config, rope, rotation, query_start, None, None)
    scale, start = 1 / math.sqrt(query.shape[-1]), jnp.asarray(query_start, jnp.int32)
    policy = policy_for(config, rope, query.shape[-1], scale, rotation)

    def one(q: Array, k: Array, v: Array) -> Array:
        state = _whole_state(q, k, v, start, jnp.int32(len(q)), config, policy)
        opened = _attend(q, start, jnp.int32(len(q)), state, config, policy, scale, None, keep=True)[4]
        blocks, kv_heads, lists, _ = opened.pages.shape
        heads, rows = q.shape[1], opened.peaks.shape[-1]
        at = jnp.ix_(*(jnp.arange(n) for n in (blocks, kv_heads, lists, 1)))[:3]
        never = jnp.full((blocks, kv_heads, lists, state.history.capacity // config.group_size), rows)
        first = never.at[*at, opened.pages].min(opened.since)
        seen = first[:, :, :, None] <= jnp.arange(rows)[:, None]  # [B, K, R, Q, P]
        by_head = jnp.repeat(seen.reshape(blocks, kv_heads * lists, rows, -1), heads // (kv_heads * lists), axis=1)
        lead = start % config.chunk_size if rows > 1 else 0
        return jax.lax.dynamic_slice_in_dim(by_head.swapaxes(1, 2).reshape(blocks * rows, heads, -1), lead, len(q))

    return jax.vmap(one)(query, key, value)


def _check(query, key, value, config, rope, rotation, query_start, lengths, implementation) -> None:
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
    if jnp.ndim(query_start) and jnp.shape(query_start) != (batch,):
        raise ValueError(f"query_start has shape {jnp.shape(query_start)}: one number, or [{batch}] of them, is needed")
    if lengths is not None and (jnp.shape(lengths) != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"key_value_seq_lengths is {lengths.dtype}{list(lengths.shape)}: integers of shape [{batch}] are needed")
    if key.shape[1] < length:
        raise ValueError(f"key holds {key.shape[1]} tokens, fewer than query's {length}: the queries' own keys belong in it")
    if rope is not None and width % 2:
        raise ValueError(f"head_dim {width} must be even for rotary embeddings")
    if rotation is not None and rotation.shape != (width, width):
        raise ValueError(f"rotation has shape {rotation.shape}: [{width}, {width}] is needed")
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f'{implementation=}: choose None, "pallas" or "xla"')
