"""Which pages a block of queries opens, and from which of its rows on each is seen: pure functions of queries and summaries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.config import HGAConfig
from hga_jax.pytree import register, varying_like
from hga_jax.sketches import KeySketches, estimated_scores
from hga_jax.summaries import KeySums
from pallas_kernels.votes import is_open, stamp_of, votes_in

SMALLEST_RUNG = 128  # chunks below which scoring fewer of them gains nothing
CHUNKS_AT_ONCE = 16  # chunks whose sketches are read in one step of a scan: 1024 tokens, enough for full-speed matmuls


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


class Granted(NamedTuple):
    """The pages open to one block, the remembered requests, page requests refused for lack of room (summed over kv heads), and the
    estimated attention mass of unopened pages (summed over live queries, averaged over heads)."""

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

    lowest = jnp.full((*scores.shape[:-1], 1), jnp.iinfo(jnp.int32).min)
    bound = lax.fori_loop(0, 32, refine, varying_like(lowest, scores))
    return (ordered >= bound) & (scores > -jnp.inf)


def _requests(scores: Float[Array, "*B Q n"], count: int) -> tuple[Float[Array, "*B n"], Int[Array, "*B n"]]:
    """Each row asks for its `count` best: (best score among the rows that asked or -inf, first row that asked or Q)."""
    asked = largest(scores, count)
    rows = jnp.arange(scores.shape[-2])[:, None]
    shared = jnp.max(jnp.where(asked, scores, -jnp.inf), axis=-2)
    return shared, jnp.min(jnp.where(asked, rows, len(rows)), axis=-2)


def first_requests(scores: Float[Array, "*B Q n"], count: int, watched: Float[Array, "*B Q w"]) -> Int[Array, "*B w"]:
    """The first row that has the watched entry among its `count` best (Q: none). watched: some columns of scores; -inf never counts.

    Each row's threshold is bisected only until it is clear which row comes first for every column: a few passes, where finding all
    thresholds exactly takes dozens.
    """
    length = scores.shape[-2]
    rows = jnp.arange(length)[:, None]
    there = scores > -jnp.inf
    top = jnp.max(scores, axis=-1, keepdims=True)
    low = jnp.min(jnp.where(there, scores, jnp.inf), axis=-1, keepdims=True)
    if scores.shape[-1] >= count:
        # Of `count` disjoint sets of entries the smallest of their maxima is no larger than the count-th best: a tighter start.
        sets = scores[..., : scores.shape[-1] // count * count].reshape(*scores.shape[:-1], -1, count)
        low = jnp.maximum(low, sets.max(-2).min(-1, keepdims=True))
    high = jnp.nextafter(top, jnp.inf)
    everything = jnp.sum(there, axis=-1, keepdims=True) <= count
    lowest = jnp.finfo(scores.dtype).min
    # low <= the row's threshold < high, or low == high: exactly the entries from there on are asked for.
    low, high = jnp.where(everything, lowest, low), jnp.where(everything, lowest, high)

    def first(high: Array) -> Array:
        return jnp.min(jnp.where(watched >= high, rows, length), axis=-2)

    def unclear(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return jnp.any((watched >= low) & (watched < high) & (rows < first(high)[..., None, :]))

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low / 2 + high / 2  # their sum could overflow
        above = jnp.sum(scores >= middle, axis=-1, keepdims=True)
        exact = (above == count) & (high > low)
        stuck = (middle <= low) | (middle >= high)  # neighbouring floats: low is the threshold
        new_low = jnp.where(stuck, low, jnp.where(above >= count, middle, low))
        new_high = jnp.where(stuck, low, jnp.where(above >= count, high, middle))
        return jnp.where(high > low, new_low, low), jnp.where(high > low, jnp.where(exact & ~stuck, middle, new_high), high)

    return first(lax.while_loop(unclear, halve, (low, high))[1])


def request_top(
    query: Float[Array, "K B G Q H"],
    live: Bool[Array, "B Q"],
    positions: Int[Array, "B Q"],
    summaries: KeySums,
    window_mass: Array | None,
    *,
    config: HGAConfig,
    at_once: int = 1,
) -> Selection:
    """The paper's rule: every query asks for its best chunks, then its best groups among those it sees; each block shares two cuts.

    Rows that are not live ask for nothing. One row alone is the paper's decode rule. Selections have a leading axis B. `window_mass` plays
    no part. at_once: blocks that are worked on together, for machines on which launches are dear; then all score the whole history.
    Source: arXiv 2606.30709.
    """

    def one(item: tuple[Array, Array, Array]) -> Selection:
        block, live, own_chunk = item
        block = block.astype(jnp.float32)
        selected, since = _selected_chunks(block, live, own_chunk, summaries.chunks, config, ladder=at_once == 1)
        return _selected_groups(block, live, own_chunk, selected, since, summaries.groups, config)

    own_chunks = positions[:, 0] // config.chunk_size
    return lax.map(one, (query.swapaxes(0, 1), live, own_chunks), batch_size=None if at_once == 1 else at_once)


def _selected_chunks(
    query: Float[Array, "K G Q H"],
    live: Bool[Array, " Q"],
    own_chunk: Int[Array, ""],
    sums: Float[Array, "K chunks H"],
    config: HGAConfig,
    ladder: bool,
) -> tuple[Int[Array, "K G n"], Int[Array, "K G n"]]:
    """The chunks a block of queries selects, and the first row that sees each (Q: none)."""
    chunks, length = sums.shape[1], query.shape[2]
    middle_end = own_chunk - config.local_chunks
    count = min(config.top_chunks, chunks)

    def choose(scored: int) -> tuple[Int[Array, "K G n"], Int[Array, "K G n"]]:
        chunk = jnp.arange(scored)
        middle = (chunk >= config.sink_chunks) & (chunk < middle_end)
        scores = jnp.einsum("kgqh,kmh->kgqm", query, sums[:, :scored].astype(jnp.float32))
        scores = jnp.where(middle & live[:, None], scores, -jnp.inf)
        # The best `count` by the block's largest score are the best by shared score: where such a chunk has its largest score, fewer than
        # `count` chunks score higher, so that row requests it.
        best, selected = lax.top_k(scores.max(-2), count)
        since = first_requests(scores, count, jnp.take_along_axis(scores, selected[..., None, :], axis=-1))
        return selected, jnp.where(best > -jnp.inf, since, length)

    # Early blocks of a long history score only three quarters, a half, three eighths, ... of it: sizes must be static.
    rungs, size = [chunks], chunks
    while ladder and size // 2 >= max(SMALLEST_RUNG, count):
        rungs = [-(-size // 2), -(-size * 3 // 4), *rungs]
        size = rungs[0]
    rung = jnp.sum(middle_end > jnp.array(rungs[:-1], jnp.int32))
    selected, since = lax.switch(rung, [lambda size=size: choose(size) for size in rungs])
    if config.local_chunks == 0:
        # The chunk before the own one is forced in, in place of the lowest shared score: the last slot, which top_k leaves empty or lowest.
        forced, exists = own_chunk - 1, own_chunk - 1 >= config.sink_chunks
        there = (selected == forced) & (since < length)
        take = there | ((jnp.arange(count) == count - 1) & ~there.any(-1, keepdims=True))
        selected = jnp.where(exists & take, forced, selected)
        since = jnp.where(exists & take, 0, since)
    return selected, since


def _selected_groups(
    query: Float[Array, "K G Q H"],
    live: Bool[Array, " Q"],
    own_chunk: Int[Array, ""],
    chunks: Int[Array, "K G n"],
    since: Int[Array, "K G n"],
    sums: Float[Array, "K groups H"],
    config: HGAConfig,
) -> Selection:
    """The groups a block of queries selects among those of the chunks it sees."""
    pages, length = config.groups_per_chunk, query.shape[2]
    rows = jnp.arange(length)[:, None]
    candidates = (chunks[..., None] * pages + jnp.arange(pages)).reshape(*chunks.shape[:2], -1)
    sums = jax.vmap(lambda sums, ids: sums[ids])(sums, candidates).astype(jnp.float32)
    seen = (jnp.repeat(since, pages, axis=-1)[..., None, :] <= rows) & live[:, None]
    scores = jnp.where(seen, jnp.einsum("kgqh,kgnh->kgqn", query, sums), -jnp.inf)
    shared, since = _requests(scores, config.top_groups // 2)
    if candidates.shape[-1] > config.top_groups:
        best, slots = lax.top_k(shared, config.top_groups)
        candidates = jnp.take_along_axis(candidates, slots, axis=-1)
        since = jnp.where(best > -jnp.inf, jnp.take_along_axis(since, slots, axis=-1), length)
    used = jnp.where(own_chunk - config.local_chunks > config.sink_chunks, candidates.shape[-1], 0)
    return Selection(candidates, since, used)


def grant_each(requests: Selection, block: Int[Array, ""], own_chunk: Int[Array, ""], stamps: None) -> Granted:
    """Every block gets what it selected; nothing is remembered."""
    return Granted(jax.tree.map(lambda x: x[block], requests), stamps, jnp.int32(0), jnp.float32(0))


@register
@dataclass(frozen=True)
class PageRequests:
    """What the queries of B blocks ask for: length = Q of each of G heads, r = G * Q rows a block.

    first: the first row of the block that asks for the page (Q: none). votes: of a block's rows for the page; None where they do not count.
    scores: estimated page scores, in tiles of `tile` pages as they were
    scanned (see _tile_start); exp(score - mass_unit) is a page's share of the row's attention mass. routed_mass: that of all routed pages
    together, 0 for rows that are not live.
    """

    length: int = field(metadata={"static": True})
    first: Int[Array, "B K P"]
    votes: Int[Array, "B K P"] | None
    scores: Float[Array, "tiles K B r tile"]
    mass_unit: Float[Array, "K B r"]
    routed_mass: Float[Array, "K B r"]


def request_by_threshold(
    query: Float[Array, "K B G Q H"],
    live: Bool[Array, "B Q"],
    positions: Int[Array, "B Q"],
    sketches: KeySketches,
    window_mass: Float[Array, "K B G Q"],
    *,
    config: HGAConfig,
    rotation: Float[Array, "H H"],
    scale: float,
) -> PageRequests:
    """The sketch policy's rule: a query asks for every page whose estimated share of its attention mass reaches the threshold.

    window_mass: log of the summed exponentials of the exact window scores. Scans every sketch of the routed middle once.
    """
    kv_heads, blocks, ratio, length, width = query.shape
    rows, pages = blocks * ratio * length, config.groups_per_chunk
    own_chunks = positions[:, 0] // config.chunk_size
    chunks = min(CHUNKS_AT_ONCE, sketches.means.shape[1])
    step = chunks * pages
    total_pages = sketches.means.shape[1] * pages
    first_page = config.sink_chunks * pages
    end_pages = jnp.maximum(own_chunks - config.local_chunks, config.sink_chunks) * pages
    end_of_row = jnp.repeat(end_pages, ratio * length)
    tiles = jnp.where(end_pages[-1] > first_page, -(-end_pages[-1] // step), 0)
    most_tiles = -(-total_pages // step)
    flat = query.astype(jnp.float32).reshape(kv_heads, rows, width) * scale
    rotated = jnp.einsum("krh,hi->kri", flat, rotation, precision=lax.Precision.HIGHEST)

    def score(tile: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        scores, peak, total = carry
        begin = _tile_start(tile, step, total_pages)
        tokens = estimated_scores(sketches, begin // pages, chunks, rotated, rotation)
        fresh = tokens.reshape(kv_heads, rows, step, config.group_size).max(-1)  # a page weighs as much as its best token
        page = begin + jnp.arange(step)
        begin_new = jnp.maximum(first_page, tile * step)  # a page counts once, in the first tile that holds it
        fresh = jnp.where((page >= begin_new) & (page < end_of_row[:, None]), fresh, -jnp.inf)
        new_peak = jnp.maximum(peak, fresh.max(-1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(fresh - new_peak[..., None]).sum(-1)
        return scores.at[tile].set(fresh), new_peak, total

    window_mass = window_mass.reshape(kv_heads, rows)
    start = (jnp.empty((most_tiles, kv_heads, rows, step)), window_mass, jnp.ones((kv_heads, rows)))  # tiles not scanned are not read
    scores, peak, total = lax.fori_loop(0, tiles, score, varying_like(start, query))
    mass_unit = peak + jnp.log(total)
    row_live = jnp.broadcast_to(live[:, None], (blocks, ratio, length)).reshape(rows)
    threshold = config.threshold_for(ratio)
    least = jnp.where(row_live, mass_unit + math.log(threshold), jnp.inf)
    row = jnp.arange(rows) % length
    voting = jnp.broadcast_to((positions % config.vote_stride == 0)[:, None], (blocks, ratio, length)).reshape(rows)
    least_voted = jnp.where(voting, least + math.log(config.vote_share), jnp.inf)
    every = config.vote_stride if length == config.chunk_size else 1  # a whole chunk's rows begin with one that votes

    def ask(tile: Array, first: Array) -> Array:
        begin = _tile_start(tile, step, total_pages)
        asking = jnp.where(scores[tile] >= least[..., None], row[:, None], length).reshape(kv_heads, blocks, -1, step).min(2).swapaxes(0, 1)
        before = lax.dynamic_slice_in_dim(first, begin, step, axis=2)
        return lax.dynamic_update_slice_in_dim(first, jnp.minimum(before, asking), begin, axis=2)

    def of_voters(x: Array) -> Float[Array, "K B G q n"]:
        return x.reshape(kv_heads, blocks, ratio, length, -1)[..., ::every, :]

    def vote(tile: Array, votes: Array) -> Array:
        begin = _tile_start(tile, step, total_pages)
        fresh = (of_voters(scores[tile]) >= of_voters(least_voted)).sum((2, 3)).swapaxes(0, 1)
        before = lax.dynamic_slice_in_dim(votes, begin, step, axis=2)
        return lax.dynamic_update_slice_in_dim(votes, before + fresh, begin, axis=2)

    first = lax.fori_loop(0, tiles, ask, varying_like(jnp.full((blocks, kv_heads, total_pages), length), query))
    votes = lax.fori_loop(0, tiles, vote, varying_like(jnp.zeros_like(first), query)) if config.counts_votes else None
    routed_mass = jnp.where(row_live, 1 - jnp.exp(window_mass - mass_unit), 0)
    by_block = (kv_heads, blocks, ratio * length)
    scores = scores.reshape(most_tiles, *by_block, step)
    return PageRequests(length, first, votes, scores, mass_unit.reshape(by_block), routed_mass.reshape(by_block))


def _tile_start(tile: Int[Array, "*n"], step: int, total_pages: int) -> Int[Array, "*n"]:
    """First page of a tile of `step` pages; the last tile reaches back so as to end with the pages."""
    return jnp.minimum(tile * step, total_pages - step)


def grant_remembered(
    requests: PageRequests, block: Int[Array, ""], own_chunk: Int[Array, ""], stamps: Int[Array, "K P"], *, config: HGAConfig
) -> Granted:
    """Pages requested by a row are open to all heads of its kv head, from that row to the end of the next chunk, as far as there is room.

    Where votes count, to the end of the own chunk, and with enough of them to all of the next. stamps: last chunk in which each page was
    requested, or what pallas_kernels.votes says, taken and returned. Strictly causal, and the same for a block of rows as for its rows one
    by one.
    """
    first = requests.first[block]
    kv_heads, _, rows = requests.mass_unit.shape
    length = requests.length
    capacity, votes = min(config.page_capacity, stamps.shape[1]), config.votes_for(rows // length)
    kept = carried = is_open(stamps, own_chunk, votes)
    if votes:  # they may keep more pages than there is room for
        carried = kept & (jnp.cumsum(kept, axis=-1) <= capacity)
    fresh = _grant(jnp.where(kept, length, first), capacity - carried.sum(-1), length)
    refused = jnp.sum(((first < length) | kept) & ~carried & ~fresh)
    if votes:
        new = requests.votes[block]
        after = stamp_of(own_chunk, kept | fresh, votes_in(stamps, own_chunk, votes) + new, votes)
        stamps = jnp.where((new > 0) | fresh, after, stamps)
    else:
        stamps = jnp.where((first < length) & (carried | fresh), own_chunk, stamps)

    # The open pages in order of their ids, without a sort: slot n holds the page at which the running count reaches n + 1.
    count = jnp.cumsum(carried | fresh, axis=-1)
    slot = jnp.arange(capacity)
    ids = jax.vmap(lambda running: jnp.searchsorted(running, slot + 1))(count)
    filled = slot < count[:, -1:]
    ids = jnp.where(filled, ids, 0)
    since = jnp.where(filled, jnp.take_along_axis(jnp.where(carried, 0, first), ids, axis=-1), length)
    used = count[:, -1].max()
    unopened = jnp.maximum(requests.routed_mass[:, block] - _opened_mass(requests, block, ids, since, used), 0)
    return Granted(Selection(ids[:, None], since[:, None], used), stamps, refused, unopened.sum() / (kv_heads * (rows // length)))


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
    requests: PageRequests, block: Int[Array, ""], ids: Int[Array, "K n"], since: Int[Array, "K n"], used: Int[Array, ""]
) -> Float[Array, "K r"]:
    """Estimated attention mass of the pages each row of a block sees."""
    length, rows = requests.length, requests.mass_unit.shape[2]
    unit, row = requests.mass_unit[:, block][:, None], jnp.arange(rows) % length
    step = requests.scores.shape[-1]
    tile = ids // step
    column = ids - _tile_start(tile, step, requests.first.shape[2])
    many = min(64, ids.shape[1])
    short = ((0, 0), (0, -ids.shape[1] % many))
    tile, column, since = jnp.pad(tile, short), jnp.pad(column, short), jnp.pad(since, short, constant_values=length)

    def add(i: Array, total: Array) -> Array:
        tiles, columns, seen = (lax.dynamic_slice_in_dim(x, i * many, many, axis=1) for x in (tile, column, since))
        heads = jnp.arange(len(ids))[:, None]
        mass = jnp.exp(requests.scores[tiles, heads, block, :, columns] - unit)  # [K, many, r]
        return total + jnp.where(seen[..., None] <= row, mass, 0).sum(1)

    return lax.fori_loop(0, -(-used // many), add, varying_like(jnp.zeros((len(ids), rows)), unit))
