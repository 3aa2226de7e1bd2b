"""What a kernel does to its input vector on the way in, RMS normalisation, and to its result on the way out; and the same in plain JAX."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.indexing import outer, span


class Norm(NamedTuple):
    """weight * x / sqrt(mean(x^2) + eps) in float32. Kernels go on with that; plain JAX rounds it to `dtype`, by default the weight's."""

    weight: Float[Array, " D"]
    eps: float
    dtype: Any = None


def narrow(x: Array, dtype: Any) -> Array:
    """x in `dtype`. What float16 or float8 cannot hold becomes its largest number: one odd activation and not a network of NaN."""
    if dtype not in (jnp.float16, jnp.float8_e4m3fn):
        return x.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def result_dtype(x: Array, norm: Norm | None, residual: Array | None) -> Any:
    """Of a product of the (normalised) x, with a residual added or not."""
    return residual.dtype if residual is not None else norm.weight.dtype if norm is not None else x.dtype


def rms_norm(x: Float[Array, "*T D"], norm: Norm, dtype: Any = None) -> Float[Array, "*T D"]:
    """Normalised and scaled in float32, rounded once, to `dtype`, by default the norm's."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    return narrow(norm.weight.astype(jnp.float32) * normal, dtype or norm.dtype or norm.weight.dtype)


def inverse_rms(x_ref: Any, row: Any, size: int, eps: float) -> Float[Array, ""]:
    """Inside a kernel: what row `row` of x [T, size] is multiplied by."""
    columns = span(0, pl.next_power_of_2(size))
    inside = columns < size
    wide = plt.load(x_ref.at[outer(row, jnp.minimum(columns, size - 1))]).astype(jnp.float32)
    return jax.lax.rsqrt(jnp.sum(jnp.where(inside, wide * wide, 0.0)) / size + eps)
