"""Tunables of routed prefill attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """One program attends `rows` (query, head) pairs of one chunk to all their keys, `keys` tokens at a time, `stages` tiles in flight.

    Shared memory in elements of the dtype: (rows + 2 * keys * stages) * H on SM90, where tiles wait for the tensor cores there; less
    elsewhere.
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


def _hopper() -> bool:
    return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def default(dtype: Any, head_dim: int) -> Config:
    """The measured choice; float32 multiplies without tensor cores, on tiles that fit in registers."""
    if dtype == jnp.float32:
        return Config(rows=16, keys=32, warps=4, stages=1)
    if head_dim > 128:
        return Config(rows=64, keys=32, warps=4, stages=2)
    return Config(rows=128, keys=64, warps=4 if _hopper() else 8, stages=2)


def default_backward(dtype: Any, head_dim: int) -> Config:
    """Both gradient kernels; `rows` and `keys` are those of a product, whichever of the two a program keeps."""
    if dtype == jnp.float32:
        return Config(rows=16, keys=16, warps=4, stages=1)
    if head_dim > 128:
        return Config(rows=32, keys=32, warps=4, stages=2)
    return Config(rows=64, keys=64, warps=4, stages=2)
