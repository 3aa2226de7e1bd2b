"""The scan: every query against every page of the routed middle, in three launches of one program per (row tile, block, kv head).

`scan_windows`: each row's exact window scores. `scan_pages`: every page once, newest first; a row judges each by the mass met so far, which
only grows, so that a page which nobody then asks for is settled. `scan_requests`: the others again, by all of the mass.

Three launches because of registers: two programs have to fit on a multiprocessor, or nothing hides what one of them waits for.
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
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.sketch_prefill_routing.config import Config, Rule
from pallas_kernels.sketch_prefill_routing.kernel import (
    LOG2E,
    Probes,
    add_scores,
    first_rows,
    launch,
    load_probes,
    log2_mass,
    none_dtype,
    page_scores,
    product,
    request_bound,
    routed_middle,
    row_tiles,
    window_mass,
)  # fmt: skip
from pallas_kernels.sketch_prefill_routing.keys import PageKeys
from pallas_kernels.sketch_prefill_routing.sketches import TINY

# Rounding of an 8-bit product, times the root of the head dimension: five standard deviations. Integers of a rotated row have a root mean
# square of about 42 (the largest of 128 Gaussian numbers lies 3 away), of a page's residuals 84, and each is rounded with 0.29.
ROUNDING = 136


def _program(bounds_ref: Any, query_ref: Any, ratio: int, size: int, rule: Rule) -> tuple[Any, Any, Any, Probes]:
    """(row tile, block, kv head) of a program, long blocks first, and its rows."""
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    return tile, block, k, load_probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)


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


def _eight_bits(query: Array, rotation_ref: Any) -> tuple[Array, Array]:
    """Rows of the rotated query as 8-bit integers, and what one is worth in each row."""
    head_dim = rotation_ref.shape[0]
    dim = span(0, query.shape[1])
    mask = (dim < head_dim)[:, None] & (dim < head_dim)[None, :]
    rotated = product(query, plgpu.load(rotation_ref.at[outer(dim, dim)], mask=mask, other=0))
    unit = jnp.maximum(jnp.max(jnp.abs(rotated), axis=1), TINY) / 127
    return jnp.floor(rotated / unit[:, None] + 0.5).astype(jnp.int32).astype(jnp.int8), unit


def _pages_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    window_ref,  # [K, B, rows] f32
    *refs,  # tokens [K, parts, P, H], or the fields of RoughKeys (of the rotation the transpose); then out
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    tokens_at_once: int,
    interpret: bool,
):
    """out: mass [K, B, rows] f32; marks [K, B, tiles, P]: 0 for a page that a row may ask for, chunk_size for others."""
    *keys_refs, mass_ref, marks_ref = refs
    tile, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule)

    @pl.when(probes.block_live)
    def _():
        first, end = routed_middle(probes.own_chunk, rule)

        def look(page: Array, scores: Array, error: Any, mass: tuple) -> tuple:
            """error: by how much a row's exact scores may exceed these."""
            there = page >= first
            mass = add_scores(mass, jnp.where(there[None, :], scores, -jnp.inf), interpret)
            bound = jnp.where(probes.live, log2_mass(mass) + math.log2(threshold) - error, jnp.inf)
            near = jnp.min(jnp.where(scores >= bound[:, None], 0, rule.chunk_size), axis=0)
            plgpu.store(marks_ref.at[outer(k, block, tile, page)], near.astype(marks_ref.dtype), mask=there)
            return mass

        def exact(i: Any, mass: tuple) -> tuple:
            page = end - (i + 1) * tile_pages + span(0, tile_pages)
            return look(page, page_scores(probes, keys_refs[0], None, None, k, page, page >= first, rule), 0.0, mass)

        window = plgpu.load(window_ref.at[outer(k, block, probes.row)], mask=probes.inside, other=0)
        mass = window * LOG2E, jnp.full((size,), 1, jnp.float32)
        if len(keys_refs) > 1:
            *rough_refs, rotation_ref = keys_refs
            rounded, unit = _eight_bits(probes.query, rotation_ref)
            turns = ((end - first) // rule.pages_per_chunk + tile_pages - 1) // tile_pages * rule.pages_per_chunk

            def rough(i: Any, mass: tuple) -> tuple:
                page, scores, error = _rough_scores(
                    probes.query, rounded, unit, *rough_refs, k, i, first, end, tile_pages, tokens_at_once, rule
                )  # fmt: skip
                return look(page, scores, error, mass)

            mass = lax.fori_loop(0, turns, rough, mass)
        else:
            mass = lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, exact, mass)
        plgpu.store(mass_ref.at[outer(k, block, probes.row)], log2_mass(mass) / LOG2E, mask=probes.inside)


def _rough_scores(
    query: Array,
    rounded: Array,
    unit: Array,
    residuals_ref: Any,
    steps_ref: Any,
    centres_ref: Any,
    k: Any,
    i: Any,
    first: Any,
    end: Any,
    tile_chunks: int,
    tokens: int,
    rule: Rule,
) -> tuple[Array, Array, Array]:
    """Pages, scores by 8-bit products and how much those may be off, of the pages at one place of neighbouring chunks."""
    head_dim, per_chunk, group_size = residuals_ref.shape[3], rule.pages_per_chunk, rule.group_size
    tokens = min(tokens, group_size)
    dim = span(0, query.shape[1])
    turn = i // per_chunk
    place = i - turn * per_chunk
    begin = end // per_chunk - (turn + 1) * tile_chunks
    chunk = begin + span(0, tile_chunks)
    page = chunk * per_chunk + place
    there = page >= first
    column = span(0, tokens * tile_chunks)  # of one product: `tokens` tokens of a page, whose maximum needs no other thread
    token_of = column // tile_chunks
    chunk_of = begin + column - token_of * tile_chunks
    mask = (chunk_of * per_chunk >= first)[:, None] & (dim < head_dim)[None, :]

    def products(part: Any) -> Array:
        token = place * group_size + part * tokens + token_of
        at = (jnp.broadcast_to(k, (1, 1)), token[:, None], chunk_of[:, None], dim[None, :])
        keys = plgpu.load(residuals_ref.at[at], mask=mask, other=0)
        product = lax.dot_general(rounded, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return product if tokens == 1 else jnp.max(product.reshape(rounded.shape[0], tokens, tile_chunks), axis=1)

    means = plgpu.load(centres_ref.at[outer(k, chunk, dim)], mask=there[:, None] & (dim < head_dim)[None, :], other=0)
    lowest = jnp.full((rounded.shape[0], tile_chunks), -(2**31), jnp.int32)
    best = lax.fori_loop(0, group_size // tokens, lambda part, best: jnp.maximum(best, products(part)), lowest)
    step = plgpu.load(steps_ref.at[outer(k, page)], mask=there, other=0) * (rule.scale * LOG2E)
    scores = product(query, means) * (rule.scale * LOG2E) + best.astype(jnp.float32) * (unit[:, None] * step[None, :])
    return page, scores, unit * (ROUNDING * math.sqrt(head_dim) * jnp.max(step))


def _requests_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    keys_ref,  # [K, parts, P, H] tokens of pages
    mass_ref,  # [K, B, rows] f32
    _marks_ref,  # the buffer of the output, which holds the marks
    first_ref,  # [K, B, tiles, P] out
    candidates_ref,  # [K, B, tiles, room] i32 out: the marked pages
    *,
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    list_pages: int,
    interpret: bool,
):
    """The first row that asks for each page: among the marked ones, or, if they are more than there is room for, all."""
    tile, block, k, probes = _program(bounds_ref, query_ref, ratio, size, rule)
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
            scores = page_scores(probes, keys_ref, None, None, k, page, there, rule)
            rows = first_rows(scores, bound, None, probes, none)
            page = jnp.where(there, page, first_ref.shape[3])
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=there)

        lax.fori_loop(0, (wanted + tile_pages - 1) // tile_pages, request, None)


def mark(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    keys: PageKeys,
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"], Int[Array, "K B tiles P"]]:
    """The masses of `scan`, and marks: 0 for the pages that a row of a tile may ask for, chunk_size for others of the routed middle."""
    call, first = _launches(query, keys, rule, config, interpret)
    mass = jax.ShapeDtypeStruct((*first.shape[:2], rule.probes * query.shape[1] // first.shape[0]), jnp.float32)
    [window] = call(_windows_kernel, "scan_windows", [mass], [bounds, query, pages])
    scanned, tile = [keys.tokens], config.tokens
    if keys.rough is not None:  # the rotation's own rounding adds nothing to that of its products
        scanned, tile = [*keys.rough[:-1], keys.rough.rotation.T.astype(query.dtype)], config.rough
    kernel = partial(_pages_kernel, threshold=threshold, tokens_at_once=config.rough_tokens)
    return window, *call(kernel, "scan_pages", [mass, first], [bounds, query, window, *scanned], tile=tile)


def settle(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    keys: PageKeys,
    mass: Float[Array, "K B r"],
    marks: Int[Array, "K B tiles P"],
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
    return call(kernel, "scan_requests", [first, candidates], [bounds, query, keys.tokens, mass, marks], aliases={4: 0})[0]


def _launches(query: Array, keys: PageKeys, rule: Rule, config: Config, interpret: bool) -> tuple[Any, jax.ShapeDtypeStruct]:
    """How kernels are launched, and the shape of first rows."""
    kv_heads, parts, held, _ = keys.tokens.shape
    ratio = query.shape[1] // kv_heads
    first = jax.ShapeDtypeStruct((kv_heads, rule.blocks(query.shape[0]), row_tiles(rule, ratio, config)[0], held), none_dtype(rule))
    return partial(launch, parts=parts, rule=rule, config=config, interpret=interpret, ratio=ratio), first


def scan(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    keys: PageKeys,
    **settings: Any,
) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"], Int[Array, "K B tiles P"]]:
    """Log of the summed exponentials of each row's exact window scores, and of those and all page scores together; and the first row of
    each chunk that asks for a page, by row tile; what lies outside a block's routed middle is not written. settings: those of `mark`.
    """
    window, mass, marks = mark(query, bounds, pages, keys, **settings)
    return window, mass, settle(query, bounds, keys, mass, marks, **settings)
