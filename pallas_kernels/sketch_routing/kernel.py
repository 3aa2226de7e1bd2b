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
    middle_ref,  # [3] i32 device: first chunk of the routed middle, chunk after its last, own chunk
    scores_ref,  # [K, P, Gp] f32 device, out
    partial_ref,  # [K, blocks, 2, Gp] f32 device, out: largest score of the block and sum of exp(score - largest)
    *,
    heads: int,
    chunk_size: int,
    group_size: int,
    scale: float,
    config: Config,
):
    k, block = pl.program_id(0), pl.program_id(1)
    head_dim, code_bytes, chunks = means_ref.shape[2], codes_ref.shape[2], means_ref.shape[1]
    width, bytes_padded, padded = pl.next_power_of_2(head_dim), max(16, pl.next_power_of_2(code_bytes)), scores_ref.shape[2]
    columns = 2 * padded
    block_chunks, pages = config.block_chunks, chunk_size // group_size
    tokens, groups = block_chunks * chunk_size, block_chunks * pages
    first_chunk = block * block_chunks

    def join(product, rows):
        return product.reshape(rows, 2, padded).sum(1)

    @pl.when((first_chunk < middle_ref[1]) & (first_chunk + block_chunks > middle_ref[0]))
    def _():
        token = first_chunk * chunk_size + jnp.arange(tokens)
        held = token < chunks * chunk_size
        byte = jnp.arange(bytes_padded)
        real = byte < code_bytes
        codes = plgpu.load(
            codes_ref.at[k, token[:, None], byte[None, :]], mask=held[:, None] & real[None, :], other=0, eviction_policy="evict_first"
        )
        token_scale = plgpu.load(scales_ref.at[k, token], mask=held, other=0).astype(jnp.float32)
        unpack = _unpack_asm if config.unpack == "asm" else _unpack_arithmetic
        residual = jnp.zeros((tokens, columns), jnp.float32)
        for quarter in range(4):
            row = (quarter * code_bytes + byte)[:, None]
            part = plgpu.load(rotated_ref.at[k, row, jnp.arange(columns)[None, :]], mask=real[:, None], other=0)
            residual += plgpu.dot(unpack(codes, quarter), part)
        residual = join(residual, tokens) * (token_scale * LEVEL_UNIT)[:, None]
        best = residual.reshape(groups, group_size, padded).max(1)  # the chunk's mean is common to its tokens: it can wait

        mean_rows = max(16, block_chunks)
        row, dim = jnp.arange(mean_rows), jnp.arange(width)
        chunk = first_chunk + row
        real_mean = ((row < block_chunks) & (chunk < chunks))[:, None] & (dim < head_dim)[None, :]
        mean = plgpu.load(means_ref.at[k, chunk[:, None], dim[None, :]], mask=real_mean, other=0)

        queries = plgpu.load(direct_ref.at[k, dim[:, None], jnp.arange(columns)[None, :]], mask=(dim < head_dim)[:, None], other=0)
        high = mean.astype(jnp.bfloat16)
        base = plgpu.dot(high, queries)
        if mean.dtype != jnp.bfloat16:
            base += plgpu.dot((mean.astype(jnp.float32) - high.astype(jnp.float32)).astype(jnp.bfloat16), queries)
        base = join(base, mean_rows).reshape(mean_rows // block_chunks, block_chunks, padded).sum(0)

        score = (best.reshape(block_chunks, pages, padded) + base[:, None, :]).reshape(groups, padded) * scale
        group = jnp.arange(groups)
        chunk = first_chunk + group // pages
        head = jnp.arange(padded)
        live = ((chunk >= middle_ref[0]) & (chunk < middle_ref[1]))[:, None] & (head < heads)[None, :]
        score = jnp.where(live, score, -jnp.inf)
        page = (first_chunk * pages + group)[:, None]
        plgpu.store(scores_ref.at[k, page, head[None, :]], score, mask=(page < chunks * pages) & (head < padded)[None, :])
        peak = score.max(0)
        total = jnp.exp(score - jnp.where(peak > -jnp.inf, peak, 0)[None, :]).sum(0)
        partial_ref[k, block, 0, head] = peak
        partial_ref[k, block, 1, head] = total

    @pl.when((first_chunk >= middle_ref[1]) | (first_chunk + block_chunks <= middle_ref[0]))
    def _():
        head = jnp.arange(padded)
        partial_ref[k, block, 0, head] = jnp.full((padded,), -jnp.inf, jnp.float32)
        partial_ref[k, block, 1, head] = jnp.zeros((padded,), jnp.float32)


def scan(
    direct: Float[Array, "K H columns"],
    rotated: Float[Array, "K H columns"],
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 3"],
    *,
    heads: int,
    group_size: int,
    scale: float,
    config: Config,
    interpret: bool,
) -> tuple[Float[Array, "K P Gp"], Float[Array, "K blocks 2 Gp"]]:
    """Scores of the groups of the routed middle (chunks middle[0] .. middle[1]-1; -inf elsewhere in a scanned block, unwritten beyond)."""
    kv_heads, padded = direct.shape[0], direct.shape[2] // 2
    chunks, tokens = means.shape[1], codes.shape[1]
    chunk_size = tokens // chunks
    check_offsets(codes=codes, means=means)
    if not (power_of_two(chunk_size) and power_of_two(group_size)):
        raise NotImplementedError(f"{chunk_size=} and {group_size=} must be powers of two in the kernel: use implementation='xla'")
    blocks = -(-chunks // config.block_chunks)
    kernel = partial(_scan_kernel, heads=heads, chunk_size=chunk_size, group_size=group_size, scale=scale, config=config)
    return pl.pallas_call(
        kernel,
        grid=(kv_heads, blocks),
        in_specs=[pl.no_block_spec] * 6,
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, tokens // group_size, padded), jnp.float32),
            jax.ShapeDtypeStruct((kv_heads, blocks, 2, padded), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.scan_warps, num_stages=1),
        interpret=interpret,
        name="sketch_scan",
    )(direct, rotated, means, codes, scales, middle)


def _select_kernel(
    scores_ref,  # [K, P, Gp] f32 device
    partial_ref,  # [K, blocks, 2, Gp] f32 device
    window_ref,  # [K, splits, 2, G] f32 device: the same of the exact window scores
    stamps_ref,  # [K, P] i32 device
    chunks_ref,  # [3] i32 device: first and end of the routed middle, own chunk
    stamps_out_ref,  # [K, P] i32 device, the same buffer as stamps_ref
    ids_ref,  # [K, M] i32 device, out
    counts_ref,  # [K, 2] i32 device, out: pages listed, requests refused
    unopened_ref,  # [K, G] f32 device, out: estimated share of the mass that lies in pages not listed
    *,
    pages_per_chunk: int,
    threshold: float,
    heads: int,
    config: Config,
):
    k = pl.program_id(0)
    pages, padded = scores_ref.shape[1], scores_ref.shape[2]
    capacity = ids_ref.shape[1]
    step = min(config.select_pages, pl.next_power_of_2(pages))
    head = jnp.arange(padded)
    one_step = pages <= step  # then everything is loaded at once, before anything is waited for
    first, end, own = chunks_ref[0] * pages_per_chunk, jnp.minimum(chunks_ref[1] * pages_per_chunk, pages), chunks_ref[2]

    def load_step(i):
        page = i * step + jnp.arange(step)
        stamps = plgpu.load(stamps_ref.at[k, page], mask=page < end, other=-2)
        middle = (page < end) & (page >= first)
        return page, stamps, middle, plgpu.load(scores_ref.at[k, page[:, None], head[None, :]], mask=middle[:, None], other=-jnp.inf)

    everything = load_step(0) if one_step else None

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
    steps = (jnp.maximum(end, 1) + step - 1) // step

    def count_seen(i, seen):
        page = i * step + jnp.arange(step)
        stamps = plgpu.load(stamps_ref.at[k, page], mask=page < end, other=-2)
        return seen + jnp.sum((stamps >= own - 1).astype(jnp.int32))

    def decide(loaded, listed, fresh_before, room, unopened):
        page, stamps, middle, scores = loaded
        wanted = jnp.max((scores >= bound[None, :]).astype(jnp.int32), axis=1) * middle.astype(jnp.int32)
        seen = (stamps >= own - 1).astype(jnp.int32)
        if room is None:
            room = jnp.maximum(capacity - jnp.sum(seen), 0)
        fresh = wanted * (1 - seen)
        running = jnp.cumsum(seen + (fresh << 16), axis=0)
        fresh_rank = running >> 16
        room_here = jnp.maximum(room - fresh_before, 0)
        taken = fresh * (fresh_rank <= room_here).astype(jnp.int32)
        visible = seen + taken
        rank = listed + (running & 0xFFFF) + jnp.minimum(fresh_rank, room_here) - 1
        plgpu.store(stamps_out_ref.at[k, page], jnp.broadcast_to(own, (step,)), mask=(wanted * visible) > 0)
        put = (visible > 0) & (rank < capacity)
        plgpu.store(ids_ref.at[k, jnp.where(put, rank, capacity)], page, mask=put)
        counts = jnp.sum(visible + (fresh << 16))
        unopened += jnp.sum(jnp.where((visible > 0)[:, None], 0.0, jnp.exp(scores - unit[None, :])), axis=0)
        return listed + (counts & 0xFFFF), fresh_before + (counts >> 16), room, unopened

    start = (jnp.int32(0), jnp.int32(0))
    if one_step:
        listed, fresh, room, unopened = decide(everything, *start, None, jnp.zeros((padded,), jnp.float32))
    else:
        room = jnp.maximum(capacity - lax.fori_loop(0, steps, count_seen, jnp.int32(0)), 0)
        carry = (*start, room, jnp.zeros((padded,), jnp.float32))
        listed, fresh, room, unopened = lax.fori_loop(0, steps, lambda i, c: decide(load_step(i), *c), carry)
    counts_ref[k, 0] = jnp.minimum(listed, capacity)
    counts_ref[k, 1] = jnp.maximum(fresh - room, 0)
    plgpu.store(unopened_ref.at[k, head], unopened, mask=head < heads)


def select(
    scores: Float[Array, "K P Gp"],
    partials: Float[Array, "K blocks 2 Gp"],
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    chunks: Int[Array, " 3"],
    *,
    pages_per_chunk: int,
    threshold: float,
    capacity: int,
    config: Config,
    interpret: bool,
) -> tuple[Int[Array, "K P"], Int[Array, "K M"], Int[Array, "K 2"], Float[Array, "K G"]]:
    """Stamps with this token's requests (in place), the visible pages in ascending order, [listed, refused] a kv head, unopened mass."""
    kv_heads, pages, _ = scores.shape
    check_offsets(scores=scores)
    kernel = partial(_select_kernel, pages_per_chunk=pages_per_chunk, threshold=threshold, heads=window.shape[3], config=config)
    return pl.pallas_call(
        kernel,
        grid=(kv_heads,),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=[pl.no_block_spec] * 4,
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, pages), jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, capacity), jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, 2), jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, window.shape[3]), jnp.float32),
        ],
        input_output_aliases={3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.select_warps, num_stages=1),
        interpret=interpret,
        name="sketch_select",
    )(scores, partials, window, stamps, chunks)
