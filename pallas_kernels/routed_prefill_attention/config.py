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

    Shared memory on SM90, in elements of the dtype: (rows + 2 * keys * stages) * H; less elsewhere.
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
    """The measured choice; float32 multiplies without tensor cores, on tiles that fit in registers.

    H100 80GB, JAX 0.11.2, one layer in bfloat16: 32 query heads, 4 kv heads, H 128, T = S = 65,536, 1,970 tokens a block and kv head
    (random pages), medians of ms and TFLOP/s of 4 * H * rows * tokens. cuDNN's causal attention took 57.7 ms (610 TFLOP/s) in the same run.

    | rows | keys | warps | stages | KB shared | ms | TFLOP/s |
    |---|---|---|---|---|---|---|
    | 128 | 64 | 4 | 2 | 96 | 5.85 | 362 |
    | 64 | 64 | 4 | 3 | 112 | 5.78 to 5.96 | 355 to 366 |
    | 128 | 32 | 4 | 3 | 80 | 5.90 | 358 |
    | 256 | 64 | 8 | 2 | 128 | 5.99 | 353 |
    | 128 | 128 | 8 | 3 | 224 | 6.00 | 352 |
    | 128 | 64 | 8 | 2 | 96 | 6.09 | 347 |
    | 128 | 64 | 4 | 3 | 128 | 8.53 | 248 |

    Lists that drift slowly take the same 5.88 ms, one list for all blocks 5.74, windows alone (701 tokens) 2.38. L2 is 29 % busy, 95 % of
    reads hit it, device memory 6 %: gathering pages is not the limit. All settings keep two warps a scheduler, each of which issues an
    instruction every 5.6 cycles: the limit is the latency of the softmax between two products.
    Off SM90 the tensor cores take operands from registers, and eight warps leave room for them: compiled for SM80 and SM120 (64 KB of
    shared memory, at most 20 bytes spilled), not measured there. Measure with `python -m hga_jax.bench page_attention`.
    """
    if dtype == jnp.float32:
        return Config(rows=16, keys=32, warps=4, stages=1)
    warps = 4 if _hopper() else 8
    if head_dim > 128:
        return Config(rows=64, keys=32, warps=warps, stages=2)
    return Config(rows=128, keys=64, warps=warps, stages=2)


def default_backward(dtype: Any, head_dim: int) -> Config:
    """Both gradient kernels; `rows` and `keys` are those of a product, whichever of the two a program keeps.

    97 KB of shared memory on SM90, 73 elsewhere. Chosen by what fits and does not spill; no other setting was timed.
    """
    if dtype == jnp.float32:
        return Config(rows=16, keys=16, warps=4, stages=1)
    warps = 4 if _hopper() else 8
    if head_dim > 128:
        return Config(rows=32, keys=32, warps=warps, stages=2)
    return Config(rows=64, keys=64, warps=warps, stages=2)
