"""Matrix times a few vectors, bound by reading the matrix once from device memory (Pallas, Triton lowering).

Floor: bytes of W over the read rate. One value is used once or a few times, so the tensor cores would not help: each thread multiplies the
16 bytes it loaded. Every load of a program is issued before the first is used, which is what keeps enough bytes in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.fp8 import BLOCK, Conversion, conversion_for, to_float32
from pallas_kernels.fp8_matvec.config import Config, measured
from pallas_kernels.indexing import outer, span
from pallas_kernels.normalise import Norm, inverse_rms, narrow, result_dtype

MAX_ROWS = 8
WEIGHTS = (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float16, jnp.float32)  # the first with scales, the others without


def unsupported(x: Any, weights: Sequence[tuple[Any, Any]]) -> str | None:
    """Why the kernel cannot take these (values, scales or None) pairs, arrays or shapes, or None."""
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        return f"x of shape {x.shape} is not 1 to {MAX_ROWS} rows"
    if len({scales is None for _, scales in weights}) > 1:
        return "weights with and without scales in one launch"
    for values, scales in weights:
        if values.dtype not in WEIGHTS:
            return f"weights are {values.dtype}"
        if reason := bad_weight(values, scales):
            return reason
    return None


def bad_weight(values: Any, scales: Any) -> str | None:
    """The part of `unsupported` that looks at one weight."""
    if (values.dtype == jnp.float8_e4m3fn) != (scales is not None):
        return f"{values.dtype} weights {'without' if scales is None else 'with'} scales"
    blocks = (*values.shape[:-2], -(-values.shape[-2] // BLOCK), -(-values.shape[-1] // BLOCK))
    if scales is not None and tuple(scales.shape) != blocks:
        return f"scales of shape {scales.shape} are not one per {BLOCK}x{BLOCK} block {blocks}"
    if values.size >= 2**31:
        return f"weights have {values.size} values and kernel offsets are int32"
    return None


def pieces(start: int, stop: int, columns: int) -> list[tuple[int, int, bool]]:
    """[start, stop) as (first column, width, reaches past stop), widths powers of two of at most `columns`."""
    out = []
    while start < stop:
        width = columns
        while width > stop - start and width > BLOCK:
            width //= 2
        out.append((start, width, start + width > stop))
        start += width
    return out


def row_dots(
    xs: list[tuple[Any, Any]],
    weights: list[tuple[Any, Any, tuple]],
    row: Any,
    *,
    inputs: int,
    outputs: int,
    config: Any,
    norm: tuple[Any, float] | None = None,
) -> list[list[Float[Array, " rows"]]]:
    """Inside a kernel: for each weight and each x, the float32 dot products of rows [row, row + config.rows).

    xs: (ref [T, in], row). weights: (values ref, scales ref or None, leading index) whose rest is [out, in]. norm: (weight ref [in], eps)
    of the RMS normalisation that each x passes first.
    """
    rows = config.rows
    row_index = span(row, rows)
    partial_rows = outputs % rows != 0
    sums: dict[tuple, Array] = {}
    todo = pieces(0, inputs, config.columns)
    inverses: list[Array] = []
    for first in range(0, len(todo), config.in_flight):
        loaded = []
        for column, width, over in todo[first : first + config.in_flight]:
            columns = span(column, width)
            mask = (row_index < outputs)[:, None] & (columns < inputs)[None, :] if over or partial_rows else None
            tiles = [plt.load(v.at[outer(*lead, row_index, columns)], mask=mask) for v, _, lead in weights]
            lane = min(width, 16 // tiles[0].dtype.itemsize)  # values one thread loads at once: their sum needs no other thread
            loaded.append((column, width, over, lane, tiles, mask))
        for column, width, over, lane, tiles, mask in loaded:
            inside = (span(column, width) < inputs) if over else None
            vectors = [plt.load(x.at[outer(t, span(column, width))], mask=inside) for x, t in xs]
            if norm is not None:
                inverses = inverses or [inverse_rms(x, t, inputs, norm[1]) for x, t in xs]  # behind the first loads of weights
                scale = plt.load(norm[0].at[outer(span(column, width))], mask=inside)
                scale = scale.astype(jnp.float32)
                vectors = [scale * (vector.astype(jnp.float32) * inverse) for vector, inverse in zip(vectors, inverses, strict=True)]
            vectors = [vector.astype(jnp.float32) for vector in vectors]
            if over:
                vectors = [jnp.where(inside, vector, 0.0) for vector in vectors]
            block = jnp.minimum((column + jnp.arange(width // lane) * lane) // BLOCK, (inputs - 1) // BLOCK)
            factors = [None if s is None else plt.load(s.at[outer(*lead, row // BLOCK, block)]) for _, s, lead in weights]
            for w, (tile, factor) in enumerate(zip(tiles, factors, strict=True)):
                wide = convert(tile, mask, config.conversion)
                for t, vector in enumerate(vectors):
                    part = (wide * vector[None, :]).reshape(rows, width // lane, lane).sum(axis=2)
                    if factor is not None:
                        part = part * factor[None, :]
                    key = (w, t, width // lane)
                    sums[key] = sums[key] + part if key in sums else part
    totals = [[jnp.zeros((rows,), jnp.float32) for _ in xs] for _ in weights]
    for (w, t, _), part in sums.items():
        totals[w][t] = totals[w][t] + part.sum(axis=1)
    return totals


def convert(tile: Array, mask: Array | None, conversion: Conversion) -> Array:
    """Inside a kernel: a loaded tile in float32, zero where masked."""
    wide = to_float32(tile, conversion)
    return wide if mask is None else jnp.where(mask, wide, 0.0)  # masked lanes hold anything, NaN included


def _kernel(
    x_ref,  # [T, in] device
    *refs,  # device: values [out, in] of each weight, (FP8) scales of each, (with norm) [in], (with residual) and last out [T, sum of out]
    config: Config,
    tokens: int,
    outputs: tuple[int, ...],
    inputs: int,
    fp8: bool,
    eps: float | None,
):
    *refs, out_ref = refs
    count = len(outputs)
    values, scales = refs[:count], refs[count : 2 * count] if fp8 else (None,) * count
    rest = refs[2 * count if fp8 else count :]
    norm = None if eps is None else (rest[0], eps)
    residual_ref = rest[-1] if len(rest) > (eps is not None) else None
    program, begin, offset = pl.program_id(0), 0, 0
    for size, values_ref, scales_ref in zip(outputs, values, scales, strict=True):
        blocks = -(-size // config.rows)

        @pl.when((program >= begin) & (program < begin + blocks))
        def _(size=size, values_ref=values_ref, scales_ref=scales_ref, begin=begin, offset=offset):
            row = (program - begin) * config.rows
            [dots] = row_dots(
                [(x_ref, t) for t in range(tokens)],
                [(values_ref, scales_ref, ())],
                row,
                inputs=inputs,
                outputs=size,
                config=config,
                norm=norm,
            )
            here = span(row, config.rows)
            mask = here < size if size % config.rows else None
            for t, dot in enumerate(dots):
                index = outer(t, offset + here)
                if residual_ref is not None:
                    dot = dot + plt.load(residual_ref.at[index], mask=mask).astype(jnp.float32)
                plt.store(out_ref.at[index], narrow(dot, out_ref.dtype), mask=mask)

        begin, offset = begin + blocks, offset + size


def matvec(
    x: Float[Array, "T in"],
    values: Float[Array, "out in"],
    scales: Float[Array, "out_blocks in_blocks"] | None = None,
    *,
    out_dtype: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T out"]:
    """x @ (values * scales).T accumulated in float32, T from 1 to 8; the result has x's dtype unless `out_dtype` says otherwise.

    values: float8_e4m3fn with one scale per 128x128 block, or another of WEIGHTS without scales. Raises NotImplementedError for anything
    else. The weight is exact (no rounding to bfloat16 of value times scale), so results differ from the XLA twin by that rounding, about
    2**-9.
    """
    return matvecs(x, [(values, scales)], out_dtype=out_dtype, config=config, interpret=interpret)


def matvecs(
    x: Float[Array, "T in"],
    weights: Sequence[tuple[Float[Array, "_out in"], Array | None]],
    *,
    norm: Norm | None = None,
    residual: Float[Array, "T total"] | None = None,
    out_dtype: Any = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T total"]:
    """The products of `matvec` with several (values, scales), side by side, in one launch and without a joined copy of the weights.

    norm: of x, before; residual: added to the result, in float32. The result then has the dtype of one of these. A launch costs 2.3 us on
    an H100 however little it does: q, k and v one by one took 9.5 us where this takes 6.2, and normalising and adding apart another 3 us
    each.
    """
    if reason := unsupported(x, weights):
        raise NotImplementedError(f"fp8_matvec: {reason}")
    config = config or measured(x.shape[0], conversion_for())
    outputs = tuple(values.shape[0] for values, _ in weights)
    scales = [scales for _, scales in weights if scales is not None]
    operands = [x, *(values for values, _ in weights), *scales]
    operands += ([] if norm is None else [norm.weight]) + ([] if residual is None else [residual])
    kernel = partial(
        _kernel,
        config=config,
        tokens=x.shape[0],
        outputs=outputs,
        inputs=x.shape[1],
        fp8=bool(scales),
        eps=None if norm is None else norm.eps,
    )
    return pl.pallas_call(
        kernel,
        grid=(sum(-(-size // config.rows) for size in outputs),),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], sum(outputs)), out_dtype or result_dtype(x, norm, residual)),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name=f"fp8_matvec_{sum(outputs)}x{x.shape[1]}",  # tells the projections apart in a profile
    )(*operands)
