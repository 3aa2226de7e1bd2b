"""Expert MLP for many tokens as two grouped matmuls (Pallas, Triton lowering).

Pairs (token, expert) are sorted by expert; a table cuts each expert's run of pairs into tiles of `rows`. Launch 1 gathers x rows by token
and writes hidden = silu(gate x) * (up x) in sorted order; launch 2 multiplies by down, weighs, and scatters rows back to pair order, so
that the sum over a token's experts reads contiguous memory and is deterministic.
Floor at Qwen3-30B-A3B: 6*2048*768 FLOPs a pair, 64K tokens = 4.95 TFLOP = 7.2 ms at 690 TFLOP/s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8 import BLOCK, conversion_for, to_float16, to_float32
from pallas_kernels.fp8_matvec.kernel import bad_weight
from pallas_kernels.indexing import outer, span
from pallas_kernels.moe_prefill.config import Config, Grouped, measured
from pallas_kernels.normalise import narrow

ACTIVATION_SHIFT = 2.0**-6  # float16 activations: the largest is 65504 * 64 = 4.2e6, full precision down to 0.004
WEIGHT_SHIFT = 2.0**6  # float16 dequantised weights: |weight| < 1023, full precision down to 1e-6 (trained ones lie around 0.01)


def unsupported(x: Any, ids: Any, values: tuple[Any, Any, Any], scales: tuple[Any, Any, Any], config: Config | None = None) -> str | None:
    """Why the kernels cannot take these (arrays or shapes), or None. values, scales: those of gate, up and down."""
    config = config or measured()
    pairs = min(x.shape[0], config.tokens_per_pass) * ids.shape[1]
    if values[0].dtype not in (jnp.float8_e4m3fn, jnp.bfloat16):
        return f"weights are {values[0].dtype}"
    if pairs * max(x.shape[1], values[0].shape[1]) >= 2**31:
        return f"{pairs} token-expert pairs a pass exceed int32 offsets: lower tokens_per_pass"
    if values[0].shape[0] * pl.next_power_of_2(pairs) >= 2**32:
        return f"{pairs} pairs and {values[0].shape[0]} experts do not fit one 32-bit sort key"
    return next((reason for v, s in zip(values, scales, strict=True) if (reason := bad_weight(v, s))), None)


def sort_by_expert(ids: Int[Array, "T k"], experts: int) -> tuple[Int[Array, " pairs"], Int[Array, " edges"]]:
    """(order, first): order[i] is the pair (token * k + choice) at sorted position i, first[e] where expert e's pairs begin
    (first[experts]: all).

    One sort of one 32-bit key: expert in the high bits, pair in the low ones.
    """
    bits = max(ids.size - 1, 1).bit_length()
    key = lax.sort((ids.reshape(-1).astype(jnp.uint32) << bits) | jnp.arange(ids.size, dtype=jnp.uint32))
    edge = jnp.arange(experts + 1, dtype=jnp.uint32) << bits
    first = jnp.searchsorted(key, edge, method="scan_unrolled").astype(jnp.int32)
    return (key & jnp.uint32(2**bits - 1)).astype(jnp.int32), first


def tiles(first: Int[Array, " edges"], pairs: int, rows: int) -> tuple[Int[Array, " tiles"], Int[Array, " tiles"], Int[Array, " tiles"]]:
    """(expert, start, live) of each tile: it covers sorted positions start and on, `live` of at most `rows` of them (0: an unused tile).

    The number of tiles is the bound pairs / rows + min(experts, pairs): each expert wastes part of one.
    """
    experts = first.shape[0] - 1
    counts = first[1:] - first[:-1]
    tiles_of = -(-counts // rows)
    last = jnp.cumsum(tiles_of)
    tile = jnp.arange(pairs // rows + min(experts, pairs), dtype=jnp.int32)
    expert = jnp.minimum((last[None, :] <= tile[:, None]).sum(1, dtype=jnp.int32), experts - 1)
    inside = (tile - (last[expert] - tiles_of[expert])) * rows
    live = jnp.where(tile < last[-1], jnp.clip(counts[expert] - inside, 0, rows), 0)
    return expert, jnp.where(live > 0, first[expert] + inside, 0), live


def _multiply(
    x_ref: Any,
    row_index: Any,
    weights: list[tuple[Any, Any]],
    expert: Any,
    column: Any,
    *,
    outputs: int,
    inputs: int,
    config: Grouped,
) -> list[Float[Array, "*shape"]]:
    """Inside a kernel: x[rows] @ weight[expert, columns].T for each weight, float32 [rows, columns].

    x_ref [tokens, in], read at row_index [rows]. weights: (values ref [E, out, in], scales ref or None).
    """
    out_index = span(column, config.columns)
    depth = config.depth
    partial_columns, partial_depth = outputs % config.columns != 0, inputs % depth != 0

    def scale_of(step: Any) -> list[Any]:
        block = step * depth // BLOCK
        block = jnp.minimum(block, (inputs - 1) // BLOCK)
        return [None if s is None else s[expert, column // BLOCK, block] for _, s in weights]

    def body(step: Any, carry: tuple) -> tuple:
        sums, scales = carry
        inner = span(step * depth, depth)
        x_mask = jnp.broadcast_to((inner < inputs)[None, :], (config.rows, depth)) if partial_depth else None
        mask = (out_index < outputs)[:, None] & (inner < inputs)[None, :] if partial_columns or partial_depth else None
        x = plt.load(x_ref.at[outer(row_index, inner)], mask=x_mask)
        if partial_depth:
            x = jnp.where(x_mask, x, jnp.zeros_like(x))
        tiles = [plt.load(v.at[outer(expert, out_index, inner)], mask=mask) for v, _ in weights]
        following = scale_of(step + 1)  # a step ahead: a scalar load would otherwise hold up every step
        out = []
        for tile, scale, total in zip(tiles, scales, sums, strict=True):
            if scale is None:
                wide = tile
            elif x.dtype == jnp.float16:
                wide = to_float16(tile, config.conversion)
                if config.scaling == "weights":
                    wide = wide * (scale * WEIGHT_SHIFT).astype(jnp.float16)
            else:
                wide = to_float32(tile, config.conversion)
                if config.scaling == "weights":
                    wide = wide * scale
            if mask is not None:
                wide = jnp.where(mask, wide, jnp.zeros_like(wide))  # masked lanes hold anything, NaN included
            tile = wide.astype(x.dtype)
            part = _dot(tile, x) if config.weights_first else _dot(x, tile)
            if scale is not None and config.scaling == "partial":
                part = part * scale
            out.append(total + part)
        return tuple(out), tuple(following)

    shape = (config.columns, config.rows) if config.weights_first else (config.rows, config.columns)
    start = (tuple(jnp.zeros(shape, jnp.float32) for _ in weights), tuple(scale_of(0)))
    sums, _ = lax.fori_loop(0, -(-inputs // depth), body, start)
    shift = 1.0
    if x_ref.dtype == jnp.float16:
        shift = 1 / ACTIVATION_SHIFT / (WEIGHT_SHIFT if config.scaling == "weights" else 1)
    return [total * shift for total in sums] if shift != 1 else list(sums)


def operand_of(x: Float[Array, "*T in"], dtype: Any) -> Float[Array, "*T in"]:
    """Activations as the tensor cores take them: bfloat16, or float16 moved into its range (both shifts are powers of two, hence exact)."""
    return narrow(x.astype(jnp.float32) * ACTIVATION_SHIFT if dtype == jnp.float16 else x, dtype)


def _dot(a: Float[Array, "m k"], b: Float[Array, "n k"]) -> Float[Array, "m n"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _store(ref: Any, rows: Any, columns: Any, live: Any, value: Array, *, outputs: int, weights_first: bool) -> None:
    value = operand_of(value.T if weights_first else value, ref.dtype)
    rows = jnp.where(live, rows, ref.shape[0])  # nowhere: the interpreter would let a masked row undo the row it repeats
    plt.store(ref.at[outer(rows, columns)], value, mask=live[:, None] & (columns < outputs)[None, :])


def _gate_up_kernel(
    expert_ref,  # i32[tiles] device
    start_ref,  # i32[tiles] device
    live_ref,  # i32[tiles] device
    order_ref,  # i32[pairs] device
    x_ref,  # [T, D] device
    gate_ref,  # [E, F, D] device
    up_ref,  # [E, F, D] device
    *refs,  # gate and up scales [E, F_blocks, D_blocks] device (FP8 only), then hidden [pairs, F] device
    config: Grouped,
    choices: int,
    size: int,
    width: int,
):
    gate_scales_ref, up_scales_ref, hidden_ref = refs if len(refs) == 3 else (None, None, refs[0])
    column, tile = pl.program_id(0) * config.columns, pl.program_id(1)
    rows = live_ref[tile]

    @pl.when(rows > 0)
    def _():
        start = start_ref[tile]
        inside = span(0, config.rows)
        live = inside < rows
        position = start + jnp.minimum(inside, rows - 1)
        token = plt.load(order_ref.at[position]) // choices
        gate, up = _multiply(
            x_ref,
            token,
            [(gate_ref, gate_scales_ref), (up_ref, up_scales_ref)],
            expert_ref[tile],
            column,
            outputs=size,
            inputs=width,
            config=config,
        )
        hidden = gate / (1 + jnp.exp(-gate)) * up
        _store(hidden_ref, position, span(column, config.columns), live, hidden, outputs=size, weights_first=config.weights_first)


def _down_kernel(
    expert_ref,  # i32[tiles] device
    start_ref,  # i32[tiles] device
    live_ref,  # i32[tiles] device
    order_ref,  # i32[pairs] device
    weights_ref,  # f32[pairs] device
    hidden_ref,  # [pairs, F] device
    down_ref,  # [E, D, F] device
    *refs,  # down scales [E, D_blocks, F_blocks] device (FP8 only), then out [pairs, D] device
    config: Grouped,
    size: int,
    width: int,
):
    down_scales_ref, out_ref = refs if len(refs) == 2 else (None, refs[0])
    column, tile = pl.program_id(0) * config.columns, pl.program_id(1)
    rows = live_ref[tile]

    @pl.when(rows > 0)
    def _():
        start = start_ref[tile]
        inside = span(0, config.rows)
        live = inside < rows
        position = start + jnp.minimum(inside, rows - 1)
        pair = plt.load(order_ref.at[position])
        weight = plt.load(weights_ref.at[pair])
        [out] = _multiply(
            hidden_ref,
            position,
            [(down_ref, down_scales_ref)],
            expert_ref[tile],
            column,
            outputs=width,
            inputs=size,
            config=config,
        )
        out = out * (weight[None, :] if config.weights_first else weight[:, None])
        _store(out_ref, pair, span(column, config.columns), live, out, outputs=width, weights_first=config.weights_first)


def expert_mlp(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    values: tuple[Float[Array, "E F D"], Float[Array, "E F D"], Float[Array, "E D F"]],
    scales: tuple[Array | None, Array | None, Array | None] = (None, None, None),
    *,
    out_dtype: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sum over each token's experts of weight * down(silu(gate x) * (up x)), result in `out_dtype` or x's; sums in float32.

    values: gate, up, down as float8_e4m3fn with `scales` one per 128x128 block, or bfloat16 without. Tokens beyond config.tokens_per_pass
    go in several passes. Raises NotImplementedError for what the kernels cannot take.
    """
    config = config or measured(conversion_for())
    if reason := unsupported(x, ids, values, scales, config):
        raise NotImplementedError(f"moe_prefill: {reason}")
    run = partial(_one_pass, values=values, scales=scales, out_dtype=out_dtype or x.dtype, config=config, interpret=interpret)
    tokens, most = x.shape[0], config.tokens_per_pass
    whole = tokens // most * most
    if tokens <= most:
        return run(x, ids, weights)
    batches = jax.tree.map(lambda a: a[:whole].reshape(-1, most, a.shape[1]), (x, ids, weights))
    out = lax.map(lambda batch: run(*batch), batches).reshape(whole, x.shape[1])
    return out if whole == tokens else jnp.concatenate([out, run(x[whole:], ids[whole:], weights[whole:])])


def _one_pass(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    *,
    values: tuple[Array, Array, Array],
    scales: tuple[Array | None, Array | None, Array | None],
    out_dtype: Any,
    config: Config,
    interpret: bool,
) -> Float[Array, "T D"]:
    operand = jnp.float16 if config.gate_up.operand == "float16" and scales[0] is not None else jnp.bfloat16
    order, first = sort_by_expert(ids, values[0].shape[0])
    tables = tuple((order, *tiles(first, ids.size, rows)) for rows in (config.gate_up.rows, config.down.rows))
    out = matmuls(tables, operand_of(x, operand), weights, values, scales, config=config, interpret=interpret)
    out = out.reshape(*ids.shape, -1).astype(jnp.float32).sum(1)
    return (out / ACTIVATION_SHIFT if operand == jnp.float16 else out).astype(out_dtype)


def matmuls(
    tables: tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array, Array]],
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    values: tuple[Array, Array, Array],
    scales: tuple[Array | None, Array | None, Array | None],
    *,
    config: Config,
    interpret: bool = False,
) -> Float[Array, "pairs D"]:
    """Both launches: each pair's weighted output in x's format, in pair order. tables: what `tiles` says for the rows of each, behind the
    order of the pairs. x: as `operand_of` makes it.
    """
    settings = {"choices": weights.shape[1], "config": config.gate_up, "hidden_dtype": x.dtype}
    hidden = gate_up(tables[0], x, values[:2], scales[:2], **settings, interpret=interpret)
    return down(tables[1], weights, hidden, values[2], scales[2], config=config.down, interpret=interpret)


def gate_up(
    table: tuple[Array, Array, Array, Array],
    x: Float[Array, "T D"],
    values: tuple[Array, Array],
    scales: tuple[Array | None, Array | None],
    *,
    choices: int,
    config: Grouped,
    hidden_dtype: Any = jnp.bfloat16,
    interpret: bool = False,
) -> Float[Array, "pairs F"]:
    """silu(gate x) * (up x) as the next matmul takes it, a row per (token, choice), in the table's sorted order."""
    size, width = values[0].shape[1:]
    order, *table = table
    operands = (*table, order, x, *values, *_present(*scales))
    return pl.pallas_call(
        partial(_gate_up_kernel, config=config, choices=choices, size=size, width=width),
        grid=(-(-size // config.columns), table[0].shape[0]),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((order.shape[0], size), hidden_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="moe_prefill_gate_up",
    )(*operands)


def down(
    table: tuple[Array, Array, Array, Array],
    weights: Float[Array, "T k"],
    hidden: Float[Array, "pairs F"],
    values: Float[Array, "E D F"],
    scales: Array | None,
    *,
    config: Grouped,
    interpret: bool = False,
) -> Float[Array, "pairs D"]:
    """weight * (down hidden) in hidden's format, a row per (token, choice), back in pair order."""
    width, size = values.shape[1:]
    order, *table = table
    operands = (*table, order, weights.reshape(-1).astype(jnp.float32), hidden, values, *_present(scales))
    return pl.pallas_call(
        partial(_down_kernel, config=config, size=size, width=width),
        grid=(-(-width // config.columns), table[0].shape[0]),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((order.shape[0], width), hidden.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="moe_prefill_down",
    )(*operands)


def _present(*arrays: Array | None) -> list[Array]:
    return [array for array in arrays if array is not None]
