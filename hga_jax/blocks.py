"""Attention in blocks of one chunk of queries: windows, routing, routed pages, all in one online softmax.

A few neighbouring blocks share the work that does not depend on what was requested before (windows, scoring); opened pages are settled and
attended to block by block. Nothing of size queries x keys is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.backend import Stats
from hga_jax.config import HGAConfig
from hga_jax.policies import Policy
from hga_jax.pytree import register, varying_like
from hga_jax.routing import Selection
from hga_jax.summaries import empty, write
from pallas_kernels.dispatch import on_cuda
from pallas_kernels.paper_routing import empty_marks
from pallas_kernels.sketch_prefill_routing.pairs import query_energy
from pallas_kernels.sketch_routing import PageList

BLOCKS_AT_ONCE = 4  # blocks that share windows and scoring: 256 queries, twice the matmul speed of 64 on a CPU
SCORES_AT_ONCE = 16 * 2**20  # page scores held at once, in elements: fewer blocks share when the history is very long
PAGES_AT_ONCE = 64  # opened pages attended to in one step: 1024 tokens, enough for full-speed matmuls
CHUNKS_AT_ONCE = 16  # chunks summarised in one step on a CPU, whose caches they should fit
CHUNKS_AT_ONCE_CUDA = 1024  # where launches are dear: 65,536 tokens, 134 MB of float32 at 4 kv heads of 128
NOWHERE = 2**30  # a position that no query reaches


@register
@dataclass(frozen=True)
class LayerState:
    """What HGA keeps of one layer and one sequence.

    history: K/V of all tokens (any tier). summaries: the policy's pytree; entries of chunks still open are provisional and never read.
    stamps: for policies that remember requests, the last chunk in which a query requested the page (-2: never), or, where votes keep pages
    open, what pallas_kernels.votes says; else None.
    marks: for the others, scratch of the decode kernels, all zero between tokens; else None.
    energy: where prefill scans by rotary pairs, the summed squares of the first config.unrouted queries by pair; else None.
    carried: inside a decode loop, the pages that earlier requests leave open for the next token (sketch_routing.PageList); else None.
    """

    history: Any
    summaries: Any
    stamps: Int[Array, "K P"] | None
    marks: Int[Array, "K P1"] | None = None
    energy: Float[Array, "K half"] | None = None
    carried: PageList | None = None

    @property
    def length(self) -> Int[Array, ""] | None:
        """Tokens held (None inside a decode loop)."""
        return self.history.length


@register
@dataclass(frozen=True)
class Opened:
    """What blocks of queries saw beside their windows, kept for the gradient. Blocks are chunks of the queries, from the first one's on.

    pages, since: as in routing.Selection; counts: slots that can be in use. peaks: log-sum-exp of each row's scaled scores.
    """

    pages: Int[Array, "B K R n"]
    since: Int[Array, "B K R n"]
    counts: Int[Array, " B"]
    peaks: Float[Array, "B K G Q"]

    def with_block(self, b: Int[Array, ""], selection: Selection, peaks: Float[Array, "K G Q"]) -> Opened:
        here = (selection.pages, selection.since, selection.used, peaks)
        return Opened(*(all.at[b].set(new) for all, new in zip((self.pages, self.since, self.counts, self.peaks), here, strict=True)))


class _Softmax:
    """Online softmax over key blocks: a (peak, total, acc) triple per query row, all float32. Z stands for any batch of key sets."""

    @staticmethod
    def empty(query: Float[Array, "*Z q H"]) -> tuple[Array, Array, Array]:
        rows = query.shape[:-1]
        return jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(query.shape)

    @staticmethod
    def add(
        carry: tuple[Array, Array, Array],
        query: Float[Array, "*Z q H"],
        keys: Float[Array, "*Z s H"],
        values: Float[Array, "*Z s H"],
        visible: Bool[Array, "*#Z q s"],
        scale: float,
    ) -> tuple[Array, Array, Array]:
        peak, total, acc = carry
        scores = jnp.einsum("...qh,...sh->...qs", query, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(visible, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1))
        safe = jnp.where(new_peak > -jnp.inf, new_peak, 0)  # rows that see nothing yet
        weights = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(peak - safe)
        mixed = jnp.einsum("...qs,...sh->...qh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * shrink + weights.sum(-1), acc * shrink[..., None] + mixed


def window_starts(own_chunk: Int[Array, "*B"], config: HGAConfig) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """(sink tokens before the local window, first token of the local window) for queries of `own_chunk`."""
    local = jnp.maximum(own_chunk - config.local_chunks, 0)
    return jnp.minimum(config.sink_chunks, local) * config.chunk_size, local * config.chunk_size


class Windows(NamedTuple):
    """Where the windows of B neighbouring blocks lie: the first `sinks` pages, and `span` pages from `first` on.

    visible: which of those tokens, sinks before span, each row of each block sees.
    """

    sinks: int
    first: Int[Array, ""]
    span: int
    visible: Bool[Array, "B Q S"]


def windows_of(positions: Int[Array, "B Q"], history: Any, config: HGAConfig) -> Windows:
    """The windows of the queries at `positions`, one chunk a block."""
    pages, held = config.groups_per_chunk, history.capacity // config.group_size
    own_chunk = positions[:, 0] // config.chunk_size
    span, sinks = min((config.local_chunks + len(positions)) * pages, held), min(config.sink_chunks * pages, held)
    first = jnp.clip((own_chunk[0] - config.local_chunks) * pages, 0, held - span)  # where the history starts a clamped span
    from_sinks, from_local = window_starts(own_chunk[:, None, None], config)
    here = first * config.group_size + jnp.arange(span * config.group_size)
    visible = (here >= from_local) & (here <= positions[..., None])
    seen = jnp.broadcast_to(jnp.arange(sinks * config.group_size) < from_sinks, (*positions.shape, sinks * config.group_size))
    return Windows(sinks, first, span, jnp.concatenate([seen, visible], axis=-1))


def window_tokens(windows: Windows, history: Any) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
    """Keys and values of the windows."""
    tokens = history.span(windows.first, windows.span)
    if not windows.sinks:
        return tokens
    return tuple(jnp.concatenate(both, axis=1) for both in zip(history.span(jnp.int32(0), windows.sinks), tokens, strict=True))


def attend_windows(
    query: Float[Array, "K B G Q H"], positions: Int[Array, "B Q"], history: Any, config: HGAConfig, scale: float
) -> tuple[Float[Array, "K B G Q"], Float[Array, "K B G Q"], Float[Array, "K B G Q H"]]:
    """Attention of B neighbouring blocks over sinks, local window and own chunk, as the (peak, total, acc) of an online softmax."""
    kv_heads, blocks, ratio, _, width = query.shape
    windows = windows_of(positions, history, config)
    keys, values = window_tokens(windows, history)
    visible = jnp.broadcast_to(windows.visible[:, None], (blocks, ratio, *windows.visible.shape[1:])).reshape(-1, keys.shape[1])
    flat = query.reshape(kv_heads, -1, width)
    carry = _Softmax.add(_Softmax.empty(flat), flat, keys, values, visible[None], scale)
    return tuple(x.reshape(*query.shape[:4], *x.shape[2:]) for x in carry)


def attend_pages(
    carry: tuple[Array, Array, Array], query: Float[Array, "K G Q H"], selection: Selection, history: Any, config: HGAConfig, scale: float
) -> tuple[Float[Array, "K G Q"], Float[Array, "K G Q"], Float[Array, "K G Q H"]]:
    """Add the opened pages to the online softmax of one block; only slots in use cost anything."""
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
        seen = lax.dynamic_slice_in_dim(since, i * step, step, axis=2)
        visible = jnp.repeat(seen, config.group_size, axis=-1)[:, :, None, :] <= rows[:, None]
        shape = (kv_heads, lists, step * config.group_size, width)
        return _Softmax.add(carry, by_list, keys.reshape(shape), values.reshape(shape), visible, scale)

    grouped = jax.tree.map(lambda x: x.reshape(kv_heads, lists, -1, *x.shape[3:]), carry)
    done = lax.fori_loop(0, -(-selection.used // step), one, grouped)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), done, carry)


def attend_blocks(
    query: Float[Array, "B Q N H"],
    live: Bool[Array, "B Q"],
    first_position: Int[Array, ""],
    blocks: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
    opened: Opened | None = None,
) -> tuple[Float[Array, "B Q N H"], Int[Array, "B Q N"], LayerState, Stats, Opened | None]:
    """Queries of B neighbouring chunks, from `first_position` on, all of whose tokens the history already holds.

    Only the first `blocks` blocks are computed, the others are zero. Rows that are not live request nothing and their outputs mean nothing.
    Returns outputs, visible keys, the state with the requests remembered, stats, and `opened` (for B blocks) filled in, if given.
    """
    most, length, heads, width = query.shape
    kv_heads = state.history.kv_heads
    q = query.reshape(most, length, kv_heads, heads // kv_heads, width).transpose(2, 0, 3, 1, 4)  # [K, B, G, Q, H]
    positions = first_position + jnp.arange(most)[:, None] * config.chunk_size + jnp.arange(length)
    own_chunks = positions[:, 0] // config.chunk_size
    windows = attend_windows(q, positions, state.history, config, scale)
    requests = policy.request(q, live, positions, state.summaries, windows[0] + jnp.log(windows[1]))

    def one(b: Array, carry: tuple) -> tuple:
        out, visible, stamps, stats, opened = carry
        selection, stamps, refused, unopened = policy.grant(requests, b, own_chunks[b], stamps)
        block = tuple(x[:, b] for x in windows)
        peak, total, acc = attend_pages(block, q[:, b], selection, state.history, config, scale)
        if opened is not None:
            opened = opened.with_block(b, selection, peak + jnp.log(total))
        keys, more = _count(selection, live[b], positions[b], own_chunks[b], heads, config)
        stats = stats + replace(more, refused=refused.astype(jnp.float32), unopened=unopened)
        return out.at[b].set(acc / total[..., None]), visible.at[b].set(keys), stamps, stats, opened

    outputs = (jnp.zeros((most, *windows[2][:, 0].shape)), jnp.zeros((most, length, heads), jnp.int32))
    carry = varying_like((*outputs, state.stamps, Stats.zero(), opened), query)
    out, visible, stamps, stats, opened = one(jnp.int32(0), carry) if most == 1 else lax.fori_loop(0, blocks, one, carry)
    out = out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
    return out, visible, replace(state, stamps=stamps), stats, opened


def _count(
    selection: Selection, live: Bool[Array, " Q"], positions: Int[Array, " Q"], own_chunk: Int[Array, ""], heads: int, config: HGAConfig
) -> tuple[Int[Array, "Q N"], Stats]:
    """Visible keys of every query and head of a block, and its share of the statistics."""
    kv_heads, lists, _ = selection.pages.shape
    length = len(live)
    seen = config.group_size * jnp.sum(selection.since[:, :, None, :] <= jnp.arange(length)[:, None], axis=-1)  # [K, R, Q]
    seen = jnp.repeat(seen.reshape(-1, length), heads // (kv_heads * lists), axis=0).T
    sinks, local = window_starts(own_chunk, config)
    visible = (positions + 1 - local + sinks)[:, None] + seen
    held = jnp.max(jnp.where(live, positions, 0)) + 1
    fetched = held - local + sinks + config.group_size * _distinct_pages(selection, length) / kv_heads
    attended = jnp.where(live, visible.mean(-1) / (positions + 1), 0).sum()
    numbers = (live.sum(), attended, 1, fetched, fetched / held, 0, 0)
    return visible, Stats(*(jnp.asarray(x, jnp.float32) for x in numbers))


def _distinct_pages(selection: Selection, length: int) -> Int[Array, ""]:
    """Pages opened, summed over kv heads; one that several query heads opened counts once."""
    opened = selection.since < length
    if selection.pages.shape[1] == 1:
        return jnp.sum(opened)
    pages = jnp.where(opened, selection.pages, -1).reshape(selection.pages.shape[0], -1)
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
    """Attention of the first `count` queries, at positions start, start+1, ... of a history that holds them.

    Returns outputs, visible keys (both zero for rows from `count` on), the state with the requests remembered, and stats.
    """
    return _attend(query, start, count, state, config, policy, scale, keep=False)[:4]


def attend_and_keep(
    query: Float[Array, "T N H"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    state: LayerState,
    config: HGAConfig,
    policy: Policy,
    scale: float,
) -> tuple[Float[Array, "T N H"], Int[Array, "T N"], LayerState, Stats, Opened]:
    """`attend`, and what its blocks saw: at most one block more than the queries' tokens make, those not reached with counts of 0."""
    return _attend(query, start, count, state, config, policy, scale, keep=True)


def _attend(
    query: Array, start: Array, count: Array, state: LayerState, config: HGAConfig, policy: Policy, scale: float, keep: bool
) -> tuple[Array, Array, LayerState, Stats, Opened | None]:
    length, heads, width = query.shape
    size = config.chunk_size
    if length == 1:
        live = (count > 0)[None, None]
        opened = _nothing_opened(1, 1, query, state, config, policy) if keep else None
        out, visible, state, stats, opened = attend_blocks(
            query[None], live, start, jnp.int32(1), state, config, policy, scale, opened
        )  # fmt: skip
        out, visible = jnp.where(live[0, :, None, None], out[0], 0), jnp.where(live[0, :, None], visible[0], 0)
        return out, visible, state, stats, opened
    most_blocks = -(-(length - 1) // size) + 1
    most = min(BLOCKS_AT_ONCE, most_blocks, max(SCORES_AT_ONCE // (heads * size * state.history.capacity // config.group_size), 1))
    # Blocks start at chunk boundaries, wherever the queries do: a margin on both sides.
    padded = jnp.pad(query, ((size, most * size), (0, 0), (0, 0)))
    first_chunk = start // size
    blocks = jnp.where(count > 0, (start + count - 1) // size - first_chunk + 1, 0)

    def several(i: Array, carry: tuple) -> tuple:
        out, visible, stamps, stats, opened = carry
        first_position = (first_chunk + i * most) * size
        offset = first_position - start + size
        row = offset - size + jnp.arange(most * size)
        live = (row >= 0) & (row < count)
        part = lax.dynamic_slice_in_dim(padded, offset, most * size).reshape(most, size, heads, width)
        here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * most, most), opened)
        mixed, keys, after, more, here = attend_blocks(
            part, live.reshape(most, size), first_position, jnp.minimum(blocks - i * most, most),
            replace(state, stamps=stamps), config, policy, scale, here,
        )  # fmt: skip
        mixed = jnp.where(live[:, None, None], mixed.reshape(-1, heads, width), 0)
        keys = jnp.where(live[:, None], keys.reshape(-1, heads), 0)
        out, visible = (lax.dynamic_update_slice_in_dim(old, new, offset, 0) for old, new in ((out, mixed), (visible, keys)))
        opened = jax.tree.map(lambda all, new: lax.dynamic_update_slice_in_dim(all, new, i * most, 0), opened, here)
        return out, visible, after.stamps, stats + more, opened

    rounded = -(-most_blocks // most) * most
    opened = _nothing_opened(rounded, size, query, state, config, policy) if keep else None
    carry = (jnp.zeros_like(padded), jnp.zeros(padded.shape[:2], jnp.int32), state.stamps, Stats.zero(), opened)
    out, visible, stamps, stats, opened = lax.fori_loop(0, -(-blocks // most), several, varying_like(carry, query))
    inside = slice(size, size + length)
    return out[inside], visible[inside], replace(state, stamps=stamps), stats, opened


def _nothing_opened(blocks: int, length: int, query: Float[Array, "T N H"], state: LayerState, config: HGAConfig, policy: Policy) -> Opened:
    """Room for what `blocks` blocks of `length` rows see."""
    kv_heads, (_, heads, width) = state.history.kv_heads, query.shape
    rows = (kv_heads, 1, heads // kv_heads, length)

    def selection() -> Selection:
        block, window_mass = jnp.zeros_like(query, shape=(*rows, width)), jnp.zeros_like(query, shape=rows, dtype=jnp.float32)
        requests = policy.request(block, jnp.ones((1, length), bool), jnp.zeros((1, length), jnp.int32), state.summaries, window_mass)
        return policy.grant(requests, jnp.int32(0), jnp.int32(0), state.stamps).selection

    lists = jnp.zeros((blocks, *jax.eval_shape(selection).pages.shape), jnp.int32)
    return Opened(lists, lists, jnp.zeros(blocks, jnp.int32), jnp.zeros((blocks, kv_heads, *rows[2:])))


def summarise_new(state: LayerState, start: Int[Array, ""], most: int, config: HGAConfig, policy: Policy) -> LayerState:
    """Bring the summaries up to date after at most `most` tokens were appended at `start`."""
    size, chunks = config.chunk_size, state.history.capacity // config.chunk_size
    first, end = start // size, -(-state.length // size)
    if policy.summarise_pages is not None and on_cuda() and most > 1 and state.history.pages.dtype in (jnp.float32, jnp.bfloat16):
        fresh = policy.summarise_pages(state.summaries, state.history.pages, first, end, min(-(-(most - 1) // size) + 1, chunks))
        return replace(state, summaries=fresh)
    step = min(CHUNKS_AT_ONCE_CUDA if on_cuda() else CHUNKS_AT_ONCE, -(-(most - 1) // size) + 1, chunks)
    sinks, _ = state.history.span(jnp.int32(0), min(config.sink_pages, state.history.capacity // config.group_size))

    def one(i: Array, summaries: Any) -> Any:
        begin = jnp.minimum(first + i * step, chunks - step)
        keys, _ = state.history.span(begin * config.groups_per_chunk, step * config.groups_per_chunk)
        return write(summaries, policy.summarise(keys, sinks), begin, step)

    if step == 1:
        return replace(state, summaries=one(jnp.int32(0), state.summaries))
    return replace(state, summaries=lax.fori_loop(0, -(-(end - first) // step), one, state.summaries))


def new_state(history: Any, dtype: Any, config: HGAConfig, policy: Policy) -> LayerState:
    """The state of a history that holds nothing yet, or of which `summarise_new` will make the summaries."""
    summaries = empty(policy.summarise, history.kv_heads, history.capacity, history.head_dim, dtype)
    pages = history.capacity // config.group_size
    marks = None if policy.remembers else empty_marks(history.kv_heads, pages)
    pairs = config.pairs_for(history.capacity, history.head_dim)
    energy = jnp.zeros((history.kv_heads, history.head_dim // 2)) if pairs else None
    return LayerState(history, *varying_like((summaries, policy.new_stamps(history.kv_heads, pages), marks, energy), history.pages))


def with_query_energy(
    state: LayerState, query: Float[Array, "T N H"], start: Int[Array, ""], count: Int[Array, ""], config: HGAConfig
) -> LayerState:
    """The state after `count` queries from position `start` on were seen."""
    if state.energy is None:
        return state
    return replace(state, energy=state.energy + query_energy(query, len(state.energy), start, count, config.unrouted))
