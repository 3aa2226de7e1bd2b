"""Expert MLP for a few tokens (Pallas, Triton lowering).

Launch 1: hidden[pair] = silu(gate[e] x) * (up[e] x), a program per (rows of F, token-expert pair).
Launch 2: out[t] = sum over its pairs of weight * down[e] hidden, a program per (rows of D, token); the sum over experts stays in registers,
so there are no atomics and the result does not depend on scheduling.
Floor at Qwen3-30B-A3B (D 2048, F 768, 8 experts): 25.2 + 12.6 MB of weights, 12.6 us at 3 TB/s.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8 import BLOCK, conversion_for
from pallas_kernels.fp8_matvec.config import Config as Matvec
from pallas_kernels.fp8_matvec.kernel import WEIGHTS, bad_weight, convert, pieces, row_dots
from pallas_kernels.indexing import outer, span
from pallas_kernels.moe_decode.config import Config, measured
from pallas_kernels.normalise import Norm, narrow, result_dtype

MAX_TOKENS = 4


def unsupported(x: Any, ids: Any, values: tuple[Any, Any, Any], scales: tuple[Any, Any, Any]) -> str | None:
    """Why the kernels cannot take these (arrays or shapes), or None. values, scales: those of gate, up and down."""
    if not 1 <= x.shape[0] <= MAX_TOKENS:
        return f"{x.shape[0]} tokens are not 1 to {MAX_TOKENS}"
    if ids.shape[1] > 32:
        return f"{ids.shape[1]} experts a token exceed 32: the down kernel unrolls them"
    if values[0].dtype not in WEIGHTS:
        return f"weights are {values[0].dtype}"
    return next((reason for v, s in zip(values, scales, strict=True) if (reason := bad_weight(v, s))), None)


def _gate_up_kernel(
    ids_ref,  # i32[pairs] device
    x_ref,  # [T, D] device
    gate_ref,  # [E, F, D] device
    up_ref,  # [E, F, D] device
    *refs,  # device: (FP8) gate and up scales [E, F_blocks, D_blocks], (with norm) its weight [D], and last hidden f32 [pairs, F]
    config: Matvec,
    choices: int,
    size: int,
    width: int,
    fp8: bool,
    eps: float | None,
):
    gate_scales_ref, up_scales_ref = refs[:2] if fp8 else (None, None)
    hidden_ref = refs[-1]
    row, pair = pl.program_id(0) * config.rows, pl.program_id(1)
    expert = ids_ref[pair]
    [[gate], [up]] = row_dots(
        [(x_ref, pair // choices)],
        [(gate_ref, gate_scales_ref, (expert,)), (up_ref, up_scales_ref, (expert,))],
        row,
        inputs=width,
        outputs=size,
        config=config,
        norm=None if eps is None else (refs[-2], eps),
    )
    hidden = gate / (1 + jnp.exp(-gate)) * up
    rows = span(row, config.rows)
    plt.store(hidden_ref.at[outer(pair, rows)], hidden, mask=rows < size if size % config.rows else None)


def _down_kernel(
    ids_ref,  # i32[pairs] device
    weights_ref,  # f32[pairs] device
    hidden_ref,  # f32[pairs, F] device
    down_ref,  # [E, D, F] device
    *refs,  # device: (FP8) down scales [E, D_blocks, F_blocks], (with residual) and last out [T, D]
    config: Matvec,
    choices: int,
    size: int,
    width: int,
    fp8: bool,
    add: bool,
):
    scales_ref, out_ref = refs[0] if fp8 else None, refs[-1]
    rows = config.rows
    row, token = pl.program_id(0) * rows, pl.program_id(1)
    experts = pl.next_power_of_2(choices)
    choice = span(0, experts)
    pair = token * choices + jnp.minimum(choice, choices - 1)
    expert = plt.load(ids_ref.at[pair])
    weight = jnp.where(choice < choices, plt.load(weights_ref.at[pair]), 0.0)
    row_index = span(row, rows)
    partial_rows = width % rows != 0
    todo = pieces(0, size, config.columns)
    # Tiles are [rows, experts, columns]: threads spread over columns and experts first, so one value of `hidden` in a register serves all
    # rows. Every load of the program is issued before the first value is used.
    tiles, vectors, factors = [], [], []
    for column, piece, over in todo:
        mask = None
        if over or partial_rows or experts != choices:
            inside = (row_index < width)[:, None, None] & (span(column, piece) < size)[None, None, :]
            mask = inside & (choice < choices)[None, :, None]
        index = (expert[None, :, None], row_index[:, None, None], span(column, piece)[None, None, :])
        tiles.append((plt.load(down_ref.at[index], mask=mask), mask))
    for column, piece, over in todo:
        inside = (span(column, piece) < size) if over else None
        hidden = plt.load(hidden_ref.at[outer(pair, span(column, piece))], mask=None if inside is None else inside[None, :])
        vectors.append(jnp.where(inside[None, :], hidden, 0.0) if over else hidden)
        lane = min(piece, 16 // down_ref.dtype.itemsize)
        factor = jnp.broadcast_to(weight[:, None], (experts, piece // lane))
        if scales_ref is not None:
            block = jnp.minimum((column + span(0, piece // lane) * lane) // BLOCK, (size - 1) // BLOCK)
            factor = factor * plt.load(scales_ref.at[outer(expert, row // BLOCK, block)])
        factors.append(factor)
    sums: dict[int, Array] = {}
    for (tile, mask), hidden, factor in zip(tiles, vectors, factors, strict=True):
        wide = convert(tile, mask, config.conversion)
        groups = factor.shape[1]
        part = (wide * hidden[None]).reshape(rows, experts, groups, hidden.shape[1] // groups).sum(axis=3) * factor[None]
        sums[groups] = sums[groups] + part if groups in sums else part
    total = jnp.zeros((rows,), jnp.float32)
    for part in sums.values():
        total = total + part.sum(axis=2).sum(axis=1)
    mask = row_index < width if partial_rows else None
    if add:
        total = total + plt.load(refs[-2].at[outer(token, row_index)], mask=mask).astype(jnp.float32)
    plt.store(out_ref.at[outer(token, row_index)], narrow(total, out_ref.dtype), mask=mask)


def expert_mlp(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    values: tuple[Float[Array, "E F D"], Float[Array, "E F D"], Float[Array, "E D F"]],
    scales: tuple[Array | None, Array | None, Array | None] = (None, None, None),
    *,
    norm: Norm | None = None,
    residual: Float[Array, "T D"] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sum over each token's experts of weight * down(silu(gate x) * (up x)), T from 1 to 4.

    values: gate, up, down as float8_e4m3fn with `scales` one per 128x128 block, or plain without. norm: of x, before; residual: added to
    the result. The result has the dtype of x, or of one of these. Accumulation and the hidden vector are float32.
    Raises NotImplementedError for what the kernels cannot take.
    """
    if reason := unsupported(x, ids, values, scales):
        raise NotImplementedError(f"moe_decode: {reason}")
    config = config or measured(conversion_for())
    tokens, width = x.shape
    choices, size = ids.shape[1], values[0].shape[1]
    pairs = ids.reshape(-1).astype(jnp.int32)
    call = partial(pl.pallas_call, out_specs=pl.no_block_spec, interpret=interpret)
    fp8 = scales[0] is not None
    gate_up = (pairs, x, values[0], values[1], *(scales[:2] if fp8 else ()), *(() if norm is None else (norm.weight,)))
    eps = None if norm is None else norm.eps
    hidden = call(
        partial(_gate_up_kernel, config=config.gate_up, choices=choices, size=size, width=width, fp8=fp8, eps=eps),
        grid=(-(-size // config.gate_up.rows), tokens * choices),
        in_specs=[pl.no_block_spec] * len(gate_up),
        out_shape=jax.ShapeDtypeStruct((tokens * choices, size), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=config.gate_up.warps, num_stages=1),
        name="moe_decode_gate_up",
    )(*gate_up)
    down = (pairs, weights.reshape(-1).astype(jnp.float32), hidden, values[2])
    down += ((scales[2],) if fp8 else ()) + (() if residual is None else (residual,))
    return call(
        partial(_down_kernel, config=config.down, choices=choices, size=size, width=width, fp8=fp8, add=residual is not None),
        grid=(-(-width // config.down.rows), tokens),
        in_specs=[pl.no_block_spec] * len(down),
        out_shape=jax.ShapeDtypeStruct((tokens, width), result_dtype(x, norm, residual)),
        compiler_params=plt.CompilerParams(num_warps=config.down.warps, num_stages=1),
        name="moe_decode_down",
    )(*down)
