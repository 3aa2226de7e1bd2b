"""Two kernels: a scan over the packed codes (group scores, partial softmax sums), a selection per kv head (threshold, stamps, list).

Byte b of a token's codes holds dimensions b, B+b, 2B+b, 3B+b (B = H/4; dimension jB+b in bits 2j, 2j+1), so that unpacking code j of all
bytes gives a contiguous quarter of the head: four matrix products with quarters of the query and no shuffles. The two level magnitudes have
the ratio 944/283, both exact in float16, and the query goes in as float16 high + low halves in neighbouring column blocks of one product:
the scores are float32-exact to about 2e-6 at the tensor cores' price of float16.
"""

from __future__ import annotations

import math
from functools import partial

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


def _unpack_arithmetic(codes: Array, quarter: int) -> Array:
    """The level of code `quarter` of each byte over LEVEL_UNIT, float16."""
    field = codes.astype(jnp.int32) >> (2 * quarter)
    outer = 1 - ((field ^ (field >> 1)) & 1)
    bits = (_INNER_BITS + outer * (_OUTER_BITS - _INNER_BITS)) | (((field & 2) ^ 2) << 14)
    return lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)


def _half_pair(value: float) -> int:
    """The same float16 in both halves of a register; the value must be exact."""
    if float(np.float16(value)) != value:
        raise ValueError(f"{value=} is not a float16")
    return int(np.float16(value).view(np.uint16)) * 0x10001


def _unpack_asm(codes: Array, quarter: int) -> Array:
    """The same for four bytes in one register, two float16 lanes at a time.

    Integer instructions run at half rate on Hopper, so most of the work is float16: with the code c in the mantissa of 1024 + 4^j c,
    y = c - 1.5 is one fused multiply-add, and the level is y (1674 + 95 y^2) / 512, whose rounding gives 849 / 512 and 2832 / 512 exactly.
    """
    place = max(quarter, 1)  # the lowest field is moved up by one: 1024 + 1.5 has no exact float16
    shift, unit = "shl.b32 t, t, 2;" if quarter == 0 else "", 4.0**-place

    def lane_pair(out: str, selector: str) -> str:
        return f"""
        prmt.b32 t, $2, 0, {selector};
        {shift}
        lop3.b32 v, t, {0x00030003 << (2 * place)}, {_half_pair(1024.0)}, 0xea;
        fma.rn.f16x2 y, v, unit, offset;
        mul.rn.f16x2 s, y, y;
        fma.rn.f16x2 s, s, cubic, linear;
        mul.rn.f16x2 {out}, y, s;
        """

    asm = f"""{{ .reg .b32 t, v, y, s, unit, offset, cubic, linear;
        mov.b32 unit, {_half_pair(unit)};
        mov.b32 offset, {_half_pair(-1024 * unit - 1.5)};
        mov.b32 cubic, {_half_pair(95 / 512)};
        mov.b32 linear, {_half_pair(1674 / 512)};
        {lane_pair("$0", "0x4140")} {lane_pair("$1", "0x4342")} }}"""  # lop3 0xea: (t and mask) or 1024
    [levels] = plgpu.elementwise_inline_asm(
        asm, args=[codes], constraints="=r,=r,r", pack=4, result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.float16)]
    )
    return levels


def _scan_kernel(
    direct_ref,  # [K, H, 2*Gp] bf16 device: query columns, high halves then low halves
    rotated_ref,  # [K, H, 2*Gp] f16 device: the same of query @ rotation
    means_ref,  # [K, C, H] device
    codes_ref,  # [K, S, H/4] u8 device
    scales_ref,  # [K, S] device
    middle_ref,  # [4] i32 device: first chunk of the routed middle, chunk after its last, own chunk, the next token's chunk
    scores_ref,  # [K, P, Gp] f32 device, out
    partial_ref,  # [K, programs, 2, Gp] f32 device, out: largest score a program saw and sum of exp(score - largest)
    *,
    heads: int,
    chunk_size: int,
    group_size: int,
    scale: float,
    config: Config,
):
    k, program = pl.program_id(0), pl.program_id(1)
    head_dim, code_bytes, chunks = means_ref.shape[2], codes_ref.shape[2], means_ref.shape[1]
    width, bytes_padded, padded = pl.next_power_of_2(head_dim), max(16, pl.next_power_of_2(code_bytes)), scores_ref.shape[2]
    columns = 2 * padded
    block_chunks, pages = config.block_chunks, chunk_size // group_size
    tokens, groups = block_chunks * chunk_size, block_chunks * pages
    mean_rows = max(16, block_chunks)
    byte, dim, column, head = jnp.arange(bytes_padded), jnp.arange(width), jnp.arange(columns), jnp.arange(padded)
    real_byte, real_dim = byte < code_bytes, dim < head_dim
    unpack = _unpack_asm if config.unpack == "asm" else _unpack_arithmetic
    first, end = middle_ref[0], middle_ref[1]
    begin, blocks = first // block_chunks, (end + block_chunks - 1) // block_chunks

    def join(product, rows):
        return product.reshape(rows, 2, padded).sum(1)

    rotated = [
        plgpu.load(rotated_ref.at[k, (quarter * code_bytes + byte)[:, None], column[None, :]], mask=real_byte[:, None], other=0)
        for quarter in range(4)
    ]
    direct = plgpu.load(direct_ref.at[k, dim[:, None], column[None, :]], mask=real_dim[:, None], other=0)

    def one(i, carry):
        peak, total = carry
        block = begin + program + i * config.scan_programs
        token = block * tokens + jnp.arange(tokens)
        held = token < chunks * chunk_size
        codes = plgpu.load(
            codes_ref.at[k, token[:, None], byte[None, :]], mask=held[:, None] & real_byte[None, :], other=0, eviction_policy="evict_first"
        )
        token_scale = plgpu.load(scales_ref.at[k, token], mask=held, other=0).astype(jnp.float32)
        row = jnp.arange(mean_rows)
        chunk = block * block_chunks + row
        real = ((row < block_chunks) & (chunk < chunks))[:, None] & real_dim[None, :]
        mean = plgpu.load(means_ref.at[k, chunk[:, None], dim[None, :]], mask=real, other=0)
        residual = jnp.zeros((tokens, columns), jnp.float32)
        for quarter in range(4):
            residual += plgpu.dot(unpack(codes, quarter), rotated[quarter])
        residual = join(residual, tokens) * (token_scale * LEVEL_UNIT)[:, None]
        best = residual.reshape(groups, group_size, padded).max(1)  # the chunk's mean is common to its tokens: it can wait
        high = mean.astype(jnp.bfloat16)
        base = plgpu.dot(high, direct)
        if mean.dtype != jnp.bfloat16:
            base += plgpu.dot((mean.astype(jnp.float32) - high.astype(jnp.float32)).astype(jnp.bfloat16), direct)
        base = join(base, mean_rows).reshape(mean_rows // block_chunks, block_chunks, padded).sum(0)
        score = (best.reshape(block_chunks, pages, padded) + base[:, None, :]).reshape(groups, padded) * scale
        group = jnp.arange(groups)
        chunk = block * block_chunks + group // pages
        live = ((chunk >= first) & (chunk < end))[:, None] & (head < heads)[None, :]
        score = jnp.where(live, score, -jnp.inf)
        page = (block * groups + group)[:, None]
        plgpu.store(scores_ref.at[k, page, head[None, :]], score, mask=(page < chunks * pages) & (head < padded)[None, :])
        new_peak = jnp.maximum(peak, score.max(0))
        safe = jnp.where(new_peak > -jnp.inf, new_peak, 0)
        total = total * jnp.exp(peak - safe) + jnp.exp(score - safe[None, :]).sum(0)
        return new_peak, total

    nothing = jnp.full((padded,), -jnp.inf, jnp.float32), jnp.zeros((padded,), jnp.float32)
    turns = jnp.maximum(blocks - begin - program + config.scan_programs - 1, 0) // config.scan_programs
    peak, total = lax.fori_loop(0, turns, one, nothing)
    partial_ref[k, program, 0, head] = peak
    partial_ref[k, program, 1, head] = total


def scan(
    direct: Float[Array, "K H columns"],
    rotated: Float[Array, "K H columns"],
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 4"],
    *,
    heads: int,
    group_size: int,
    scale: float,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K P Gp"], Float[Array, "K programs 2 Gp"]]:
    """Scores of the groups of the routed middle (chunks middle[0] .. middle[1]-1; -inf elsewhere in a scanned block, unwritten beyond)."""
    kv_heads, padded = direct.shape[0], direct.shape[2] // 2
    chunks, tokens = means.shape[1], codes.shape[1]
    chunk_size = tokens // chunks
    check_offsets(codes=codes, means=means)
    if not (power_of_two(chunk_size) and power_of_two(group_size)):
        raise NotImplementedError(f"{chunk_size=} and {group_size=} must be powers of two in the kernel: use implementation='xla'")
    kernel = partial(_scan_kernel, heads=heads, chunk_size=chunk_size, group_size=group_size, scale=scale, config=config)
    return pl.pallas_call(
        kernel,
        grid=(kv_heads, config.scan_programs),
        in_specs=[pl.no_block_spec] * 6,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, tokens // group_size, padded), jnp.float32),
            jax.ShapeDtypeStruct((kv_heads, config.scan_programs, 2, padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.scan_warps, num_stages=1),
        interpret=interpret,
        name="sketch_scan",
    )(direct, rotated, means, codes, scales, middle)


def _columns_kernel(
    query_ref,  # [K, G, H] device
    rotation_ref,  # [H, H] f32 device
    direct_ref,  # [K, H, 2*Gp] bf16 device, out
    rotated_ref,  # [K, H, 2*Gp] f16 device, out
    *,
    columns: int,
):
    k, split = pl.program_id(0), pl.program_id(1)
    heads, head_dim, padded = query_ref.shape[1], query_ref.shape[2], direct_ref.shape[2] // 2
    head, dim = jnp.arange(max(16, padded)), jnp.arange(pl.next_power_of_2(head_dim))
    column = split * columns + jnp.arange(columns)
    real, here = (dim < head_dim), (column < head_dim)
    query = plgpu.load(query_ref.at[k, head[:, None], dim[None, :]], mask=(head < heads)[:, None] & real[None, :], other=0)
    turn = plgpu.load(rotation_ref.at[dim[:, None], column[None, :]], mask=real[:, None] & here[None, :], other=0)
    rotated = plgpu.dot(query.astype(jnp.float32), turn.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    mask = (head < heads)[:, None] & here[None, :]
    direct = plgpu.load(query_ref.at[k, head[:, None], column[None, :]], mask=mask, other=0).astype(jnp.float32)
    where = (head < padded)[:, None] & here[None, :]
    for ref, x in ((direct_ref, direct), (rotated_ref, rotated)):
        high = x.astype(ref.dtype)
        low = (x - high.astype(jnp.float32)).astype(ref.dtype)
        plgpu.store(ref.at[k, column[None, :], head[:, None]], high, mask=where)
        plgpu.store(ref.at[k, column[None, :], padded + head[:, None]], low, mask=where)


def query_columns(query: Float[Array, "K G H"], rotation: Float[Array, "H H"], *, interpret: bool) -> tuple[Array, Array]:
    """(direct, rotated); see api.QueryColumns."""
    kv_heads, heads, head_dim = query.shape
    shape = (kv_heads, head_dim, 2 * max(8, pl.next_power_of_2(heads)))
    columns = 16  # the narrowest a matrix product takes: many small programs, since the launch is all latency
    return pl.pallas_call(
        partial(_columns_kernel, columns=columns),
        grid=(kv_heads, -(-head_dim // columns)),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.bfloat16, jnp.float16)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="query_columns",
    )(query, rotation)


def _select_kernel(
    scores_ref,  # [K, P, Gp] f32 device
    partial_ref,  # [K, programs, 2, Gp] f32 device
    window_ref,  # [K, splits, 2, G] f32 device: the same of the exact window scores
    stamps_ref,  # [K, P] i32 device
    chunks_ref,  # [4] i32 device: first and end of the routed middle, own chunk, the next token's chunk
    stamps_out_ref,  # [K, P] i32 device, the same buffer as stamps_ref
    fresh_ref,  # [K, parts * M] i32 device, out: pages opened by this token, part by part
    fresh_count_ref,  # [K, parts] i32 device, out
    carried_ref,  # [K, parts * M] i32 device, out: pages that stay open for the next token
    carried_count_ref,  # [K, parts] i32 device, out
    counts_ref,  # [K, parts, 2] i32 device, out: pages visible, requests refused
    unopened_ref,  # [K, parts, G] f32 device, out: estimated share of the mass that lies in pages not visible
    *,
    pages_per_chunk: int,
    threshold: float,
    votes: int,
    vote_share: float,
    heads: int,
    config: Config,
):
    k, part = pl.program_id(0), pl.program_id(1)
    pages, padded = scores_ref.shape[1], scores_ref.shape[2]
    parts = fresh_count_ref.shape[1]
    room_of_part = fresh_ref.shape[1] // parts
    step = min(config.select_pages, pl.next_power_of_2(-(-pages // parts)))
    head = jnp.arange(padded)
    first, end = chunks_ref[0] * pages_per_chunk, jnp.minimum(chunks_ref[1] * pages_per_chunk, pages)
    own, after = chunks_ref[2], chunks_ref[3]

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
        kept_before, fresh_before, seen_before, unopened = carry
        page, stamps, middle, scores = loaded
        wanted = jnp.max((scores >= bound[None, :]).astype(jnp.int32), axis=1) * middle.astype(jnp.int32)
        seen = kept(stamps, own)
        fresh = wanted * (1 - seen)
        room = jnp.maximum(room_of_part - seen_all - fresh_before, 0)
        if votes:
            fresh_rank = jnp.cumsum(fresh, axis=0)
            taken = fresh * (fresh_rank <= room).astype(jnp.int32)
            visible = seen + taken
            cast = jnp.sum((scores >= vote_bound[None, :]).astype(jnp.int32), axis=1) * middle.astype(jnp.int32)
            stamps = jnp.where(cast > 0, stamp_of(own, visible > 0, votes_in(stamps, own) + cast), stamps)
            plgpu.store(stamps_out_ref.at[k, page], stamps, mask=cast > 0)
            staying = kept(stamps, after) * (page < end).astype(jnp.int32)
            carried_rank = jnp.cumsum(staying, axis=0)
        else:
            stays = seen * ((wanted > 0) | (stamps >= after - 1)).astype(jnp.int32)
            running = jnp.cumsum(stays + (fresh << 16), axis=0)
            fresh_rank = running >> 16
            taken = fresh * (fresh_rank <= room).astype(jnp.int32)
            visible, staying = seen + taken, stays + taken
            carried_rank = (running & 0xFFFF) + jnp.minimum(fresh_rank, room)
            plgpu.store(stamps_out_ref.at[k, page], jnp.broadcast_to(own, (step,)), mask=(wanted * visible) > 0)
        for ref, chosen, rank in (
            (fresh_ref, taken > 0, fresh_before + fresh_rank - 1),
            (carried_ref, staying > 0, kept_before + carried_rank - 1),
        ):
            put = chosen & (rank < room_of_part)
            plgpu.store(ref.at[k, jnp.where(put, part * room_of_part + rank, parts * room_of_part)], page, mask=put)
        unopened += jnp.sum(jnp.where((visible > 0)[:, None], 0.0, jnp.exp(scores - unit[None, :])), axis=0)
        both = jnp.sum(staying + (fresh << 16))
        return kept_before + (both & 0xFFFF), fresh_before + (both >> 16), seen_before + jnp.sum(seen), unopened

    nothing = jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.zeros((padded,), jnp.float32)
    if pages <= step * parts:
        seen_all = jnp.sum(kept(ahead[1], own))
        staying, fresh, seen, unopened = decide(ahead, nothing)
    else:
        steps = (jnp.maximum(end, 1) + step * parts - 1) // (step * parts)
        seen_all = lax.fori_loop(0, steps, lambda i, n: n + jnp.sum(kept(load(i)[1], own)), jnp.int32(0))
        staying, fresh, seen, unopened = lax.fori_loop(1, steps, lambda i, c: decide(load(i), c), decide(ahead, nothing))
    taken = jnp.minimum(fresh, jnp.maximum(room_of_part - seen_all, 0))
    fresh_count_ref[k, part] = taken
    carried_count_ref[k, part] = jnp.minimum(staying, room_of_part)
    counts_ref[k, part, 0] = jnp.minimum(seen + taken, room_of_part)
    counts_ref[k, part, 1] = fresh - taken
    plgpu.store(unopened_ref.at[k, part, head], unopened, mask=head < heads)


def select(
    scores: Float[Array, "K P Gp"],
    partials: Float[Array, "K programs 2 Gp"],
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    chunks: Int[Array, " 4"],
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
    kernel = partial(_select_kernel, **rules, heads=window.shape[3], config=config)
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
