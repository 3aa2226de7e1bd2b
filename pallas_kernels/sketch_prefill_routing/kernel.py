"""The scoring kernels: probe queries against pages, four ways, one program per (row tile, block, kv head).

A row is one head of one probing query; a block is one chunk of queries. A page's score is the largest of its `parts` vectors' dot products
with the row (16 sketched keys, or one mean plus so many standard deviations). The vectors are stored part-major, [K, parts, P, H], so that
the maximum is taken between accumulators: no shuffles.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.sketch_prefill_routing.config import Config, Rule, Tile
from pallas_kernels.sketch_prefill_routing.keys import PageKeys
from pallas_kernels.sketch_prefill_routing.sketches import TINY

LOG2E = math.log2(math.e)
LOWEST = -1e30  # in place of -inf where differences are taken
# Rounding of an 8-bit product, times the root of the head dimension: five standard deviations. Integers of a rotated row have a root mean
# square of about 42 (the largest of 128 Gaussian numbers lies 3 away), of a page's residuals 84, and each is rounded with 0.29.
ROUNDING = 136


def unsupported(query: Any, pages: Any, chunk_size: int, group_size: int) -> str | None:
    """Why the kernels cannot take these arrays (or shapes), or None."""
    if not (power_of_two(chunk_size) and power_of_two(group_size) and chunk_size >= 16):
        return f"{chunk_size=} and {group_size=} are not powers of two of at least 16 tokens a chunk"
    if query.dtype != pages.dtype or query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"queries are {query.dtype}, keys {pages.dtype}"
    if max(math.prod(query.shape), math.prod(pages.shape)) >= 2**31:
        return f"query {query.shape} or pages {pages.shape} exceed int32 offsets"
    return None


class _Probes(NamedTuple):
    """The rows of one program."""

    query: Array  # [rows, H padded]
    row: Array  # [rows] number in the block
    inside: Array  # [rows] whether the block has such a row
    position: Array  # [rows]
    offset: Array  # [rows] from the chunk's first position
    live: Array  # [rows] whether it is one of the queries
    own_chunk: Array
    block_live: Array


def row_tiles(rule: Rule, ratio: int, config: Config) -> tuple[int, int]:
    """(row tiles a block, rows a tile), where `ratio` query heads share a kv head."""
    rows = rule.probes * ratio
    size = max(16, min(config.rows, pl.next_power_of_2(rows)))
    return -(-rows // size), size


def _probes(tile: Any, block: Any, k: Any, bounds_ref: Any, query_ref: Any, ratio: int, size: int, rule: Rule) -> _Probes:
    first_position, count = bounds_ref[0], bounds_ref[1]
    own_chunk = first_position // rule.chunk_size + block
    row = span(tile * size, size)
    offset = row // ratio * rule.stride
    position = own_chunk * rule.chunk_size + offset
    index = position - first_position
    inside = row < rule.probes * ratio
    live = inside & (index >= 0) & (index < count)
    head_dim = query_ref.shape[2]
    dim = span(0, pl.next_power_of_2(head_dim))
    query = plgpu.load(
        query_ref.at[jnp.where(live, index, 0)[:, None], (k * ratio + row % ratio)[:, None], dim[None, :]],
        mask=live[:, None] & (dim < head_dim)[None, :],
        other=0,
    )
    return _Probes(query, row, inside, position, offset, live, own_chunk, own_chunk * rule.chunk_size < first_position + count)


def _exp2(x: Array, interpret: bool) -> Array:
    """In PTX because the compiler's exp2 takes four more instructions an element to keep denormals, which nothing here needs."""
    if interpret:
        return jnp.exp2(x)
    [out] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    )
    return out


def _dot(a: Array, b: Array) -> Array:
    """a @ b.T in float32; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _page_scores(probes: _Probes, keys_ref: Any, spreads_ref: Any, norm: Any, k: Any, page: Any, present: Any, rule: Rule) -> Array:
    """Scores [rows, pages] in powers of two."""
    parts, head_dim = keys_ref.shape[1], keys_ref.shape[3]
    dim = span(0, pl.next_power_of_2(head_dim))
    mask = present[:, None] & (dim < head_dim)[None, :]

    def products(part: Any) -> Array:
        return _dot(probes.query, plgpu.load(keys_ref.at[outer(k, part, page, dim)], mask=mask, other=0))

    best = products(0)
    if parts > 1:
        best = lax.fori_loop(1, parts, lambda j, best: jnp.maximum(best, products(j)), best)
    if spreads_ref is not None:
        best += norm[:, None] * plgpu.load(spreads_ref.at[k, page], mask=present, other=0)[None, :]
    return best * (rule.scale * LOG2E)


def _norm(probes: _Probes, spreads_ref: Any, rule: Rule) -> Any:
    if spreads_ref is None:
        return None
    wide = probes.query.astype(jnp.float32)
    return rule.spread * jnp.sqrt(jnp.sum(wide * wide, axis=1))


def _middle(own_chunk: Any, rule: Rule) -> tuple[Any, Any]:
    """First page of the routed middle and the page after its last."""
    first = rule.sink_chunks * rule.pages_per_chunk
    return first, jnp.maximum(own_chunk - rule.local_chunks, rule.sink_chunks) * rule.pages_per_chunk


def _add(carry: tuple[Array, Array], scores: Array, interpret: bool) -> tuple[Array, Array]:
    """(peak, sum of powers of two relative to it) of each row, with more scores."""
    peak, total = carry
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    return higher, total * jnp.exp2(peak - higher) + jnp.sum(_exp2(scores - higher[:, None], interpret), axis=1)


def _windows(probes: _Probes, pages_ref: Any, k: Any, size: int, rule: Rule, interpret: bool) -> tuple[Array, Array]:
    """The same of each row's exact scores over sinks, local window and own chunk."""
    head_dim = pages_ref.shape[4]
    dim = span(0, pl.next_power_of_2(head_dim))
    local = jnp.maximum(probes.own_chunk - rule.local_chunks, 0)
    sinks = jnp.minimum(rule.sink_chunks, local)

    def chunk_of_keys(i: Any, carry: tuple) -> tuple:
        chunk = jnp.where(i < sinks, i, local + i - sinks)
        token = span(0, rule.chunk_size)
        page, slot = chunk * rule.pages_per_chunk + token // rule.group_size, token % rule.group_size
        keys = plgpu.load(
            pages_ref.at[jnp.broadcast_to(k, (1, 1)), page[:, None], jnp.zeros((1, 1), jnp.int32), slot[:, None], dim[None, :]],
            mask=jnp.broadcast_to((dim < head_dim)[None, :], (rule.chunk_size, dim.shape[0])),
            other=0,
        )
        seen = (chunk * rule.chunk_size + token)[None, :] <= probes.position[:, None]
        return _add(carry, jnp.where(seen, _dot(probes.query, keys) * (rule.scale * LOG2E), -jnp.inf), interpret)

    start = (jnp.full((size,), LOWEST, jnp.float32), jnp.zeros((size,), jnp.float32))
    return lax.fori_loop(0, sinks + probes.own_chunk - local + 1, chunk_of_keys, start)


def _log2(mass: tuple[Array, Array]) -> Array:
    return mass[0] + jnp.log2(jnp.where(mass[1] > 0, mass[1], 1))


def _mass_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    pages_ref,  # [K, P, 2, g, H] exact keys and values
    means_ref,  # [K, 1, P, H]
    spreads_ref,  # [K, P] f32
    window_ref,  # [K, B, rows] f32 out
    mass_ref,  # [K, B, rows] f32 out
    first_ref,  # [K, B, tiles, P] out
    *,
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    probes = _probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)

    @pl.when(probes.block_live)
    def _():
        windows = _windows(probes, pages_ref, k, size, rule, interpret)
        bound = jnp.where(probes.live, _log2(windows) + math.log2(threshold), jnp.inf)
        norm = _norm(probes, spreads_ref, rule)
        first, end = _middle(probes.own_chunk, rule)

        def middle(i: Any, carry: tuple) -> tuple:
            page = span(first + i * tile_pages, tile_pages)
            scores = _page_scores(probes, means_ref, spreads_ref, norm, k, page, page < end, rule)
            rows = _first_rows(scores, bound, None, probes, rule.chunk_size)
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=page < end)
            return _add(carry, jnp.where((page < end)[None, :], scores, -jnp.inf), interpret)

        everything = lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, middle, windows)
        for ref, mass in ((window_ref, windows), (mass_ref, everything)):
            plgpu.store(ref.at[outer(k, block, probes.row)], _log2(mass) / LOG2E, mask=probes.inside)


def _bound(mass_ref: Any, k: Any, block: Any, probes: _Probes, threshold: float) -> Array:
    mass = plgpu.load(mass_ref.at[outer(k, block, probes.row)], mask=probes.inside, other=0)
    return jnp.where(probes.live, (mass + math.log(threshold)) * LOG2E, jnp.inf)


def _first_rows(scores: Array, bound: Array, allowed: Array | None, probes: _Probes, none: int) -> Array:
    """The first row of the chunk that asks for each page."""
    asking = scores >= bound[:, None]
    if allowed is not None:
        asking = asking & (allowed[None, :] <= probes.offset[:, None])
    return jnp.min(jnp.where(asking, probes.offset[:, None], none), axis=0)


def _scan_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    pages_ref,  # [K, P, 2, g, H] exact keys and values
    keys_ref,  # [K, parts, P, H] tokens of pages
    *refs,  # the fields of RoughKeys, if there are any (rotation: its transpose in two halves); then out
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    config: Config,
    interpret: bool,
):
    """Every page once, newest first: the mass, and which pages a row may ask for, judged by the mass met so far, which only grows. Those
    are scored again once all of it is known; if they are more than there is room for, every page is.

    out: window and mass [K, B, rows] f32, first [K, B, tiles, P], candidates [K, B, tiles, room] i32.
    """
    *rough_refs, window_ref, mass_ref, first_ref, candidates_ref = refs
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    probes = _probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)
    none, room = rule.chunk_size, candidates_ref.shape[3]

    def others_see_it() -> None:
        if not interpret:
            plgpu.debug_barrier()  # what is stored here other threads of the program read

    @pl.when(probes.block_live)
    def _():
        windows = _windows(probes, pages_ref, k, size, rule, interpret)
        first, end = _middle(probes.own_chunk, rule)

        def bound(mass: tuple[Array, Array]) -> Array:
            return jnp.where(probes.live, _log2(mass) + math.log2(threshold), jnp.inf)

        def look(page: Array, scores: Array, error: Array, mass: tuple) -> tuple:
            """error: by how much a row's exact scores may exceed these."""
            there = page >= first
            mass = _add(mass, jnp.where(there[None, :], scores, -jnp.inf), interpret)
            near = jnp.min(jnp.where(scores >= (bound(mass) - error)[:, None], 0, none), axis=0)
            plgpu.store(first_ref.at[outer(k, block, tile, page)], near.astype(first_ref.dtype), mask=there)
            return mass

        def exact(i: Any, mass: tuple) -> tuple:
            page = end - (i + 1) * tile_pages + span(0, tile_pages)
            scores = _page_scores(probes, keys_ref, None, None, k, page, page >= first, rule)
            return look(page, scores, jnp.zeros((size,), jnp.float32), mass)

        if rough_refs:
            *rough_keys, rotation_ref = rough_refs
            rows = _eight_bits(probes.query, rotation_ref)
            turns = ((end - first) // rule.pages_per_chunk + tile_pages - 1) // tile_pages * rule.pages_per_chunk

            def rough(i: Any, mass: tuple) -> tuple:
                return look(*_rough_scores(probes, *rows, *rough_keys, k, i, first, end, tile_pages, config.rough_tokens, rule), mass)

            mass = lax.fori_loop(0, turns, rough, windows)
        else:
            mass = lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, exact, windows)
        for ref, sums in ((window_ref, windows), (mass_ref, mass)):
            plgpu.store(ref.at[outer(k, block, probes.row)], _log2(sums) / LOG2E, mask=probes.inside)
        others_see_it()

        step = min(config.list_pages, pl.next_power_of_2(first_ref.shape[3]))

        def collect(i: Any, found: Any) -> Any:
            page = first + i * step + span(0, step)
            flags = plgpu.load(first_ref.at[outer(k, block, tile, page)], mask=page < end, other=none)
            near = (flags.astype(jnp.int32) < none).astype(jnp.int32)
            slot = found + jnp.cumsum(near, axis=0) - 1
            put = (near > 0) & (slot < room)
            plgpu.store(candidates_ref.at[outer(k, block, tile, jnp.where(put, slot, room))], page, mask=put)
            return found + jnp.sum(near)

        found = lax.fori_loop(0, (end - first + step - 1) // step, collect, jnp.int32(0))
        others_see_it()
        everything = found > room
        wanted = jnp.where(everything, end - first, found)
        final = bound(mass)

        def request(i: Any, _: None) -> None:
            slot = span(i * tile_pages, tile_pages)
            there = slot < wanted
            listed = plgpu.load(candidates_ref.at[outer(k, block, tile, slot)], mask=there & (slot < room), other=0)
            page = jnp.where(everything, first + slot, listed)
            scores = _page_scores(probes, keys_ref, None, None, k, page, there, rule)
            rows = _first_rows(scores, final, None, probes, none)
            page = jnp.where(there, page, first_ref.shape[3])
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=there)

        lax.fori_loop(0, (wanted + tile_pages - 1) // tile_pages, request, None)


def _rough_scores(
    probes: _Probes,
    row: Array,
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
    dim = span(0, pl.next_power_of_2(head_dim))
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
        product = lax.dot_general(row, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return product if tokens == 1 else jnp.max(product.reshape(row.shape[0], tokens, tile_chunks), axis=1)

    best = lax.fori_loop(1, group_size // tokens, lambda part, best: jnp.maximum(best, products(part)), products(0))
    step = plgpu.load(steps_ref.at[outer(k, page)], mask=there, other=0) * (rule.scale * LOG2E)
    means = plgpu.load(centres_ref.at[outer(k, chunk, dim)], mask=there[:, None] & (dim < head_dim)[None, :], other=0)
    centre = _dot(probes.query, means) * (rule.scale * LOG2E)
    scores = centre + best.astype(jnp.float32) * (unit[:, None] * step[None, :])
    return page, scores, (ROUNDING * math.sqrt(head_dim)) * unit * jnp.max(step)


def _eight_bits(query: Array, rotation_ref: Any) -> tuple[Array, Array]:
    """Rows of the rotated query as 8-bit integers, and what one is worth in each row."""
    head_dim = rotation_ref.shape[1]
    dim = span(0, query.shape[1])
    mask = (dim < head_dim)[:, None] & (dim < head_dim)[None, :]

    def product(half: int) -> Array:
        return _dot(query, plgpu.load(rotation_ref.at[outer(half, dim, dim)], mask=mask, other=0))

    rotated = product(0) + product(1)
    unit = jnp.maximum(jnp.max(jnp.abs(rotated), axis=1), TINY) / 127
    return jnp.floor(rotated / unit[:, None] + 0.5).astype(jnp.int32).astype(jnp.int8), unit


def _refine_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    pages_ref,  # [K, P, 2, g, H] exact keys and values
    keys_ref,  # [K, parts, P, H] tokens of pages
    means_ref,  # [K, 1, P, H] their means
    spreads_ref,  # [K, P] f32
    ids_ref,  # [K, B, M] i32 candidates
    since_ref,  # [K, B, M] i32
    counts_ref,  # [K, B] i32
    _empty_ref,  # the buffer of the output
    first_ref,  # [K, B, tiles, P] out
    *,
    ratio: int,
    size: int,
    threshold: float,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    """Requests among candidates: each row weighs its windows and the candidates it knows, then asks by their tokens."""
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    probes = _probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)
    count = counts_ref[k, block]

    @pl.when(probes.block_live & (count > 0))
    def _():
        norm = _norm(probes, spreads_ref, rule)

        def listed(i: Any) -> tuple[Array, Array, Array, Array]:
            slot = span(i * tile_pages, tile_pages)
            there = slot < count
            page = plgpu.load(ids_ref.at[outer(k, block, slot)], mask=there, other=0)
            since = plgpu.load(since_ref.at[outer(k, block, slot)], mask=there, other=rule.chunk_size)
            return there, page, since, (since[None, :] <= probes.offset[:, None]) & there[None, :]

        def weigh(i: Any, carry: tuple) -> tuple:
            there, page, _, seen = listed(i)
            scores = _page_scores(probes, means_ref, spreads_ref, norm, k, page, there, rule)
            return _add(carry, jnp.where(seen, scores, -jnp.inf), interpret)

        def request(i: Any, _: None) -> None:
            there, page, since, _ = listed(i)
            scores = _page_scores(probes, keys_ref, None, None, k, page, there, rule)
            rows = _first_rows(scores, bound, since, probes, rule.chunk_size)
            page = jnp.where(there, page, first_ref.shape[3])
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=there)

        steps = (count + tile_pages - 1) // tile_pages
        mass = lax.fori_loop(0, steps, weigh, _windows(probes, pages_ref, k, size, rule, interpret))
        bound = jnp.where(probes.live, _log2(mass) + math.log2(threshold), jnp.inf)
        lax.fori_loop(0, steps, request, None)


def _listed_mass_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    keys_ref,  # [K, parts, P, H]
    mass_ref,  # [K, B, rows] f32
    ids_ref,  # [K, B, M] i32
    since_ref,  # [K, B, M] i32
    counts_ref,  # [K, B] i32
    *refs,  # spreads [K, P] f32 (if pages are means), then out [K, B, rows] f32
    ratio: int,
    size: int,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    spreads_ref, out_ref = refs if len(refs) == 2 else (None, *refs)
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    probes = _probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)

    @pl.when(probes.block_live)
    def _():
        unit = _bound(mass_ref, k, block, probes, 1.0)
        norm = _norm(probes, spreads_ref, rule)
        count = counts_ref[k, block]

        def weigh(i: Any, total: Array) -> Array:
            slot = span(i * tile_pages, tile_pages)
            there = slot < count
            page = plgpu.load(ids_ref.at[outer(k, block, slot)], mask=there, other=0)
            since = plgpu.load(since_ref.at[outer(k, block, slot)], mask=there, other=rule.chunk_size)
            scores = _page_scores(probes, keys_ref, spreads_ref, norm, k, page, there, rule)
            seen = since[None, :] <= probes.offset[:, None]
            return total + jnp.sum(jnp.where(seen, _exp2(scores - unit[:, None], interpret), 0), axis=1)

        total = lax.fori_loop(0, (count + tile_pages - 1) // tile_pages, weigh, jnp.zeros((size,), jnp.float32))
        plgpu.store(out_ref.at[outer(k, block, probes.row)], total, mask=probes.inside)


def none_dtype(rule: Rule) -> Any:
    """What "first row that asks" is stored as; chunk_size itself stands for no row."""
    return jnp.int8 if rule.chunk_size < 128 else jnp.int32


def _call(
    kernel: Any,
    name: str,
    shapes: Any,
    operands: list[Array | None],
    parts: int,
    rule: Rule,
    config: Config,
    interpret: bool,
    aliases: dict[int, int] | None = None,
    tile: Tile | None = None,
    **settings: Any,
) -> Any:
    """One launch of a scoring kernel; operands that are None are left out. The first two are bounds and query. parts: vectors a page."""
    operands = [x for x in operands if x is not None]
    check_offsets(**{f"operand {i}": x for i, x in enumerate((*operands, *jax.tree.leaves(shapes)))})
    query, ratio = operands[1], settings["ratio"]
    tiles, size = row_tiles(rule, ratio, config)
    tile = tile or config.tile(parts)
    return pl.pallas_call(
        partial(kernel, size=size, rule=rule, tile_pages=tile.pages, interpret=interpret, **settings),
        grid=(tiles, rule.blocks(query.shape[0]), query.shape[1] // ratio),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=jax.tree.map(lambda _: pl.no_block_spec, shapes),
        out_shape=shapes,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )(*operands)


def probe_mass(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    means: Float[Array, "K 1 P H"],
    spreads: Float[Array, "K P"],
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"], Int[Array, "K B tiles P"]]:
    """Log of the summed exponentials of each probing row's exact window scores, and of those and all pages by means and spreads together;
    and the first row of each chunk for which a page reaches `threshold` of the windows' mass, by row tile. What lies outside a block's
    routed middle is not written.
    """
    ratio = query.shape[1] // means.shape[0]
    tiles, _ = row_tiles(rule, ratio, config)
    blocks = rule.blocks(query.shape[0])
    mass = jax.ShapeDtypeStruct((means.shape[0], blocks, rule.probes * ratio), jnp.float32)
    shapes = [mass, mass, jax.ShapeDtypeStruct((*mass.shape[:2], tiles, means.shape[2]), none_dtype(rule))]
    operands = [bounds, query, pages, means, spreads]
    settings = {"ratio": ratio, "threshold": threshold}
    return tuple(_call(_mass_kernel, "probe_mass", shapes, operands, means.shape[1], rule, config, interpret, **settings))


def _halves(matrix: Float[Array, "n m"], dtype: Any) -> Float[Array, "2 n m"]:
    """Two matrices of a narrower dtype that add up to it."""
    high = matrix.astype(dtype)
    return jnp.stack([high, (matrix - high.astype(jnp.float32)).astype(dtype)])


def scan(
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
    """Log of the summed exponentials of each row's exact window scores, and of those and all page scores together; and the first row of
    each chunk that asks for a page, by row tile; what lies outside a block's routed middle is not written.
    """
    kv_heads, ratio = keys.tokens.shape[0], query.shape[1] // keys.tokens.shape[0]
    tiles, _ = row_tiles(rule, ratio, config)
    blocks = rule.blocks(query.shape[0])
    mass = jax.ShapeDtypeStruct((kv_heads, blocks, rule.probes * ratio), jnp.float32)
    pages_held = keys.tokens.shape[2]
    first = jax.ShapeDtypeStruct((kv_heads, blocks, tiles, pages_held), none_dtype(rule))
    candidates = jax.ShapeDtypeStruct((kv_heads, blocks, tiles, min(config.candidates, pages_held)), jnp.int32)
    shapes = [mass, mass, first, candidates]
    rough = () if keys.rough is None else (*keys.rough[:-1], _halves(keys.rough.rotation.T, query.dtype))
    operands = [bounds, query, pages, keys.tokens, *rough]
    tile = config.tokens if keys.rough is None else config.rough
    settings = {"ratio": ratio, "threshold": threshold, "tile": tile}
    out = _call(
        partial(_scan_kernel, config=config), "scan_requests", shapes, operands, keys.tokens.shape[1], rule, config, interpret, **settings
    )
    return tuple(out[:3])


def refine(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    pages: Float[Array, "K P 2 g H"],
    keys: PageKeys,
    ids: Int[Array, "K B M"],
    since: Int[Array, "K B M"],
    counts: Int[Array, "K B"],
    *,
    threshold: float,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> Int[Array, "K B tiles P"]:
    """The first row of each chunk that asks for a page among its candidates, by row tile; chunk_size for all others.

    A row knows the candidates whose `since` it has reached. It asks for those that hold, by their tokens, the threshold's share of the mass
    of its exact windows and of all candidates it knows, the latter by their means and spreads.
    """
    ratio = query.shape[1] // keys.tokens.shape[0]
    tiles, _ = row_tiles(rule, ratio, config)
    empty = jnp.full((*counts.shape, tiles, keys.tokens.shape[2]), rule.chunk_size, none_dtype(rule))
    operands = [bounds, query, pages, keys.tokens, keys.means, keys.spreads, ids, since, counts, empty]
    shape = jax.ShapeDtypeStruct(empty.shape, empty.dtype)
    settings = {"ratio": ratio, "threshold": threshold, "aliases": {9: 0}}
    return _call(_refine_kernel, "refine_candidates", shape, operands, keys.tokens.shape[1], rule, config, interpret, **settings)


def listed_mass(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    keys: Float[Array, "K parts P H"],
    spreads: Float[Array, "K P"] | None,
    mass: Float[Array, "K B r"],
    ids: Int[Array, "K B M"],
    since: Int[Array, "K B M"],
    counts: Int[Array, "K B"],
    *,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> Float[Array, "K B r"]:
    """The share of each probing row's mass that lies in the listed pages it sees."""
    ratio = query.shape[1] // keys.shape[0]
    operands = [bounds, query, keys, mass, ids, since, counts, spreads]
    shape = jax.ShapeDtypeStruct(mass.shape, jnp.float32)
    return _call(_listed_mass_kernel, "listed_mass", shape, operands, keys.shape[1], rule, config, interpret, ratio=ratio)
