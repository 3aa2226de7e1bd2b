"""Three kernels: what the scan needs of a query, the scan over the packed codes (group scores, partial softmax sums), the selection.

Byte b of a token's codes holds dimensions b, B+b, 2B+b, 3B+b (B = H/4; dimension jB+b in bits 2j, 2j+1), so that unpacking code j of all
bytes gives a contiguous quarter of the head: four matrix products with quarters of the query and no shuffles. The two level magnitudes have
the ratio 944/283, both exact in float16, and the query goes in as float16 high + low halves in neighbouring rows of one product: the scores
are float32-exact to about 2e-6 at the tensor cores' price of float16. Tokens are the columns of the product: the compiler then takes the
codes as they are to where the tensor cores want them, unpacks them in registers, and finds the tokens of a group in few threads.
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
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.sketch_routing.config import Config
from pallas_kernels.votes import is_open, never, stamp_of, votes_in

INNER, OUTER = 849 / 512, 2832 / 512  # 0.4528 and 1.5104, the Lloyd-Max levels of a unit Gaussian, over LEVEL_UNIT
LEVEL_UNIT = 0.4528 / INNER
_INNER_BITS, _OUTER_BITS = (int(np.float16(level).view(np.uint16)) for level in (INNER, OUTER))
_SIGN = 0x8000
ROWS = 16  # of a matrix product: the fewest the tensor cores take
MEAN_CHUNKS = 32  # chunks whose means one preparing program multiplies


def _unpack_arithmetic(codes: Array, quarter: int) -> Array:
    """The level of code `quarter` of each byte over LEVEL_UNIT, float16."""
    field = codes.astype(jnp.int32) >> (2 * quarter)
    outer = 1 - ((field ^ (field >> 1)) & 1)
    bits = (_INNER_BITS + outer * (_OUTER_BITS - _INNER_BITS)) | (((field & 2) ^ 2) << 14)
    return lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)


def _unpack_asm(codes: Array, quarter: int) -> Array:
    """The same for four bytes in one register.

    `prmt` picks four of the eight bytes in two registers, and two registers hold the four levels: code c picks bytes 2c and 2c + 1, that is
    0x22 c + 0x10 as a pair of selectors.
    """
    low = (_OUTER_BITS | _SIGN) | (_INNER_BITS | _SIGN) << 16
    high = _INNER_BITS | _OUTER_BITS << 16
    field = f"shr.u32 t, $2, {2 * quarter}; and.b32 t, t, 0x03030303;" if quarter else "and.b32 t, $2, 0x03030303;"
    asm = f"""{{ .reg .b32 t;
        {field}
        mad.lo.u32 t, t, 0x22, 0x10101010;
        prmt.b32 $0, {low}, {high}, t;
        shr.u32 t, t, 16;
        prmt.b32 $1, {low}, {high}, t; }}"""
    [levels] = plgpu.elementwise_inline_asm(
        asm, args=[codes], constraints="=r,=r,r", pack=4, result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.float16)]
    )
    return levels


def scan_program(
    k,  # kv head
    program,  # of so many programs of this kv head
    programs: int,
    rotated_ref,  # [K, 2*Gp, H] f16 device: query @ rotation, high halves of every head, then low halves
    chunk_scores_ref,  # [K, C, Gp] f32 device: query . mean
    codes_ref,  # [K, S, H/4] u8 device
    scales_ref,  # [K, S] device
    chunks_ref,  # [5] i32 device: first and end of the routed middle, own chunk, the next token's chunk, whether the token votes
    scores_ref,  # [K, P, Gp] f32 device, out
    partial_ref,  # [K, programs, 2, Gp] f32 device, out: largest score the program saw and sum of exp(score - largest)
    *,
    heads: int,
    group_size: int,
    scale: float,
    config: Config,
):
    """Blocks of chunks program, program + programs, ...: the body of a scanning program, for the launches that scan."""
    code_bytes, padded = codes_ref.shape[2], scores_ref.shape[2]
    chunk_size = codes_ref.shape[1] // chunk_scores_ref.shape[1]
    block_chunks, pages = config.block_chunks, chunk_size // group_size
    tokens, groups = block_chunks * chunk_size, block_chunks * pages
    byte, row = jnp.arange(max(16, pl.next_power_of_2(code_bytes))), jnp.arange(2 * padded)
    head, group = jnp.arange(padded), jnp.arange(groups)
    real_byte = byte < code_bytes
    unpack = _unpack_asm if config.unpack == "asm" else _unpack_arithmetic
    first, end = chunks_ref[0], chunks_ref[1]
    begin, blocks = first // block_chunks, (end + block_chunks - 1) // block_chunks
    rotated = [
        plgpu.load(rotated_ref.at[k, row[:, None], (quarter * code_bytes + byte)[None, :]], mask=real_byte[None, :], other=0)
        for quarter in range(4)
    ]

    def load_small(block):
        """(scales of the tokens, scores of the chunks' means by group; -inf where the group does not take part)."""
        token, chunk = block * tokens + jnp.arange(tokens), block * block_chunks + group // pages
        live = ((chunk >= first) & (chunk < end))[None, :] & (head < heads)[:, None]
        return (
            plgpu.load(scales_ref.at[k, token], mask=token < end * chunk_size, other=0),
            plgpu.load(chunk_scores_ref.at[k, chunk[None, :], head[:, None]], mask=live, other=-jnp.inf),
        )

    def one(i, carry):
        peak, total, token_scale, base = carry  # peak and total by head and place in the block: joined once, at the end
        block = begin + program + i * programs
        token, page = block * tokens + jnp.arange(tokens), block * groups + group
        held = (token < end * chunk_size)[:, None] & real_byte[None, :]
        # The compiler keeps codes of config.scan_stages - 1 blocks on their way; for what is small we keep one ahead ourselves.
        codes = plgpu.load(codes_ref.at[k, token[:, None], byte[None, :]], mask=held, other=0, eviction_policy="evict_first")
        ahead = load_small(block + programs)
        residual = jnp.zeros((2 * padded, tokens), jnp.float32)
        for quarter in range(4):
            residual += plgpu.dot(rotated[quarter], unpack(codes, quarter), trans_b=True)
        residual = residual.reshape(2, padded, tokens).sum(0) * (token_scale.astype(jnp.float32) * LEVEL_UNIT)[None, :]
        best = residual.reshape(padded, groups, group_size).max(2)  # the chunk's mean is common to its tokens: it can wait
        score = (best + base) * scale
        plgpu.store(scores_ref.at[k, page[None, :], head[:, None]], score, mask=(page < scores_ref.shape[1])[None, :])
        new_peak = jnp.maximum(peak, score)
        safe = jnp.where(new_peak > -jnp.inf, new_peak, 0)
        total = total * _exp(peak - safe) + _exp(score - safe)
        return new_peak, total, *ahead

    nothing = jnp.full((padded, groups), -jnp.inf, jnp.float32), jnp.zeros((padded, groups), jnp.float32)
    turns = jnp.maximum(blocks - begin - program + programs - 1, 0) // programs
    peaks, totals, _, _ = lax.fori_loop(0, turns, one, (*nothing, *load_small(begin + program)))
    peak = peaks.max(1)
    safe = jnp.where(peak > -jnp.inf, peak, 0)
    plgpu.store(partial_ref.at[k, program, 0, head], peak)
    plgpu.store(partial_ref.at[k, program, 1, head], (totals * _exp(peaks - safe[:, None])).sum(1))


def _exp(x):
    return jnp.exp2(x * math.log2(math.e))  # a third of the instructions of the exponential


def scan_shapes(kv_heads: int, pages: int, padded: int, config: Config) -> list[jax.ShapeDtypeStruct]:
    """What a scan writes: scores, partial results."""
    shapes = (kv_heads, pages, padded), (kv_heads, config.scan_programs, 2, padded)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def check_scan(codes: UInt8[Array, "K S B"], chunk_size: int, group_size: int) -> None:
    """Raises what a scan of these codes would run into."""
    check_offsets(codes=codes)
    if not (power_of_two(chunk_size) and power_of_two(group_size)):
        raise NotImplementedError(f"{chunk_size=} and {group_size=} must be powers of two in the kernel: use implementation='xla'")


def _scan_kernel(*refs, config: Config, **rules):
    scan_program(pl.program_id(0), pl.program_id(1), config.scan_programs, *refs, config=config, **rules)


def scan(
    rotated: Float[Array, "K rows H"],
    chunk_scores: Float[Array, "K C Gp"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    chunks: Int[Array, " 5"],
    *,
    heads: int,
    group_size: int,
    scale: float,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K P Gp"], Float[Array, "K programs 2 Gp"]]:
    """Scores of the groups of the routed middle (chunks[0] .. chunks[1]-1; -inf elsewhere in a scanned block, unwritten beyond)."""
    kv_heads, held, padded = chunk_scores.shape
    check_scan(codes, codes.shape[1] // held, group_size)
    return pl.pallas_call(
        partial(_scan_kernel, heads=heads, group_size=group_size, scale=scale, config=config),
        grid=(kv_heads, config.scan_programs),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=scan_shapes(kv_heads, codes.shape[1] // group_size, padded, config),
        compiler_params=plgpu.CompilerParams(num_warps=config.scan_warps, num_stages=config.scan_stages),
        interpret=interpret,
        name="sketch_scan",
    )(rotated, chunk_scores, codes, scales, chunks)


def _prepare_kernel(
    query_ref,  # [K, G, H] device
    rotation_ref,  # [H, H] f32 device
    means_ref,  # [K, C, H] device
    chunks_ref,  # [5] i32 device, as for the scan
    rotated_ref,  # [K, 2*Gp, H] f16 device, out
    chunk_scores_ref,  # [K, C, Gp] f32 device, out; nothing beyond the routed middle
    *,
    columns: int,
):
    k, program = pl.program_id(0), pl.program_id(1)
    heads, head_dim, padded = query_ref.shape[1], query_ref.shape[2], chunk_scores_ref.shape[2]
    head, dim = jnp.arange(max(ROWS, padded)), jnp.arange(pl.next_power_of_2(head_dim))
    real, turning = dim < head_dim, -(-head_dim // columns)
    query = plgpu.load(query_ref.at[k, head[:, None], dim[None, :]], mask=(head < heads)[:, None] & real[None, :], other=0)

    @pl.when(program < turning)
    def _():
        column = program * columns + jnp.arange(columns)
        here = column < head_dim
        turn = plgpu.load(rotation_ref.at[dim[:, None], column[None, :]], mask=real[:, None] & here[None, :], other=0)
        rotated = plgpu.dot(query.astype(jnp.float32), turn.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        high = rotated.astype(jnp.float16)
        low = (rotated - high.astype(jnp.float32)).astype(jnp.float16)
        for half, x in enumerate((high, low)):
            row = jnp.where(head < padded, half * padded + head, 2 * padded)
            plgpu.store(rotated_ref.at[k, row[:, None], column[None, :]], x, mask=(head < padded)[:, None] & here[None, :])

    chunk = (program - turning) * MEAN_CHUNKS + jnp.arange(MEAN_CHUNKS)

    @pl.when((program >= turning) & ((program - turning) * MEAN_CHUNKS < chunks_ref[1]))
    def _():
        there = chunk < means_ref.shape[1]
        mean = plgpu.load(means_ref.at[k, chunk[:, None], dim[None, :]], mask=there[:, None] & real[None, :], other=0)
        wide = jnp.promote_types(query.dtype, mean.dtype)
        precision = lax.Precision.HIGHEST if wide == jnp.float32 else None
        scores = plgpu.dot(query.astype(wide), mean.astype(wide), trans_b=True, precision=precision)
        where = (head < padded)[:, None] & there[None, :]
        plgpu.store(chunk_scores_ref.at[k, chunk[None, :], head[:, None]], scores, mask=where)


def prepare(
    query: Float[Array, "K G H"], rotation: Float[Array, "H H"], means: Float[Array, "K C H"], chunks: Int[Array, " 5"], *, interpret: bool
) -> tuple[Float[Array, "K rows H"], Float[Array, "K C Gp"]]:
    """(rotated, chunk_scores); see api.ScanQuery."""
    kv_heads, heads, head_dim = query.shape
    padded = max(8, pl.next_power_of_2(heads))
    columns = 16  # the narrowest a matrix product takes: many small programs, since the launch is all latency
    check_offsets(means=means)
    return pl.pallas_call(
        partial(_prepare_kernel, columns=columns),
        grid=(kv_heads, -(-head_dim // columns) + -(-means.shape[1] // MEAN_CHUNKS)),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, 2 * padded, head_dim), jnp.float16),
            jax.ShapeDtypeStruct((kv_heads, means.shape[1], padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sketch_prepare",
    )(query, rotation, means, chunks)


class Listing(NamedTuple):
    """Where a selecting program writes pages: ids [K, parts * M] i32, part by part, and counts [K, parts] i32; device."""

    ids: Any
    count: Any


def select_program(
    k,  # kv head
    part,  # of the pages: those with this remainder
    scores_ref,  # [K, P, Gp] f32 device
    partial_ref,  # [K, programs, 2, Gp] f32 device
    window_ref,  # [K, splits, 2, G] f32 device: the same of the exact window scores
    stamps_ref,  # [K, P] i32 device
    chunks_ref,  # [5] i32 device: first and end of the routed middle, own chunk, the next token's chunk, whether the token votes
    stamps_out_ref,  # [K, P] i32 device, the same buffer as stamps_ref
    counts_ref,  # [K, parts, 2] i32 device, out: pages visible, requests refused
    unopened_ref,  # [K, parts, G] f32 device, out: estimated share of the mass that lies in pages not visible
    visible: Listing | None = None,  # out, where wanted: all pages that the token sees,
    fresh: Listing | None = None,  # those that it opened,
    carried: Listing | None = None,  # those that stay open for the next token (not with `visible`)
    *,
    pages_per_chunk: int,
    threshold: float,
    votes: int,
    vote_share: float,
    config: Config,
):
    """The body of a selecting program. Returns how many pages are visible."""
    pages, padded, heads = scores_ref.shape[1], scores_ref.shape[2], window_ref.shape[3]
    parts = counts_ref.shape[1]
    room_of_part = (visible or fresh).ids.shape[1] // parts
    step = min(config.select_pages, pl.next_power_of_2(-(-pages // parts)))
    head = jnp.arange(padded)
    first, end = chunks_ref[0] * pages_per_chunk, jnp.minimum(chunks_ref[1] * pages_per_chunk, pages)
    own, after, voting = chunks_ref[2], chunks_ref[3], chunks_ref[4]

    def load(i):
        page = (i * step + jnp.arange(step)) * parts + part
        stamps = plgpu.load(stamps_ref.at[k, page], mask=page < end, other=never(votes))
        middle = (page < end) & (page >= first)
        return page, stamps, middle, plgpu.load(scores_ref.at[k, page[:, None], head[None, :]], mask=middle[:, None], other=-jnp.inf)

    def kept(stamps, chunk):
        return is_open(stamps, chunk, votes).astype(jnp.int32)

    ahead = load(0)  # on its way while the softmax sums are put together

    def combine(ref, count, width):
        row = jnp.arange(pl.next_power_of_2(count))
        mask = (row < count)[:, None] & (head < width)[None, :]
        peaks = plgpu.load(ref.at[k, row[:, None], 0, head[None, :]], mask=mask, other=-jnp.inf)
        totals = plgpu.load(ref.at[k, row[:, None], 1, head[None, :]], mask=mask, other=0.0)
        peak = peaks.max(0)
        safe = jnp.where(peak > -jnp.inf, peak, 0)
        return peak, (totals * jnp.exp(peaks - safe[None, :])).sum(0)

    peak_a, total_a = combine(partial_ref, partial_ref.shape[1], padded)
    peak_b, total_b = combine(window_ref, window_ref.shape[1], heads)
    peak = jnp.maximum(peak_a, peak_b)
    safe = jnp.where(peak > -jnp.inf, peak, 0)
    total = total_a * jnp.exp(peak_a - safe) + total_b * jnp.exp(peak_b - safe)
    unit = safe + jnp.log(jnp.where(total > 0, total, 1))  # exp(score - unit) is a page's share of the mass
    bound = jnp.where(head < heads, unit + math.log(threshold), jnp.inf)
    vote_bound = bound + math.log(vote_share)

    def decide(loaded, carry):
        listed_before, fresh_before, seen_before, unopened = carry
        page, stamps, middle, scores = loaded
        wanted = jnp.max((scores >= bound[None, :]).astype(jnp.int32), axis=1) * middle.astype(jnp.int32)
        seen = kept(stamps, own)
        new = wanted * (1 - seen)
        # What the second list has beside new pages: all that were seen, or those that the next token still sees.
        listed = seen if votes or carried is None else seen * ((wanted > 0) | (stamps >= after - 1)).astype(jnp.int32)
        running = jnp.cumsum(listed + (new << 16), axis=0)
        new_rank = running >> 16
        room = jnp.maximum(room_of_part - seen_all - fresh_before, 0)
        taken = new * (new_rank <= room).astype(jnp.int32)
        open_to_it = seen + taken
        listed, listed_rank = listed + taken, (running & 0xFFFF) + jnp.minimum(new_rank, room)
        if votes:
            cast = jnp.sum((scores >= vote_bound[None, :]).astype(jnp.int32), axis=1) * middle.astype(jnp.int32) * voting
            touched = (cast + taken) > 0
            stamps = jnp.where(touched, stamp_of(own, open_to_it > 0, votes_in(stamps, own, votes) + cast, votes), stamps)
            plgpu.store(stamps_out_ref.at[k, page], stamps, mask=touched)
            if carried is not None:  # only now that this token's votes are counted
                listed = kept(stamps, after) * (page < end).astype(jnp.int32)
                listed_rank = jnp.cumsum(listed, axis=0)
        else:
            plgpu.store(stamps_out_ref.at[k, page], jnp.broadcast_to(own, (step,)), mask=(wanted * open_to_it) > 0)
        for listing, chosen, rank in (
            (fresh, taken > 0, fresh_before + new_rank - 1),
            (visible or carried, listed > 0, listed_before + listed_rank - 1),
        ):
            if listing is not None:
                put = chosen & (rank < room_of_part)
                plgpu.store(listing.ids.at[k, jnp.where(put, part * room_of_part + rank, parts * room_of_part)], page, mask=put)
        unopened += jnp.sum(jnp.where((open_to_it > 0)[:, None], 0.0, jnp.exp(scores - unit[None, :])), axis=0)
        both = jnp.sum(listed + (new << 16))
        return listed_before + (both & 0xFFFF), fresh_before + (both >> 16), seen_before + jnp.sum(seen), unopened

    nothing = jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.zeros((padded,), jnp.float32)
    if pages <= step * parts:
        seen_all = jnp.sum(kept(ahead[1], own))
        listed, new, seen, unopened = decide(ahead, nothing)
    else:
        steps = (jnp.maximum(end, 1) + step * parts - 1) // (step * parts)
        seen_all = lax.fori_loop(0, steps, lambda i, n: n + jnp.sum(kept(load(i)[1], own)), jnp.int32(0))
        listed, new, seen, unopened = lax.fori_loop(1, steps, lambda i, c: decide(load(i), c), decide(ahead, nothing))
    taken = jnp.minimum(new, jnp.maximum(room_of_part - seen_all, 0))
    seen_now = jnp.minimum(seen + taken, room_of_part)
    for listing, count in ((visible, seen_now), (fresh, taken), (carried, jnp.minimum(listed, room_of_part))):
        if listing is not None:
            listing.count[k, part] = count
    counts_ref[k, part, 0] = seen_now
    counts_ref[k, part, 1] = new - taken
    plgpu.store(unopened_ref.at[k, part, head], unopened, mask=head < heads)
    return seen_now


def _select_kernel(
    scores_ref, partial_ref, window_ref, stamps_ref, chunks_ref,  # as in select_program
    stamps_out_ref, fresh_ref, fresh_count_ref, carried_ref, carried_count_ref, counts_ref, unopened_ref,
    **rules,
):  # fmt: skip
    select_program(
        pl.program_id(0), pl.program_id(1), scores_ref, partial_ref, window_ref, stamps_ref, chunks_ref, stamps_out_ref, counts_ref,
        unopened_ref, None, Listing(fresh_ref, fresh_count_ref), Listing(carried_ref, carried_count_ref), **rules,
    )  # fmt: skip


def select(
    scores: Float[Array, "K P Gp"],
    partials: Float[Array, "K programs 2 Gp"],
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    chunks: Int[Array, " 5"],
    *,
    pages_per_chunk: int,
    threshold: float,
    parts: int,
    room: int,
    votes: int = 0,
    vote_share: float = 1.0,
    config: Config,
    interpret: bool,
) -> tuple[Array, ...]:
    """Stamps with this token's requests (in place), the lists and figures of api.Pages."""
    kv_heads, pages, _ = scores.shape
    check_offsets(scores=scores)
    rules = {"pages_per_chunk": pages_per_chunk, "threshold": threshold, "votes": votes, "vote_share": vote_share}
    kernel = partial(_select_kernel, **rules, config=config)
    shapes = [(pages,), (parts * room,), (parts,), (parts * room,), (parts,), (parts, 2)]
    return pl.pallas_call(
        kernel,
        grid=(kv_heads, parts),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=[pl.no_block_spec] * 7,
        out_shape=[
            *(jax.ShapeDtypeStruct((kv_heads, *shape), jnp.int32) for shape in shapes),
            jax.ShapeDtypeStruct((kv_heads, parts, window.shape[3]), jnp.float32),
        ],
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.select_warps, num_stages=1),
        interpret=interpret,
        name="sketch_select",
    )(scores, partials, window, stamps, chunks)


def _carried_kernel(
    stamps_ref,  # [K, P] i32 device
    own_ref,  # [1] i32 device
    carried_ref,  # [K, parts * M] i32 device, out
    count_ref,  # [K, parts] i32 device, out
    *,
    votes: int,
    config: Config,
):
    k, part = pl.program_id(0), pl.program_id(1)
    pages, parts = stamps_ref.shape[1], count_ref.shape[1]
    room = carried_ref.shape[1] // parts
    step = min(config.select_pages, pl.next_power_of_2(-(-pages // parts)))

    def one(i, before):
        page = (i * step + jnp.arange(step)) * parts + part
        stamps = plgpu.load(stamps_ref.at[k, page], mask=page < pages, other=never(votes))
        seen = is_open(stamps, own_ref[0], votes)
        rank = before + jnp.cumsum(seen.astype(jnp.int32), axis=0) - 1
        put = seen & (rank < room)
        plgpu.store(carried_ref.at[k, jnp.where(put, part * room + rank, parts * room)], page, mask=put)
        return before + jnp.sum(seen.astype(jnp.int32))

    count_ref[k, part] = jnp.minimum(lax.fori_loop(0, -(-pages // (step * parts)), one, jnp.int32(0)), room)


def carried_pages(
    stamps: Int[Array, "K P"], own_chunk: Int[Array, " 1"], *, parts: int, room: int, votes: int, config: Config, interpret: bool
) -> tuple[Int[Array, "K M"], Int[Array, "K parts"]]:
    """The pages that earlier requests leave open for a token of `own_chunk`, and how many they are."""
    kv_heads = stamps.shape[0]
    return pl.pallas_call(
        partial(_carried_kernel, votes=votes, config=config),
        grid=(kv_heads, parts),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct((kv_heads, n), jnp.int32) for n in (parts * room, parts)],
        compiler_params=plgpu.CompilerParams(num_warps=config.select_warps, num_stages=1),
        interpret=interpret,
        name="carried_pages",
    )(stamps, own_chunk)
