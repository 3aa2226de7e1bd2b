"""The scoring kernels: probe queries against pages, several ways, one program per (row tile, block, kv head).

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
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.sketch_prefill_routing.config import Config, Rule
from pallas_kernels.sketch_prefill_routing.keys import PageKeys

LOG2E = math.log2(math.e)
LOWEST = -1e30  # in place of -inf where differences are taken
JOINED = 256, 16384  # columns, and bytes of keys, in one product of few coordinates


def unsupported(query: Any, pages: Any, chunk_size: int, group_size: int) -> str | None:
    """Why the kernels cannot take these arrays (or shapes), or None."""
    if not (power_of_two(chunk_size) and power_of_two(group_size) and chunk_size >= 16):
        return f"{chunk_size=} and {group_size=} are not powers of two of at least 16 tokens a chunk"
    if query.dtype != pages.dtype or query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"queries are {query.dtype}, keys {pages.dtype}"
    if max(math.prod(query.shape), math.prod(pages.shape)) >= 2**31:
        return f"query {query.shape} or pages {pages.shape} exceed int32 offsets"
    return None


class Probes(NamedTuple):
    """The rows of one program."""

    query: Array  # [rows, H padded]
    few: Array | None  # [rows, d padded] the coordinates that tokens are scored in, where they are fewer
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


def load_probes(
    tile: Any, block: Any, k: Any, bounds_ref: Any, query_ref: Any, ratio: int, size: int, rule: Rule, few_ref: Any = None
) -> Probes:
    first_position, count = bounds_ref[0], bounds_ref[1]
    own_chunk = first_position // rule.chunk_size + block
    row = span(tile * size, size)
    offset = row // ratio * rule.stride
    position = own_chunk * rule.chunk_size + offset
    index = position - first_position
    inside = row < rule.probes * ratio
    live = inside & (index >= 0) & (index < count)

    def rows_of(ref: Any) -> Array:
        dim = padded(ref)
        at = jnp.where(live, index, 0)[:, None], (k * ratio + row % ratio)[:, None], dim[None, :]
        return _load(ref.at[at], live[:, None] & (dim < ref.shape[2])[None, :])

    few = None if few_ref is None else rows_of(few_ref)
    return Probes(
        rows_of(query_ref), few, row, inside, position, offset, live, own_chunk, own_chunk * rule.chunk_size < first_position + count
    )


def padded(ref: Any) -> Array:
    """Coordinates of an array's rows, up to what a matmul takes; float8 comes padded."""
    return span(0, max(16, pl.next_power_of_2(ref.shape[-1])))


def _load(at: Any, mask: Array) -> Array:
    """Zero where masked; anything in float8, where only rows and pages are masked whose scores nobody looks at."""
    return plgpu.load(at, mask=mask) if at.dtype == jnp.float8_e4m3fn else plgpu.load(at, mask=mask, other=0)


def exp2(x: Array, interpret: bool) -> Array:
    """In PTX because the compiler's exp2 takes four more instructions an element to keep denormals, which nothing here needs."""
    if interpret:
        return jnp.exp2(x)
    [out] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    )
    return out


def product(a: Array, b: Array, dtype: Any = jnp.float32) -> Array:
    """a @ b.T in `dtype`; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)


def page_scores(
    probes: Probes,
    keys_ref: Any,
    spreads_ref: Any,
    norm: Any,
    k: Any,
    page: Any,
    present: Any,
    rule: Rule,
    means_ref: Any = None,
    interpret: bool = False,
) -> Array:
    """Scores [rows, pages] in powers of two. means_ref: where tokens are deviations from it in few coordinates, each page's mean."""
    scale = rule.scale * LOG2E

    def products(query: Array, ref: Any, part: Any) -> Array:
        dim = padded(ref)
        return product(query, _load(ref.at[outer(k, part, page, dim)], present[:, None] & (dim < ref.shape[3])[None, :]))

    if means_ref is not None:
        deviations = best_deviations(probes.few, keys_ref, k, page, present)
        return _multiply_add(products(probes.query, means_ref, 0), scale, deviations, interpret)
    best = products(probes.query, keys_ref, 0)
    if keys_ref.shape[1] > 1:
        best = lax.fori_loop(1, keys_ref.shape[1], lambda j, best: jnp.maximum(best, products(probes.query, keys_ref, j)), best)
    if spreads_ref is not None:
        best += norm[:, None] * plgpu.load(spreads_ref.at[k, page], mask=present, other=0)[None, :]
    return best * scale


def _multiply_add(a: Array, factor: float, b: Array, interpret: bool) -> Array:
    """a * factor + b, which the compiler makes two instructions of."""
    if interpret:
        return a * factor + b
    bits = np.float32(factor).view(np.uint32)
    [out] = plgpu.elementwise_inline_asm(
        f"fma.rn.f32 $0, $1, 0f{bits:08X}, $2;",
        args=[a, b],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )
    return out


def best_deviations(few: Array, keys_ref: Any, k: Any, page: Any, present: Any) -> Array:
    """The largest of each page's products, float32 [rows, pages].

    With few coordinates the products are cheap and what waits for them is not: several vectors of a page go into one. Sums in float16 take
    half the registers, and the maximum half the instructions.
    """
    parts, pages, dim = keys_ref.shape[1], page.shape[0], padded(keys_ref)
    kind = jnp.float32 if few.dtype == jnp.float32 else jnp.float16
    columns = min(JOINED[0], JOINED[1] // (dim.shape[0] * few.dtype.itemsize))
    joined = math.gcd(parts, max(1, columns // pages)) if kind == jnp.float16 else 1

    def each(x: Array) -> Array:
        return jnp.broadcast_to(x, (joined, pages)).reshape(joined * pages)

    slot, held, part = each(page[None, :]), each(present[None, :].astype(jnp.int32)) > 0, each(span(0, joined)[:, None])

    def look(j: Any, best: Array) -> Array:
        at = jnp.broadcast_to(k, (1, 1)), (j * joined + part)[:, None], slot[:, None], dim[None, :]
        some = product(few, _load(keys_ref.at[at], held[:, None] & (dim < keys_ref.shape[3])[None, :]), kind)
        return jnp.maximum(best, jnp.max(some.reshape(-1, joined, pages), axis=1) if joined > 1 else some)

    lowest = jnp.full((few.shape[0], pages), -jnp.inf, kind)
    return lax.fori_loop(0, parts // joined, look, lowest).astype(jnp.float32)


def _norm(probes: Probes, spreads_ref: Any, rule: Rule) -> Any:
    if spreads_ref is None:
        return None
    wide = probes.query.astype(jnp.float32)
    return rule.spread * jnp.sqrt(jnp.sum(wide * wide, axis=1))


def routed_middle(own_chunk: Any, rule: Rule) -> tuple[Any, Any]:
    """First page of the routed middle and the page after its last."""
    first = rule.sink_chunks * rule.pages_per_chunk
    return first, jnp.maximum(own_chunk - rule.local_chunks, rule.sink_chunks) * rule.pages_per_chunk


def add_scores(carry: tuple[Array, Array], scores: Array, interpret: bool) -> tuple[Array, Array]:
    """(peak, sum of powers of two relative to it) of each row, with more scores."""
    peak, total = carry
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    return higher, total * jnp.exp2(peak - higher) + jnp.sum(exp2(scores - higher[:, None], interpret), axis=1)


def window_mass(probes: Probes, pages_ref: Any, k: Any, size: int, rule: Rule, interpret: bool) -> tuple[Array, Array]:
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
        return add_scores(carry, jnp.where(seen, product(probes.query, keys) * (rule.scale * LOG2E), -jnp.inf), interpret)

    start = (jnp.full((size,), LOWEST, jnp.float32), jnp.zeros((size,), jnp.float32))
    return lax.fori_loop(0, sinks + probes.own_chunk - local + 1, chunk_of_keys, start)


def log2_mass(mass: tuple[Array, Array]) -> Array:
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
    probes = load_probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)

    @pl.when(probes.block_live)
    def _():
        windows = window_mass(probes, pages_ref, k, size, rule, interpret)
        bound = jnp.where(probes.live, log2_mass(windows) + math.log2(threshold), jnp.inf)
        norm = _norm(probes, spreads_ref, rule)
        first, end = routed_middle(probes.own_chunk, rule)

        def middle(i: Any, carry: tuple) -> tuple:
            page = span(first + i * tile_pages, tile_pages)
            scores = page_scores(probes, means_ref, spreads_ref, norm, k, page, page < end, rule)
            rows = first_rows(scores, bound, None, probes, rule.chunk_size)
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=page < end)
            return add_scores(carry, jnp.where((page < end)[None, :], scores, -jnp.inf), interpret)

        everything = lax.fori_loop(0, (end - first + tile_pages - 1) // tile_pages, middle, windows)
        for ref, mass in ((window_ref, windows), (mass_ref, everything)):
            plgpu.store(ref.at[outer(k, block, probes.row)], log2_mass(mass) / LOG2E, mask=probes.inside)


def request_bound(mass_ref: Any, k: Any, block: Any, probes: Probes, threshold: float) -> Array:
    mass = plgpu.load(mass_ref.at[outer(k, block, probes.row)], mask=probes.inside, other=0)
    return jnp.where(probes.live, (mass + math.log(threshold)) * LOG2E, jnp.inf)


def first_rows(scores: Array, bound: Array, allowed: Array | None, probes: Probes, none: int) -> Array:
    """The first row of the chunk that asks for each page."""
    asking = scores >= bound[:, None]
    if allowed is not None:
        asking = asking & (allowed[None, :] <= probes.offset[:, None])
    return jnp.min(jnp.where(asking, probes.offset[:, None], none), axis=0)


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
    probes = load_probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule)
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
            scores = page_scores(probes, means_ref, spreads_ref, norm, k, page, there, rule)
            return add_scores(carry, jnp.where(seen, scores, -jnp.inf), interpret)

        def request(i: Any, _: None) -> None:
            there, page, since, _ = listed(i)
            scores = page_scores(probes, keys_ref, None, None, k, page, there, rule)
            rows = first_rows(scores, bound, since, probes, rule.chunk_size)
            page = jnp.where(there, page, first_ref.shape[3])
            plgpu.store(first_ref.at[outer(k, block, tile, page)], rows.astype(first_ref.dtype), mask=there)

        steps = (count + tile_pages - 1) // tile_pages
        mass = lax.fori_loop(0, steps, weigh, window_mass(probes, pages_ref, k, size, rule, interpret))
        bound = jnp.where(probes.live, log2_mass(mass) + math.log2(threshold), jnp.inf)
        lax.fori_loop(0, steps, request, None)


def _listed_mass_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    query_ref,  # [T, N, H]
    keys_ref,  # [K, parts, P, H]
    mass_ref,  # [K, B, rows] f32
    ids_ref,  # [K, B, M] i32
    since_ref,  # [K, B, M] i32
    counts_ref,  # [K, B] i32
    *refs,  # spreads [K, P] f32 if pages are means; few [T, N, d] and means [K, 1, P, H] if tokens are scored in few coordinates
    ratio: int,
    size: int,
    rule: Rule,
    tile_pages: int,
    interpret: bool,
):
    *refs, out_ref = refs  # [K, B, rows] f32
    spreads_ref, few_ref, means_ref = {0: (None, None, None), 1: (*refs, None, None), 2: (None, *refs)}[len(refs)]
    tile, block, k = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    probes = load_probes(tile, block, k, bounds_ref, query_ref, ratio, size, rule, few_ref)

    @pl.when(probes.block_live)
    def _():
        unit = request_bound(mass_ref, k, block, probes, 1.0)
        norm = _norm(probes, spreads_ref, rule)
        count = counts_ref[k, block]

        def weigh(i: Any, total: Array) -> Array:
            slot = span(i * tile_pages, tile_pages)
            there = slot < count
            page = plgpu.load(ids_ref.at[outer(k, block, slot)], mask=there, other=0)
            since = plgpu.load(since_ref.at[outer(k, block, slot)], mask=there, other=rule.chunk_size)
            scores = page_scores(probes, keys_ref, spreads_ref, norm, k, page, there, rule, means_ref, interpret)
            seen = since[None, :] <= probes.offset[:, None]
            return total + jnp.sum(jnp.where(seen, exp2(scores - unit[:, None], interpret), 0), axis=1)

        total = lax.fori_loop(0, (count + tile_pages - 1) // tile_pages, weigh, jnp.zeros((size,), jnp.float32))
        plgpu.store(out_ref.at[outer(k, block, probes.row)], total, mask=probes.inside)


def none_dtype(rule: Rule) -> Any:
    """What "first row that asks" is stored as; chunk_size itself stands for no row."""
    return jnp.int8 if rule.chunk_size < 128 else jnp.int32


def launch(
    kernel: Any,
    name: str,
    shapes: Any,
    operands: list[Array | None],
    parts: int,
    rule: Rule,
    config: Config,
    interpret: bool,
    aliases: dict[int, int] | None = None,
    **settings: Any,
) -> Any:
    """One launch of a scoring kernel; operands that are None are left out. The first two are bounds and query. parts: vectors a page."""
    operands = [x for x in operands if x is not None]
    check_offsets(**{f"operand {i}": x for i, x in enumerate((*operands, *jax.tree.leaves(shapes)))})
    query, ratio = operands[1], settings["ratio"]
    tiles, size = row_tiles(rule, ratio, config)
    tile = config.tile(parts)
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
    return tuple(launch(_mass_kernel, "probe_mass", shapes, operands, means.shape[1], rule, config, interpret, **settings))


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
    return launch(_refine_kernel, "refine_candidates", shape, operands, keys.tokens.shape[1], rule, config, interpret, **settings)


def listed_mass(
    query: Float[Array, "T N H"],
    bounds: Int[Array, " 2"],
    keys: Float[Array, "K parts P d"],
    spreads: Float[Array, "K P"] | None,
    mass: Float[Array, "K B r"],
    ids: Int[Array, "K B M"],
    since: Int[Array, "K B M"],
    counts: Int[Array, "K B"],
    few: Float[Array, "T N d"] | None = None,
    means: Float[Array, "K 1 P H"] | None = None,
    *,
    rule: Rule,
    config: Config,
    interpret: bool,
) -> Float[Array, "K B r"]:
    """The share of each probing row's mass that lies in the listed pages it sees."""
    ratio = query.shape[1] // keys.shape[0]
    operands = [bounds, query, keys, mass, ids, since, counts, spreads, few, means]
    shape = jax.ShapeDtypeStruct(mass.shape, jnp.float32)
    return launch(_listed_mass_kernel, "listed_mass", shape, operands, keys.shape[1], rule, config, interpret, ratio=ratio)
