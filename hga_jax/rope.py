"""Rotary position embedding: frequencies from a RopeConfig, and the rotation itself (half-split pairs, as Llama and Qwen use)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax.config import LinearScaling, Llama3Scaling, ModelConfig, RopeConfig, YarnScaling
from pallas_kernels.rotate_heads import turn


def frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotary pair, float64. Source: the scaling rules of the checkpoints' own config.json."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = 1.0 / rope.theta**exponent
    scaling = rope.scaling
    if scaling is None:
        return base
    if isinstance(scaling, LinearScaling):
        return base / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        wavelength = 2 * math.pi / base
        rotations = scaling.original_context / wavelength
        keep = np.clip((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
        return keep * base + (1 - keep) * base / scaling.factor
    return _yarn(base, scaling, rope.theta, head_dim)


def _yarn(base: np.ndarray, scaling: YarnScaling, theta: float, head_dim: int) -> np.ndarray:
    def pair_of(rotations: float) -> float:
        """The (fractional) pair index that turns `rotations` times over the original context."""
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return ramp * base / scaling.factor + (1 - ramp) * base


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, except under YaRN."""
    return rope.scaling.resolved_attention_factor() if isinstance(rope.scaling, YarnScaling) else 1.0


def angles(positions: Int[Array, " T"], rope: RopeConfig, head_dim: int) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine, float32, of each rotary pair's angle at each position."""
    angle = positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies(rope, head_dim), jnp.float32)
    factor = attention_factor(rope)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Float[Array, "*B T N H"], positions: Int[Array, " T"], rope: RopeConfig, dtype: Any = None) -> Float[Array, "*B T N H"]:
    """Rotate queries or keys to their positions. Angles and the product are float32; the result has `dtype`, by default x's."""
    return turn(x, *angles(positions, rope, x.shape[-1]), dtype or x.dtype)


def resolve_rope(config: ModelConfig, tokens: int, request: str) -> tuple[RopeConfig, str]:
    """Rotary settings for a run of `tokens` tokens, and a word for the report. Raises ValueError."""
    native, rope = config.native_context, config.rope
    if request.startswith("as-is:"):
        return rope, request.removeprefix("as-is:")
    if request == "none":
        if tokens > native:
            raise ValueError(
                f"{tokens} tokens (prompt and answer) exceed the model's native context of {native}: "
                "use --rope-scaling auto or yarn:F, or shorten the prompt"
            )
        return rope, "none"
    if request == "auto":
        if tokens <= native:
            return rope, "none"
        factor = math.ceil(tokens / native * 4) / 4  # steps of a quarter, so that few lengths need a program of their own
    elif request.startswith("yarn:"):
        try:
            factor = float(request.removeprefix("yarn:"))
        except ValueError:
            factor = 0.0
        if not factor >= 1:
            raise ValueError(f"--rope-scaling {request}: the factor must be a number of at least 1, as in yarn:4")
    else:
        raise ValueError(f"--rope-scaling {request} is not known: choose auto, none or yarn:F")
    original = native
    if isinstance(rope.scaling, YarnScaling):
        original = rope.scaling.original_context
        factor = factor * native / original if request == "auto" else factor
    elif rope.scaling is not None:
        raise ValueError(
            f"the checkpoint already scales its rope ({type(rope.scaling).__name__}), so YaRN cannot go on top: "
            f"keep prompt and answer within {native} tokens"
        )
    note = f"YaRN, factor {factor:g}: {tokens} tokens against a native context of {native}"
    return replace(rope, scaling=YarnScaling(factor, original)), note
