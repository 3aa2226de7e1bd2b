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


def to_float32(values: Float[Array, "*shape"], conversion: Conversion) -> Float[Array, "*shape"]:
    """Exact float32 of e4m3 (or bfloat16) values, in registers; the hardware goes through float16 too, 1.5 instructions a value.

    Going on to bfloat16 from here is cheaper than a direct cast: SM90 converts float16 to bfloat16 at a small fraction of the rate.
    """
    if values.dtype != jnp.float8_e4m3fn or conversion == "cast":
        return values.astype(jnp.float32)
    return _as_float16_bits(values).astype(jnp.float32) * jnp.float32(2.0**8)


def to_float16(values: Float[Array, "*shape"], conversion: Conversion) -> Float[Array, "*shape"]:
    """Exact float16 of e4m3 values, in registers: half an instruction a value where the hardware converts."""
    if conversion == "cast":
        return values.astype(jnp.float16)
    return _as_float16_bits(values) * jnp.float16(2.0**8)


def _as_float16_bits(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e4m3 divided by 2**8: sign, exponent and mantissa moved to a float16's places, whose exponent bias is 8 larger.

    For GPUs without the conversion (SM80; Pallas refuses the cast there), several times the instructions. NaN becomes 480 / 2**8; no
    checkpoint stores NaN. The same move into a float32 would make e4m3 subnormals float32 subnormals, which some compilers flush to zero.
    """
    code = lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    return lax.bitcast_convert_type(((code & 0x7F) << 7) | ((code & 0x80) << 8), jnp.float16)


def conversion_for(device: jax.Device | None = None) -> Conversion:
    """What the GPU can do: "cast" from SM89 on, "bits" before."""
    device = device or jax.devices()[0]
    major, _, minor = str(getattr(device, "compute_capability", "9.0")).partition(".")
    return "cast" if (int(major), int(minor or 0)) >= (8, 9) else "bits"
