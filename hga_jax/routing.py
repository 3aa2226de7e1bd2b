"""Which pages a block of queries opens, and from which of its rows on each is seen: pure functions of queries and summaries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.config import HGAConfig
from hga_jax.pytree import register
from hga_jax.sketches import KeySketches, estimated_keys
from hga_jax.summaries import KeySums

CHUNKS_AT_ONCE = 16  # chunks whose sketches are read in one step of a scan: 1024 tokens, enough for full-speed matmuls
_EXACT = lax.Precision.HIGHEST  # a threshold is compared with: no TF32


@register
@dataclass(frozen=True)
class Selection:
    """Pages opened for one block of Q query rows. R lists a kv head: G when each query head has its own, 1 when all share one.

    pages: page ids. since: the first row of the block that sees the page; Q or more: nobody, an empty slot.
    used: only the first `used` slots of any list can be in use.
    """

    pages: Int[Array, "K R n"]
    since: Int[Array, "K R n"]
    used: Int[Array, ""]


class Routed(NamedTuple):
    """What routing a block gives: the opened pages, the remembered requests, pages refused for lack of room (summed over kv heads), and
    the estimated attention mass of unopened pages (summed over live queries, averaged over heads)."""

    selection: Selection
    stamps: Int[Array, "K P"] | None
    refused: Int[Array, ""]
    unopened: Float[Array, ""]


def largest(scores: Float[Array, "*rows n"], count: int) -> Bool[Array, "*rows n"]:
    """Which entries are at least as large as the `count`-th largest of their row; entries of -inf never are.

    The threshold is found bit by bit on the floats' ordered integer images: exact, and many times faster than a sort on CPU.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def refine(i: Array, bound: Array) -> Array:
        higher = jnp.where(i == 0, 0, bound + (jnp.int32(1) << (31 - i)))  # the sign bit first, then the rest downwards
        enough = jnp.sum(ordered >= higher, axis=-1, keepdims=True) >= count
        return jnp.where(enough, higher, bound)

    bound = lax.fori_loop(0, 32, refine, jnp.full((*scores.shape[:-1], 1), jnp.iinfo(jnp.int32).min))
    return (ordered >= bound) & (scores > -jnp.inf)


def _requests(scores: Float[Array, "*B Q n"], count: int, rows: Int[Array, "Q 1"]) -> tuple[Float[Array, "*B n"], Int[Array, "*B n"]]:
    """Each row asks for its `count` best: (best score among the rows that asked or -inf, first row that asked or Q)."""
    asked = largest(scores, count)
    shared = jnp.max(jnp.where(asked, scores, -jnp.inf), axis=-2)
    return shared, jnp.min(jnp.where(asked, rows, rows.shape[0]), axis=-2)


def route_top(
    query: Float[Array, "K G Q H"], live: Bool[Array, " Q"], own_chunk: Int[Array, ""], summaries: KeySums, config: HGAConfig
) -> Selection:
    """The paper's rule: every query asks for its best chunks, then its best groups among those it sees; the block shares two cuts.

    Rows that are not live ask for nothing. One row alone is the paper's decode rule. Source: arXiv 2606.30709.
    """
    kv_heads, ratio, length, _ = query.shape
    chunks, pages = summaries.chunks.shape[1], config.groups_per_chunk
    query = query.astype(jnp.float32)
    rows = jnp.arange(length)[:, None]
    chunk = jnp.arange(chunks)
    middle_end = own_chunk - config.local_chunks
    middle = (chunk >= config.sink_chunks) & (chunk < middle_end)

    scores = jnp.einsum("kgqh,kmh->kgqm", query, summaries.chunks.astype(jnp.float32))
    scores = jnp.where(middle & live[:, None], scores, -jnp.inf)
    shared, first = _requests(scores, config.top_chunks, rows)
    best, selected = lax.top_k(shared, min(config.top_chunks, chunks))  # [K, G, n]
    since = jnp.where(best > -jnp.inf, jnp.take_along_axis(first, selected, axis=-1), length)
    if config.local_chunks == 0:
        # The chunk before the own one is forced in, in place of the lowest shared score: the last slot, which top_k leaves empty or lowest.
        forced, exists = own_chunk - 1, own_chunk - 1 >= config.sink_chunks
        slot = jnp.arange(selected.shape[-1])
        there = (selected == forced) & (since < length)
        take = there | ((slot == slot[-1]) & ~there.any(-1, keepdims=True))
        selected = jnp.where(exists & take, forced, selected)
        since = jnp.where(exists & take, 0, since)

    candidates = (selected[..., None] * pages + jnp.arange(pages)).reshape(kv_heads, ratio, -1)
    group_sums = jax.vmap(lambda sums, ids: sums[ids])(summaries.groups, candidates).astype(jnp.float32)
    seen = (jnp.repeat(since, pages, axis=-1)[..., None, :] <= rows) & live[:, None]
    scores = jnp.where(seen, jnp.einsum("kgqh,kgnh->kgqn", query, group_sums), -jnp.inf)
    shared, since = _requests(scores, config.top_groups // 2, rows)
    if candidates.shape[-1] > config.top_groups:
        best, slots = lax.top_k(shared, config.top_groups)
        candidates = jnp.take_along_axis(candidates, slots, axis=-1)
        since = jnp.where(best > -jnp.inf, jnp.take_along_axis(since, slots, axis=-1), length)
    used = jnp.where(middle_end > config.sink_chunks, candidates.shape[-1], 0)
    return Selection(candidates, since, used)


def route_threshold(
    query: Float[Array, "K G Q H"],
    live: Bool[Array, " Q"],
    own_chunk: Int[Array, ""],
    sketches: KeySketches,
    stamps: Int[Array, "K P"],
    window_mass: Float[Array, "K G Q"],
    config: HGAConfig,
    rotation: Float[Array, "H H"],
    scale: float,
) -> Routed:
    """The sketch policy's rule: a row opens, for all heads of the kv head, every page whose estimated attention mass reaches the threshold
    for one of them; later rows of its chunk and of the next one see the page too.

    window_mass: log of the summed exponentials of the exact window scores. stamps: last chunk in which each page was requested, taken and
    returned. Strictly causal, and the same for one block of rows as for its rows one by one.
    """
    kv_heads, ratio, length, width = query.shape
    pages, total_pages = config.groups_per_chunk, stamps.shape[1]
    first_page = config.sink_chunks * pages
    end_page = jnp.maximum(own_chunk - config.local_chunks, config.sink_chunks) * pages
    rotated = jnp.einsum("krh,hi->kri", query.astype(jnp.float32).reshape(kv_heads, -1, width) * scale, rotation, precision=_EXACT)

    chunks = min(CHUNKS_AT_ONCE, sketches.means.shape[1])
    step = chunks * pages
    tiles = jnp.where(end_page > first_page, -(-end_page // step), 0)

    def begin_of(tile: Array) -> Array:
        return jnp.minimum(tile * chunks, sketches.means.shape[1] - chunks)  # the last tile may reach back over pages already done

    def score(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scores, peak, total = carry
        begin = begin_of(tile)
        estimates = estimated_keys(sketches, begin, chunks, rotation)
        tokens = jnp.einsum("ksh,krh->ksr", estimates, rotated, precision=_EXACT)
        fresh = tokens.reshape(kv_heads, step, config.group_size, -1).max(2)  # a page weighs as much as its best token
        page = begin * pages + jnp.arange(step)[:, None]
        fresh = jnp.where((page >= first_page) & (page < end_page), fresh, -jnp.inf)
        counted = jnp.where(page >= tile * step, fresh, -jnp.inf)
        new_peak = jnp.maximum(peak, counted.max(1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(counted - new_peak[:, None]).sum(1)
        return lax.dynamic_update_slice_in_dim(scores, fresh, begin * pages, axis=1), new_peak, total

    rows = ratio * length
    window_mass = window_mass.reshape(kv_heads, rows)
    start = (jnp.full((kv_heads, total_pages, rows), -jnp.inf), window_mass, jnp.ones((kv_heads, rows)))
    scores, peak, total = lax.fori_loop(0, tiles, score, start)
    mass_unit = peak + jnp.log(total)  # what a score is measured against: exp(score - mass_unit) is the page's mass
    row = jnp.tile(jnp.arange(length), ratio)
    least = jnp.where(jnp.tile(live, ratio), mass_unit + math.log(config.threshold), jnp.inf)

    def ask(tile: Array, first: Array) -> Array:
        begin = begin_of(tile) * pages
        asked = lax.dynamic_slice_in_dim(scores, begin, step, axis=1) >= least[:, None]
        return lax.dynamic_update_slice_in_dim(first, jnp.where(asked, row, length).min(-1), begin, axis=1)

    first = lax.fori_loop(0, tiles, ask, jnp.full((kv_heads, total_pages), length))
    carried = stamps >= own_chunk - 1
    capacity = min(config.page_capacity, total_pages)
    granted = _grant(jnp.where(carried, length, first), capacity - carried.sum(-1), length)
    refused = jnp.sum((first < length) & ~carried & ~granted)
    stamps = jnp.where((first < length) & (carried | granted), own_chunk, stamps)

    # The open pages in order of their ids, without a sort: slot n holds the page at which the running count reaches n + 1.
    count = jnp.cumsum(carried | granted, axis=-1)
    slot = jnp.arange(capacity)
    ids = jax.vmap(lambda running: jnp.searchsorted(running, slot + 1))(count)
    filled = slot < count[:, -1:]
    ids = jnp.where(filled, ids, 0)
    since = jnp.where(filled, jnp.take_along_axis(jnp.where(carried, 0, first), ids, axis=-1), length)
    selection = Selection(ids[:, None], since[:, None], count[:, -1].max())
    opened = _opened_mass(scores, mass_unit, ids, since, row, selection.used)
    outside = 1 - jnp.exp(window_mass - mass_unit)  # the estimated mass of all routed pages
    unopened = jnp.sum(jnp.where(jnp.tile(live, ratio), jnp.maximum(outside - opened, 0), 0)) / (kv_heads * ratio)
    return Routed(selection, stamps, refused, unopened)


def _grant(first: Int[Array, "K P"], room: Int[Array, " K"], length: int) -> Bool[Array, "K P"]:
    """Which of the pages asked for at row `first` (`length`: not) get one of the `room` places, in order of (row, page id)."""
    asked, room = first < length, room[:, None]

    def ration(first: Array) -> Array:
        served = jnp.zeros_like(room)  # rows all of whose requests fit, found by bisection
        for bit in reversed(range(length.bit_length())):
            longer = served + (1 << bit)
            fits = jnp.sum(first < longer, axis=-1, keepdims=True) <= room
            served = jnp.where((longer <= length) & fits, longer, served)
        whole = first < served
        partly = asked & (first == served)
        return (asked & whole) | (partly & (jnp.cumsum(partly, axis=-1) <= room - whole.sum(-1, keepdims=True)))

    return lax.cond(jnp.any(asked.sum(-1, keepdims=True) > room), ration, lambda first: first < length, first)


def _opened_mass(
    scores: Float[Array, "K P r"],
    mass_unit: Float[Array, "K r"],
    ids: Int[Array, "K n"],
    since: Int[Array, "K n"],
    row: Int[Array, " r"],
    used: Int[Array, ""],
) -> Float[Array, "K r"]:
    """Estimated attention mass of the pages each row sees."""
    step = min(64, ids.shape[1])
    short = -ids.shape[1] % step
    ids = jnp.pad(ids, ((0, 0), (0, short)))
    since = jnp.pad(since, ((0, 0), (0, short)), constant_values=scores.shape[2])

    def add(i: Array, total: Array) -> Array:
        here, seen = (lax.dynamic_slice_in_dim(x, i * step, step, axis=1) for x in (ids, since))
        mass = jnp.exp(jax.vmap(lambda table, pages: table[pages])(scores, here) - mass_unit[:, None])
        return total + jnp.where(seen[..., None] <= row, mass, 0).sum(1)

    return lax.fori_loop(0, -(-used // step), add, jnp.zeros_like(mass_unit))
