"""Float8 e4m3 weights inside a kernel: values times one float32 scale per 128x128 block of the last two axes."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BLOCK = 128  # rows and columns one scale covers, the layout of Qwen's and DeepSeek's FP8 checkpoints

Conversion = Literal["cast", "bits"]
CONVERSIONS = get_args(Conversion)


def to_float32(values: Float[Array, "..."], conversion: Conversion) -> Float[Array, "..."]:
    """Exact float32 of e4m3 (or bfloat16) values, in registers.

    "cast" is the hardware conversion through float16, 1.5 instructions a value; SM80 has none and Pallas refuses it there. "bits" moves exponent and
    mantissa into a float16, whose exponent bias is 8 larger, and multiplies by 2**8 in float32: any GPU, about four times the instructions (straight
    to float32 would make subnormals that some compilers flush to zero). Its NaN reads 480, which no checkpoint stores. Going on to bfloat16 is
    cheaper from here than by a direct cast: SM90 converts float16 to bfloat16 at a small fraction of the rate.
    """
    if values.dtype != jnp.float8_e4m3fn or conversion == "cast":
        return values.astype(jnp.float32)
    code = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    half = lax.bitcast_convert_type(((code & 0x7F) << 7) | ((code & 0x80) << 8), jnp.float16)
    return half.astype(jnp.float32) * jnp.float32(2.0**8)


def conversion_for(device: jax.Device | None = None) -> Conversion:
    """What the GPU can do: "cast" from SM89 on, "bits" before."""
    device = device or jax.devices()[0]
    major, _, minor = str(getattr(device, "compute_capability", "9.0")).partition(".")
    return "cast" if (int(major), int(minor or 0)) >= (8, 9) else "bits"
