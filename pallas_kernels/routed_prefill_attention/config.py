"""Tunables of routed prefill attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """One program attends `rows` (query, head) pairs of one chunk to all their keys, `keys` tokens at a time, loaded `stages - 1` steps ahead.

    Shared memory: rows * H + stages * keys * 2 * H elements.
    """

    rows: int = 128
    keys: int = 64
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (("rows", 16, 256), ("keys", 16, 256), ("warps", 1, 16)):
            value = getattr(self, name)
            if not low <= value <= high or not power_of_two(value):
                raise ValueError(f"{name}={value} must be a power of two from {low} to {high}")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages={self.stages} must be from 1 to 8")


def default(dtype: Any, head_dim: int) -> Config:
    """The measured choice; float32 multiplies without tensor cores, on tiles that fit in registers."""
    if dtype == jnp.float32:
        return Config(rows=32, keys=32, warps=4, stages=1)
    if head_dim > 128:
        return Config(rows=64, keys=32, warps=4, stages=2)
    return Config()
