"""Ask for memory ahead of its use: into the L2 cache, without registers and without waiting (NVIDIA GPUs from SM90 on)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

# One thread asks; an empty request is left out.
REQUEST = """{{
    .reg .pred asks;
    .reg .b32 thread, bytes;
    .reg .b64 address;
    mov.u32 thread, %tid.x;
    setp.eq.u32 asks, thread, 0;
    setp.gt.and.s32 asks, $3, 0, asks;
    mad.wide.u32 address, $2, {size}, $1;
    mul.lo.u32 bytes, $3, {size};
    @asks cp.async.bulk.prefetch.L2.global [address], bytes;
    mov.u32 $0, 0;
}}"""


def available(device: jax.Device | None = None) -> bool:
    """Whether the GPU has the instruction: from SM90 (H100, RTX 50) on."""
    device = device or jax.devices()[0]
    return float(getattr(device, "compute_capability", "9.0")) >= 9


def share(part: Any, parts: int, total: int) -> tuple[Any, Any]:
    """(start, count) of part `part` when `total` is cut into `parts` runs of one length, the last ones shorter or empty."""
    length = -(-total // parts)
    return part * length, jnp.clip(total - part * length, 0, length)


def address_of(rank: int) -> pl.BlockSpec:
    """Spec of an operand that the kernel only prefetches from: its ref is [1], and stands for the address of the first element."""
    return pl.BlockSpec((None,) * (rank - 1) + (1,), lambda *_: (0,) * rank)


def to_l2(ref: Any, start: Any, count: Any) -> Int[Array, ""]:
    """Inside a compiled kernel, once a program: ask for `count` elements from element `start` on, both multiples of 16 bytes.

    ref: of an `address_of`. Returns a zero that the compiler cannot foresee. Add it to an index of later loads: a request whose zero is not
    used is dropped.
    """
    [zero] = plt.elementwise_inline_asm(
        REQUEST.format(size=ref.dtype.itemsize),
        args=[ref, jnp.full((1,), start, jnp.int32), jnp.full((1,), count, jnp.int32)],
        constraints="=r,l,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return zero.sum()
