"""The scan: every query against every page of the routed middle, in launches of one program per (row tile, block, kv head).

`scan_windows`: each row's exact window scores. `scan_pages`: every page once, newest first; a row judges each by the mass met so far, which
only grows, so that a page which nobody then asks for is settled. `scan_requests`: the others again, by all of the mass. `scan_votes`, where
votes count: every page again, for the few queries that vote.

Launches apart because of registers: two programs have to fit on a multiprocessor, or nothing hides what one of them waits for.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.sketch_prefill_routing.config import Config, Rule
from pallas_kernels.sketch_prefill_routing.kernel import (
    LOG2E,
    Probes,
    exp2,
    first_rows,
    launch,
    load_probes,
    log2_mass,
    none_dtype,
    page_scores,
    request_bound,
    routed_middle,
    row_tiles,
    window_mass,
)  # fmt: skip

LARGEST = 3e38  # a sum that float32 still holds


def _program(bounds_ref: Any, query_ref: Any, ratio: int, size: int, rule: Rule, few_ref: Any = None) -> tuple[Any, Any, Any, Probes]:
    """(row tile, block, kv head) of a program, long blocks first, and its rows."""
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    return tile, block, k, load_probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule, few_ref)


def _windows_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    pages_ref,  # [K, P, 2, g, H] exact keys and values
    window_ref,  # [K, B, rows] f32 out
    *,
    ratio: int,
    size: int,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    del tile_pages
    _, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule)

    @pl.when(probes.block_live)
    def _():
        windows = window_mass(probes, pages_ref, k, size, rule, interpret)
        plgpu.store(window_ref.at[outer(k, block, probes.row)], log2_mass(windows) / LOG2E, mask=probes.inside)


def how_many(rows_say: Bool[Array, "rows pages"]) -> Int[Array, " pages"]:
    """For how many rows it is so, of each page. They are counted in bytes, pages 8 apart side by side in a word, as each thread has them: a
    quarter of the words go from thread to thread.
    """
    rows, pages = rows_say.shape
    if rows >= 256 or pages % 32:
        return jnp.sum(rows_say.astype(jnp.int32), axis=0)
    byte = span(0, pages) // 8 % 4 * 8
    ones = jnp.where(rows_say, (1 << byte)[None, :], 0)
    counts = jnp.sum(jnp.sum(ones.reshape(rows, pages // 32, 4, 8), axis=2), axis=0)
    return (jnp.broadcast_to(counts[:, None, :], (pages // 32, 4, 8)).reshape(pages) >> byte) & 255


def _pages_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    window_ref,  # [K, B, rows] f32
    keys_ref,  # [K, parts, P, d] tokens of pages
    *refs,  # where d is not H: few [T, N, d], means [K, 1, P, H]
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    *refs, mass_ref, marks_ref = refs  # [K, B, rows] f32; [K, B, tiles, P]: 0 for a page that a row may ask for, chunk_size for others
    few_ref, means_ref = refs or (None, None)
    tile, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule, few_ref)

    @pl.when(probes.block_live)
    def _():
        first, end = routed_middle(probes.own_chunk, rule)

        def look(i: Any, total: Array) -> Array:
            page = end - (i + 1) * tile_pages + span(0, tile_pages)
            there = page >= first
            scores = page_scores(probes, keys_ref, None, None, k, page, there, rule, means_ref, interpret)
            scores = jnp.where(there[None, :], scores, -jnp.inf)
            total = jnp.minimum(total + jnp.sum(exp2(scores - window[:, None], interpret), axis=1), LARGEST)
            bound = jnp.where(probes.live, window + jnp.log2(total) + math.log2(threshold), jnp.inf)
            near = jnp.where(how_many(scores >= bound[:, None]) > 0, 0, rule.chunk_size)
            plgpu.store(marks_ref.at[outer(k, block, tile, page)], near.astype(marks_ref.dtype), mask=there)
            return total

        # Sums are in units of the windows' mass, not of the largest score met so far: float32 reaches from 2^126 below to 2^128 above it.
        window = plgpu.load(window_ref.at[outer(k, block, probes.row)], mask=probes.inside, other=0) * LOG2E
        total = jnp.ones((size,), jnp.float32)
        total = lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, look, total)
        mass = window + jnp.log2(total)
        plgpu.store(mass_ref.at[outer(k, block, probes.row)], mass / LOG2E, mask=probes.inside)


def _requests_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    keys_ref,  # [K, parts, P, d] tokens of pages
    mass_ref,  # [K, B, rows] f32
    _marks_ref,  # the buffer of the output, which holds the marks
    *refs,  # where d is not H: few [T, N, d], means [K, 1, P, H]
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    list_pages: int,
    interpret: bool,
):
    """The first row that asks for each page: among the marked ones, or, if there is no room for them, all."""
    *refs, first_ref, candidates_ref = refs  # [K, B, tiles, P]; [K, B, tiles, room] i32: the marked pages
    few_ref, means_ref = refs or (None, None)
    tile, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule, few_ref)
    none, room = rule.chunk_size, candidates_ref.shape[3]

    @pl.when(probes.block_live)
    def _():
        first, end = routed_middle(probes.own_chunk, rule)
        bound = request_bound(mass_ref, k, block, probes, threshold)
        step = min(list_pages, pl.next_power_of_2(first_ref.shape[3]))

        def collect(i: Any, found: Any) -> Any:
            page = first + i * step + span(0, step)
            marks = plgpu.load(first_ref.at[outer(k, block, tile, page)], mask=page < end, other=none)
            near = (marks.astype(jnp.int32) < none).astype(jnp.int32)
            slot = found + jnp.cumsum(near, axis=0) - 1
            put = (near > 0) & (slot < room)
            plgpu.store(candidates_ref.at[outer(k, block, tile, jnp.where(put, slot, room))], page, mask=put)
            return found + jnp.sum(near)

        found = lax.fori_loop(0, (end - first + step - 1) // step, collect, jnp.int32(0))
        if not interpret:
            plgpu.debug_barrier()  # other threads of the program read the candidates than wrote them
        everything = found > room
        wanted = jnp.where(everything, end - first, found)

        def request(i: Any, _: None) -> None:
            slot = span(i * tile_pages, tile_pages)
            there = slot < wanted
            listed = plgpu.load(candidates_ref.at[outer(k, block, tile, slot)], mask=there & (slot < room), other=0)
            page = jnp.where(everything, first + slot, listed)
            scores = page_scores(probes, keys_ref, None, None, k, page, there, rule, means_ref, interpret)
            rows = first_rows(scores, bound, None, probes, none)
            page = jnp.where(there, page, first_ref.shape[3])
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=there)

        lax.fori_loop(0, (wanted + tile_pages - 1) // tile_pages, request, None)


def _votes_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    keys_ref,  # [K, parts, P, d] tokens of pages
    mass_ref,  # [K, B, rows] f32, of the voters
    *refs,  # where d is not H: few [T, N, d], means [K, 1, P, H]
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    """How many of the rows give each page the threshold's share of their mass."""
    *refs, votes_ref = refs  # [K, B, tiles, P] out
    few_ref, means_ref = refs or (None, None)
    tile, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule, few_ref)

    @pl.when(probes.block_live)
    def _():
        first, end = routed_middle(probes.own_chunk, rule)
        bound = request_bound(mass_ref, k, block, probes, threshold)

        def count(i: Any, _: None) -> None:
            page = span(first + i * tile_pages, tile_pages)
            scores = page_scores(probes, keys_ref, None, None, k, page, page < end, rule, means_ref, interpret)
            cast = how_many(scores >= bound[:, None])
            plgpu.store(votes_ref.at[outer(k, block, tile, page)], cast.astype(votes_ref.dtype), mask=page < end)

        lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, count, None)


def mark(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    keys: Float[Array, "K parts P d"],
    few: Float[Array, "T N d"] | None = None,
    means: Float[Array, "K 1 P H"] | None = None,
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"], Int[Array, "K B tiles P"]]:
    """The masses of `scan`, and marks: 0 for pages that a row of a tile may ask for, chunk_size for others of the routed middle."""
    call, first = _launches(query, keys, rule, config, interpret)
    mass = jax.ShapeDtypeStruct((*first.shape[:2], rule.probes * query.shape[1] // first.shape[0]), jnp.float32)
    [window] = call(_windows_kernel, "scan_windows", [mass], [bounds, query, pages])
    kernel = partial(_pages_kernel, threshold=threshold)
    return window, *call(kernel, "scan_pages", [mass, first], [bounds, query, window, keys, few, means])


def settle(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    keys: Float[Array, "K parts P d"],
    mass: Float[Array, "K B r"],
    marks: Int[Array, "K B tiles P"],
    few: Float[Array, "T N d"] | None = None,
    means: Float[Array, "K 1 P H"] | None = None,
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> Int[Array, "K B tiles P"]:
    """First rows in place of marks."""
    call, first = _launches(query, keys, rule, config, interpret)
    candidates = jax.ShapeDtypeStruct((*first.shape[:3], min(config.candidates, first.shape[3])), jnp.int32)
    kernel = partial(_requests_kernel, threshold=threshold, list_pages=config.list_pages)
    return call(kernel, "scan_requests", [first, candidates], [bounds, query, keys, mass, marks, few, means], aliases={4: 0})[0]


def votes(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    keys: Float[Array, "K parts P d"],
    mass: Float[Array, "K B r"],
    few: Float[Array, "T N d"] | None = None,
    means: Float[Array, "K 1 P H"] | None = None,
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> Int[Array, "K B tiles P"]:
    """By row tile, how many (query, head) rows of each chunk give a page the threshold's share of their mass; rule.stride: who is asked.
    mass: as from `scan`, of those rows. What lies outside a block's routed middle is not written."""
    call, first = _launches(query, keys, rule, config, interpret)
    kernel, cast = partial(_votes_kernel, threshold=threshold), jax.ShapeDtypeStruct(first.shape, jnp.int16)
    return call(kernel, "scan_votes", [cast], [bounds, query, keys, mass, few, means])[0]


def _launches(
    query: Array, keys: Float[Array, "K parts P H"], rule: Rule, config: Config, interpret: bool
) -> tuple[Any, jax.ShapeDtypeStruct]:
    """How kernels are launched, and the shape of first rows."""
    kv_heads, parts, held, _ = keys.shape
    ratio = query.shape[1] // kv_heads
    first = jax.ShapeDtypeStruct((kv_heads, rule.blocks(query.shape[0]), row_tiles(rule, ratio, config)[0], held), none_dtype(rule))
    return partial(launch, parts=parts, rule=rule, config=config, interpret=interpret, ratio=ratio), first


def scan(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    keys: Float[Array, "K parts P d"],
    few: Float[Array, "T N d"] | None = None,
    means: Float[Array, "K 1 P H"] | None = None,
    **settings: Any,
) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"], Int[Array, "K B tiles P"]]:
    """Log of the summed exponentials of each row's exact window scores, and of those and all page scores together; and, by row tile, the
    first row of each chunk that asks for a page; what lies outside a block's routed middle is not written. few, means: where keys are
    deviations from their page's mean in few coordinates, the queries in those, and the means. settings: those of `mark`.
    """
    window, mass, marks = mark(query, bounds, pages, keys, few, means, **settings)
    return window, mass, settle(query, bounds, keys, mass, marks, few, means, **settings)
