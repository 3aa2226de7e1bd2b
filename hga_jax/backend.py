"""The attention backend: settings only, handed to the decoder, which calls `prefill` and `decode` and threads the state through.

A backend is a frozen dataclass (hashable, a static argument of compiled programs); the state of one layer and one sequence is a pytree
that the backend makes and nobody else looks into. `DenseAttention` is here, `HGAAttention` in hga_jax/attention.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import custom_batching, lax
from jaxtyping import Array, Float, Int

from hga_jax.cache import DeviceHistory
from hga_jax.pytree import register
from pallas_kernels.dispatch import on_cuda
from pallas_kernels.routed_prefill_attention import routed_prefill_attention

# Queries and keys that dense attention takes at a time where launches are dear: an eighth of the turns of DenseAttention's own sizes.
QUERIES_AT_ONCE_CUDA, KEYS_AT_ONCE_CUDA = 512, 2048
DENSE_CHUNK = 64  # queries of a program of `attend_behind`


@register
@dataclass(frozen=True)
class Stats:
    """Sums that become fractions when divided: each layer's call adds its own, `+` adds calls up. All float32 scalars.

    queries: query tokens; attended: sum over them of (keys its softmax ran over / causal keys), averaged over heads.
    blocks: query blocks (prefill: chunks, decode: tokens); fetched_tokens, fetched: sum over them, averaged over kv heads, of the distinct
    tokens brought into the working set, and of that number / history tokens. refused: page requests turned down for lack of room.
    unopened: sum over queries of the estimated attention mass of the pages not opened, averaged over heads.
    bank_hits, bank_requests: pages that decode found in the device's bank, and pages it wanted while there was one, over all kv heads.
    """

    queries: Float[Array, ""]
    attended: Float[Array, ""]
    blocks: Float[Array, ""]
    fetched_tokens: Float[Array, ""]
    fetched: Float[Array, ""]
    refused: Float[Array, ""]
    unopened: Float[Array, ""]
    bank_hits: Float[Array, ""] = field(default_factory=lambda: jnp.float32(0))
    bank_requests: Float[Array, ""] = field(default_factory=lambda: jnp.float32(0))

    @staticmethod
    def zero() -> Stats:
        return Stats(*(jnp.float32(0) for _ in fields(Stats)))

    def __add__(self, other: Stats) -> Stats:
        return jax.tree.map(jnp.add, self, other)


@runtime_checkable
class AttentionBackend(Protocol):
    """What the decoder asks of an attention mechanism. One layer, one sequence; batches are made with vmap.

    Subclass it to inherit what only some mechanisms need: everything but `init_state`, `prefill` and `decode`.
    """

    def init_state(self, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> Any:
        """An empty state with room for `capacity` tokens."""

    def prefill(
        self, query: Float[Array, "T N H"], key: Float[Array, "T K H"], value: Float[Array, "T K H"], state: Any, count: Int[Array, ""]
    ) -> tuple[Float[Array, "T N H"], Any, Stats]:
        """Append the first `count` rows (post-RoPE) to the state and attend from each.

        Rows from `count` on are padding, their outputs zero.
        The tokens held before the call need not end at a chunk boundary.
        """

    def decode(
        self,
        query: Float[Array, "N H"],
        key: Float[Array, "K H"],
        value: Float[Array, "K H"],
        state: Any,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "N H"], Any, Stats]:
        """Append one token and attend from it.

        position: that of the token, common to all layers, for states that `start_decoding` has stripped of it; None: the state knows.
        """

    @property
    def settle_every(self) -> int | None:
        """`settle` is due whenever decoding brings the tokens held to a multiple of this; None: never."""
        return None

    def start_decoding(self, state: Any, held: Int[Array, ""]) -> Any:
        """The state as a decode program carries it from token to token. held: tokens held."""
        return state

    def settle(self, state: Any, held: Int[Array, ""]) -> Any:
        """Do what decode steps put off. held: tokens held. Called more often than due it changes nothing."""
        return state

    def finish_decoding(self, state: Any, held: Int[Array, ""]) -> Any:
        """Undo `start_decoding`."""
        return state

    def before_prefill(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states of all layers without what prefill has no use for beside the layer at work, on the device. They are consumed."""
        return states

    def before_decoding(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states of all layers with what makes decoding fast on the device. They are consumed.

        Decoding works without, and gives the same.
        """
        return states

    def prefill_buffer(self, state: Any) -> Any:
        """What all layers' prefill works in, one after the other, when states live elsewhere; None when it works on the state."""
        return None

    def load(self, state: Any, buffer: Any, held: int) -> Any:
        """A state in the buffer (which is consumed), ready for prefill. held: tokens held."""
        return state

    def unload(self, state: Any, worked: Any, held: int, end: int, most: int) -> tuple[Any, Any]:
        """Bring what prefill added to `worked` home into `state`, and give the buffer back. Both are consumed.

        held, end: tokens held before and after; end - held <= most, one of few values.
        """
        return worked, None


def fits_cudnn(query: Float[Array, "T N H"]) -> bool:
    """Whether cuDNN's fused attention takes such queries here."""
    return on_cuda() and query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[2] % 8 == 0 and query.shape[2] <= 128


def attend_whole(
    query: Float[Array, "T N H"], key: Float[Array, "T K H"], value: Float[Array, "T K H"], count: Int[Array, ""]
) -> Float[Array, "T N H"]:
    """Exact causal attention of the first `count` tokens of a sequence, in one call; zeros for the other rows."""
    implementation = "cudnn" if fits_cudnn(query) else "xla"
    out = jax.nn.dot_product_attention(query[None], key[None], value[None], is_causal=True, implementation=implementation)[0]
    return jnp.where((jnp.arange(query.shape[0]) < count)[:, None, None], out, 0)


def attend_behind(
    query: Float[Array, "T N H"], pages: Float[Array, "K P 2 g H"], start: Int[Array, ""], count: Int[Array, ""], interpret: bool = False
) -> Float[Array, "T N H"]:
    """Exact causal attention of queries at positions start, start + 1, ... over a history, by the kernel of routed attention: lists that
    name every page.
    """
    kv_heads, held, _, group, width = pages.shape
    own = start // DENSE_CHUNK + jnp.arange(-(-(query.shape[0] - 1) // DENSE_CHUNK) + 1)
    lists = (kv_heads, len(own), 1)
    counts = jnp.broadcast_to(jnp.minimum(own * (DENSE_CHUNK // group), held)[:, None], lists)
    ids = jnp.broadcast_to(jnp.arange(held), (*lists, held))
    settings = {"chunk_size": DENSE_CHUNK, "sink_chunks": 0, "local_chunks": 0, "scale": width**-0.5, "interpret": interpret}

    @custom_batching.sequential_vmap  # the kernel takes one sequence
    def attend(*arrays: Array) -> Array:
        return routed_prefill_attention(*arrays, implementation="pallas", **settings)[0]

    return attend(query, pages, start, count, ids, jnp.zeros_like(ids), counts)


def dense_stats(queries: Int[Array, ""], blocks: Int[Array, ""], held: Int[Array, ""]) -> Stats:
    """What attention to everything did, `held` tokens being there in the end."""
    queries, blocks, zero = queries.astype(jnp.float32), blocks.astype(jnp.float32), jnp.float32(0)
    return Stats(queries, queries, blocks, blocks * held.astype(jnp.float32), blocks, zero, zero)


@dataclass(frozen=True)
class DenseAttention(AttentionBackend):
    """Exact causal attention over the whole history, in blocks with an online softmax: no [T, S] array is ever made.

    On an NVIDIA GPU, where the dtype has 16 bits, a prompt's first call goes to cuDNN's fused attention and later ones to the kernel of
    routed attention. One token attends in one step.
    """

    query_block: int = 256
    key_block: int = 512
    page_size: int = 16

    def init_state(self, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> DeviceHistory:
        capacity = (
            -(-capacity // self.key_block) * self.key_block
        )  # whole key blocks, so that no block is moved back over keys already seen
        return DeviceHistory.create(capacity, kv_heads, head_dim, self.page_size, dtype)

    def prefill(
        self,
        query: Float[Array, "T N H"],
        key: Float[Array, "T K H"],
        value: Float[Array, "T K H"],
        state: DeviceHistory,
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "T N H"], DeviceHistory, Stats]:
        start = state.length
        state = state.append(key, value, count)
        length, heads, width = query.shape
        block = min(QUERIES_AT_ONCE_CUDA if on_cuda() else self.query_block, length)
        blocks = -(-length // block)
        padded = jnp.pad(query, ((0, blocks * block - length), (0, 0), (0, 0))).reshape(blocks, block, heads, width)

        def one_block(item: tuple[Array, Array]) -> Array:
            index, q = item
            positions = start + index * block + jnp.arange(block)
            live = index * block + jnp.arange(block) < count
            return jnp.where(live[:, None, None], self._attend(q, state, jnp.where(live, positions, -1)), 0)

        def in_blocks(_: None) -> Array:
            return lax.map(one_block, (jnp.arange(blocks), padded)).reshape(blocks * block, heads, width)[:length]

        if fits_cudnn(query):
            whole, behind = (lambda: attend_whole(query, key, value, count)), (lambda: attend_behind(query, state.pages, start, count))
            out = lax.cond(start == 0, whole, behind)
        else:
            out = in_blocks(None)
        return out, state, dense_stats(count, jnp.maximum(-(-count // 64), 1), state.length)

    def decode(
        self,
        query: Float[Array, "N H"],
        key: Float[Array, "K H"],
        value: Float[Array, "K H"],
        state: DeviceHistory,
        position: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "N H"], DeviceHistory, Stats]:
        state = state.append(key[None], value[None], jnp.int32(1))
        out = self._attend(query[None], state, state.length[None] - 1)[0]
        return out, state, dense_stats(jnp.int32(1), jnp.int32(1), state.length)

    def _attend(self, query: Float[Array, "T N H"], state: DeviceHistory, positions: Int[Array, " T"]) -> Float[Array, "T N H"]:
        """Causal attention of queries at `positions` (-1: none) over the history; float32 accumulation."""
        length, heads, width = query.shape
        kv_heads = state.pages.shape[0]
        q = query.reshape(length, kv_heads, heads // kv_heads, width).transpose(1, 2, 0, 3).reshape(kv_heads, -1, width)
        rows = jnp.tile(positions, heads // kv_heads)

        key_block = self.key_block
        if on_cuda():  # for one token a loop's turns cost more than reading unused room
            key_block = state.capacity if length == 1 else math.gcd(state.capacity, KEYS_AT_ONCE_CUDA)

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, total, acc = carry
            keys, values = state.span(i * (key_block // state.group_size), key_block // state.group_size)
            scores = jnp.einsum("kqh,ksh->kqs", q, keys, preferred_element_type=jnp.float32) / math.sqrt(width)
            visible = i * key_block + jnp.arange(key_block) <= rows[:, None]
            scores = jnp.where(visible, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
            safe = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(peak - safe)
            mixed = jnp.einsum("kqs,ksh->kqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
            return new_peak, total * shrink + weights.sum(-1), acc * shrink[..., None] + mixed

        flat = q.shape[:2]
        empty = (jnp.full(flat, -jnp.inf, jnp.float32), jnp.zeros(flat, jnp.float32), jnp.zeros((*flat, width), jnp.float32))
        blocks = jnp.max(positions) // key_block + 1
        _, total, acc = lax.fori_loop(0, blocks, step, empty)
        out = acc / jnp.where(total > 0, total, 1)[..., None]
        return out.reshape(kv_heads, -1, length, width).transpose(2, 0, 1, 3).reshape(length, heads, width).astype(query.dtype)
