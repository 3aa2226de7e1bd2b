"""Weights that stay FP8: e4m3 values with a scale per block, as Qwen's FP8 checkpoints store them; dequantising is the matmul's job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hga_jax.config import ModelConfig
from hga_jax.pytree import register
from pallas_kernels import fp8_matvec
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.fp8 import BLOCK
from pallas_kernels.normalise import Norm, narrow, result_dtype, rms_norm


@register
@dataclass(frozen=True)
class BlockScaled:
    """A weight [..., out, in] as values (float8_e4m3fn) times scales, one per block (those at the edges may be partial)."""

    values: Float[Array, "*E out in"]
    scales: Float[Array, "*E out_blocks in_blocks"]
    block: tuple[int, int] = field(default=(128, 128), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index) -> BlockScaled:
        """Index leading (expert) dimensions only."""
        return BlockScaled(self.values[index], self.scales[index], self.block)


def bounded_dtype(config: ModelConfig, dtype: Any) -> Any:
    """What a run in `dtype` rounds numbers of bounded range to: normalised inputs of products, queries, keys, values and what they mix to.

    float16 in place of bfloat16 where the checkpoint is FP8: as wide and as fast, with 11 bits of mantissa for 8. Products of gate and up
    are not bounded, trained models pass 65504 there; they stay bfloat16.
    """
    return jnp.float16 if config.fp8_block is not None and dtype == jnp.bfloat16 else dtype


MAX_ROWS = fp8_matvec.MAX_ROWS
Weight = Array | BlockScaled
# Leaves of an abstract decoder are shapes, or BlockScaled of shapes.
AbstractWeight = Weight | jax.ShapeDtypeStruct


def unusual_block(*weights: Weight) -> str | None:
    """Why the kernels cannot take these weights' blocks, or None."""
    odd = [w.block for w in weights if isinstance(w, BlockScaled) and w.block != (BLOCK, BLOCK)]
    return f"scale blocks of {odd[0]} are not {BLOCK}x{BLOCK}" if odd else None


def dequantize(weight: Weight, dtype) -> Array:
    """The plain array: values * scales in float32, then `dtype`."""
    if not isinstance(weight, BlockScaled):
        return weight if weight.dtype == dtype else narrow(weight, dtype)
    rows, columns = weight.shape[-2:]
    scales = jnp.repeat(weight.scales, weight.block[0], axis=-2)[..., :rows, :]
    scales = jnp.repeat(scales, weight.block[1], axis=-1)[..., :columns]
    return narrow(weight.values.astype(jnp.float32) * scales.astype(jnp.float32), dtype)


def matmul(
    x: Float[Array, "*B in"],
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Float[Array, "*B out"] | None = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B out"]:
    """x @ weight.T with weight [out, in], float32 accumulation.

    norm: of x, before; residual: added to the result before it is rounded to `out_dtype`, which is by default the residual's dtype, or the
    norm's, or x's. implementation None: the matvec kernel for one row (FP8: a few rows) on a CUDA GPU, plain XLA otherwise.
    """
    return joined_matmul(x, (weight,), norm=norm, residual=residual, out_dtype=out_dtype, implementation=implementation)


def joined_matmul(
    x: Float[Array, "*B in"],
    weights: Sequence[Weight],
    *,
    norm: Norm | None = None,
    residual: Float[Array, "*B total"] | None = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*B total"]:
    """The products of `matmul` with several weights, side by side; one launch where the matvec kernel runs."""
    out_dtype = out_dtype or result_dtype(x, norm, residual)
    rows = x.reshape(-1, x.shape[-1])
    pairs = [(weight.values, weight.scales) if isinstance(weight, BlockScaled) else (weight, None) for weight in weights]
    few = MAX_ROWS if all(isinstance(weight, BlockScaled) for weight in weights) else 1
    if implementation == "pallas" or rows.shape[0] <= few:
        reason = unusual_block(*weights) or fp8_matvec.unsupported(rows, pairs)
        if choose("matmul", implementation, reason) == "pallas":
            added = None if residual is None else residual.reshape(rows.shape[0], -1)
            out = fp8_matvec.matvecs(rows, pairs, norm=norm, residual=added, out_dtype=out_dtype)
            return out.reshape(*x.shape[:-1], -1)
    if norm is not None:
        x = rms_norm(x, norm)
    wide = [jnp.einsum("...i,oi->...o", x, dequantize(weight, x.dtype), preferred_element_type=jnp.float32) for weight in weights]
    out = wide[0] if len(wide) == 1 else jnp.concatenate(wide, axis=-1)
    return narrow(out if residual is None else residual + out, out_dtype)


def gated(gate: Float[Array, "*T F"], up: Float[Array, "*T F"], dtype: Any = None) -> Float[Array, "*T F"]:
    """silu(gate) * up in float32, then `dtype`, by default theirs."""
    return narrow(jax.nn.silu(gate.astype(jnp.float32)) * up, dtype or up.dtype)
