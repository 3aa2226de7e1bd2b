"""Two kernels around the stored sketches, one program per (chunk, kv head): keys -> summaries -> what probes are compared with.

Plain XLA needs a dozen passes over arrays the size of the keys for each; here keys are read once and sketches once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.indexing import outer, span
from pallas_kernels.limits import check_offsets
from pallas_kernels.sketch_routing.api import LEVELS, THRESHOLDS

INNER, OUTER, EDGE = LEVELS[2], LEVELS[3], THRESHOLDS[2]


def _dot(a: Float[Array, "m k"], b: Float[Array, "n k"], exact: bool) -> Float[Array, "m n"]:
    """a @ b.T of float32 arrays, to 2^-16 of the products unless `exact`: three bfloat16 products instead of one on plain cores."""

    def product(x: Array, y: Array, precision: Any = None) -> Array:
        return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

    if exact:
        return product(a, b, lax.Precision.HIGHEST)
    high_a, high_b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    low_a, low_b = ((x - high.astype(jnp.float32)).astype(jnp.bfloat16) for x, high in ((a, high_a), (b, high_b)))
    return product(high_a, high_b) + (product(high_a, low_b) + product(low_a, high_b))


def _quarter(rotation_ref: Any, quarter: int, byte: Array, code_bytes: int, transposed: bool) -> tuple[Array, Array]:
    """Columns of the rotation that a quarter of the codes stands for, [bytes, H] or [H, bytes], zero where there are none; and where."""
    head_dim = rotation_ref.shape[0]
    dim = span(0, pl.next_power_of_2(head_dim))
    column = quarter * code_bytes + byte
    real = (byte < code_bytes) & (column < head_dim)
    if transposed:
        mask = (dim < head_dim)[:, None] & real[None, :]
        return plgpu.load(rotation_ref.at[outer(dim, column)], mask=mask, other=0), real
    rows = plgpu.load(rotation_ref.at[dim[None, :], column[:, None]], mask=real[:, None] & (dim < head_dim)[None, :], other=0)
    return rows, real


def _sketch_kernel(
    chunks_ref,  # [2] i32: first chunk to summarise, end
    pages_ref,  # [K, P, 2, g, H]
    told_ref,  # [K, H] f32
    rotation_ref,  # [H, H] f32
    _means_ref,  # the buffers of the outputs
    _codes_ref,
    _scales_ref,
    means_ref,  # [K, C, H] out
    codes_ref,  # [K, S, B] u8 out
    scales_ref,  # [K, S] out
    *,
    chunk_size: int,
    exact: bool,
):
    chunk, k = chunks_ref[0] + pl.program_id(0), pl.program_id(1)
    group_size, head_dim, code_bytes = pages_ref.shape[3], pages_ref.shape[4], codes_ref.shape[2]

    @pl.when(chunk < chunks_ref[1])
    def _():
        dim = span(0, pl.next_power_of_2(head_dim))
        token = chunk * chunk_size + span(0, chunk_size)
        at = (jnp.broadcast_to(k, (1, 1)), (token // group_size)[:, None], jnp.zeros((1, 1), jnp.int32), (token % group_size)[:, None])
        mask = jnp.broadcast_to((dim < head_dim)[None, :], (chunk_size, dim.shape[0]))
        keys = plgpu.load(pages_ref.at[(*at, dim[None, :])], mask=mask, other=0).astype(jnp.float32)
        mean = (jnp.sum(keys, axis=0) / chunk_size).astype(means_ref.dtype)
        plgpu.store(means_ref.at[outer(k, chunk, dim)], mean, mask=dim < head_dim)
        told = plgpu.load(told_ref.at[outer(k, dim)], mask=dim < head_dim, other=0)
        residual = (keys - mean.astype(jnp.float32)[None, :]) * told[None, :]

        byte = span(0, max(16, pl.next_power_of_2(code_bytes)))
        quarters = []
        for quarter in range(4):
            rotation, real = _quarter(rotation_ref, quarter, byte, code_bytes, transposed=False)
            quarters.append((_dot(residual, rotation, exact), real[None, :]))
        edge = EDGE * jnp.sqrt(sum(jnp.sum(r * r, axis=1) for r, _ in quarters) / head_dim)[:, None]
        packed = jnp.zeros((chunk_size, byte.shape[0]), jnp.int32)
        along, norm = jnp.zeros((chunk_size,), jnp.float32), jnp.zeros((chunk_size,), jnp.float32)
        for quarter, (r, real) in enumerate(quarters):
            positive = r >= 0
            outermost = (jnp.abs(r) >= edge) & (positive | (r < -edge))  # on a threshold the upper level
            size = jnp.where(real, jnp.where(outermost, OUTER, INNER), 0.0)
            along, norm = along + jnp.sum(jnp.abs(r) * size, axis=1), norm + jnp.sum(size * size, axis=1)
            code = jnp.where(positive, jnp.where(outermost, 3, 2), jnp.where(outermost, 0, 1))
            packed = packed | (jnp.where(real, code, 0) << (2 * quarter))
        plgpu.store(codes_ref.at[outer(k, token, byte)], packed.astype(jnp.uint8), mask=jnp.broadcast_to(byte < code_bytes, packed.shape))
        plgpu.store(scales_ref.at[outer(k, token)], (along / norm).astype(scales_ref.dtype))


def sketch_pages(
    pages: Float[Array, "K P 2 g H"],
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    told: Float[Array, "K H"],
    rotation: Float[Array, "H H"],
    first_chunk: Int[Array, ""],
    end_chunk: Int[Array, ""],
    most: int,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "K C H"], UInt8[Array, "K S B"], Float[Array, "K S"]]:
    """Means, codes and scales with those of at most `most` chunks from first_chunk to end_chunk - 1 taken anew from the keys, in place.

    told: 1 at the coordinates in which residuals are remembered, 0 elsewhere.
    """
    check_offsets(pages=pages, codes=codes)
    chunk_size = codes.shape[1] // means.shape[1]
    old = (means, codes, scales)
    return tuple(
        pl.pallas_call(
            partial(_sketch_kernel, chunk_size=chunk_size, exact=pages.dtype == jnp.float32),
            grid=(most, pages.shape[0]),
            in_specs=[pl.no_block_spec] * 7,
            out_specs=[pl.no_block_spec] * 3,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old],
            input_output_aliases={4: 0, 5: 1, 6: 2},
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="sketch_pages",
        )(jnp.stack([first_chunk, end_chunk]).astype(jnp.int32), pages, told, rotation.astype(jnp.float32), *old)
    )


def _unsketch_kernel(
    end_ref,  # [1] i32: chunks that there are sketches of
    means_ref,  # [K, C, H]
    codes_ref,  # [K, S, B] u8
    scales_ref,  # [K, S]
    rotation_ref,  # [H, H] f32
    keys_ref,  # [K, g, P, H] out
    page_means_ref,  # [K, 1, P, H] out
    spreads_ref,  # [K, P] f32 out
    *,
    chunk_size: int,
):
    chunk, k = pl.program_id(0), pl.program_id(1)
    group_size, head_dim, code_bytes = keys_ref.shape[1], keys_ref.shape[3], codes_ref.shape[2]
    pages = chunk_size // group_size

    @pl.when(chunk < end_ref[0])
    def _():
        dim = span(0, pl.next_power_of_2(head_dim))
        real_dim = dim < head_dim
        byte = span(0, max(16, pl.next_power_of_2(code_bytes)))
        token = chunk * chunk_size + span(0, chunk_size)
        mask = jnp.broadcast_to(byte < code_bytes, (chunk_size, byte.shape[0]))
        codes = plgpu.load(codes_ref.at[outer(k, token, byte)], mask=mask, other=0).astype(jnp.int32)
        residual = jnp.zeros((chunk_size, dim.shape[0]), jnp.float32)
        exact = keys_ref.dtype == jnp.float32
        for quarter in range(4):
            code = (codes >> (2 * quarter)) & 3
            size = jnp.where((code == 0) | (code == 3), OUTER, INNER)
            level = jnp.where(code >= 2, size, -size)
            rotation, _ = _quarter(rotation_ref, quarter, byte, code_bytes, transposed=True)
            if not exact:  # the sketch is off by a third of the residual: rounding to 8 bits adds nothing
                level, rotation = level.astype(jnp.bfloat16), rotation.astype(jnp.bfloat16)
            precision = lax.Precision.HIGHEST if exact else None
            residual += lax.dot_general(
                level, rotation, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )  # fmt: skip
        mean = plgpu.load(means_ref.at[outer(k, chunk, dim)], mask=real_dim, other=0).astype(jnp.float32)
        scale = plgpu.load(scales_ref.at[outer(k, token)]).astype(jnp.float32)
        keys = (mean[None, :] + residual * scale[:, None]).astype(keys_ref.dtype)
        at = (jnp.broadcast_to(k, (1, 1)), (token % group_size)[:, None], (token // group_size)[:, None], dim[None, :])
        plgpu.store(keys_ref.at[at], keys, mask=jnp.broadcast_to(real_dim[None, :], keys.shape))
        by_page = keys.astype(jnp.float32).reshape(pages, group_size, dim.shape[0])
        page_mean = jnp.sum(by_page, axis=1) / group_size
        page = chunk * pages + span(0, pages)
        stored = page_mean.astype(page_means_ref.dtype)
        plgpu.store(page_means_ref.at[outer(k, 0, page, dim)], stored, mask=jnp.broadcast_to(real_dim[None, :], stored.shape))
        off = by_page - page_mean[:, None, :]
        variance = jnp.sum(jnp.sum(off * off, axis=1), axis=1) / (group_size * head_dim)
        plgpu.store(spreads_ref.at[outer(k, page)], jnp.sqrt(variance))


def unsketch(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    rotation: Float[Array, "H H"],
    group_size: int,
    end_chunk: Int[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "K g P H"], Float[Array, "K 1 P H"], Float[Array, "K P"]]:
    """keys.sketched_keys and keys.page_statistics of the first end_chunk chunks; the rest is not written."""
    kv_heads, chunks, head_dim = means.shape
    tokens = codes.shape[1]
    pages = tokens // group_size
    check_offsets(keys=jax.ShapeDtypeStruct((kv_heads, tokens, head_dim), means.dtype))
    return tuple(
        pl.pallas_call(
            partial(_unsketch_kernel, chunk_size=tokens // chunks),
            grid=(chunks, kv_heads),
            in_specs=[pl.no_block_spec] * 5,
            out_specs=[pl.no_block_spec] * 3,
            out_shape=[
                jax.ShapeDtypeStruct((kv_heads, group_size, pages, head_dim), means.dtype),
                jax.ShapeDtypeStruct((kv_heads, 1, pages, head_dim), means.dtype),
                jax.ShapeDtypeStruct((kv_heads, pages), jnp.float32),
            ],
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="unsketch",
        )(end_chunk.reshape(1).astype(jnp.int32), means, codes, scales, rotation.astype(jnp.float32))
    )
