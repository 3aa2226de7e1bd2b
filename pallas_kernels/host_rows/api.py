"""The public functions; `implementation` picks the kernel or plain XLA."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.host_rows import kernel, xla


def host_rows(
    table: Float[Array, "V D"], ids: Int[Array, " T"], dtype: Any = None, *, implementation: Implementation | None = None
) -> Float[Array, "T D"]:
    """table[ids], on the device, of a table in pinned host memory; ids must lie in the table. dtype: of the result, by default the table's.

    implementation None: the kernel on a CUDA GPU, plain XLA elsewhere. Raises NotImplementedError when "pallas" cannot run.
    """
    if choose("host_rows", implementation, None) == "pallas":
        return kernel.host_rows(table, ids, dtype)
    return xla.host_rows(table, ids, dtype)


def copy_rows(
    target: Shaped[Array, "K S *W"],
    source: Shaped[Array, "K n *W"],
    *,
    target_row: Int[Array, ""],
    source_row: Int[Array, ""],
    count: int,
    implementation: Implementation | None = None,
) -> Shaped[Array, "K S *W"]:
    """The target with `count` neighbouring rows of the source (axis 1, of the same dtype) in their place, in place when it is donated.

    Either may lie in pinned host memory; the caller sees to it that the rows lie inside both. Where the target does, wrap the result in
    `jax.device_put(out, jax.memory.Space.Host)`: a kernel's output is typed as device memory although it stays where the donated array is.
    implementation as in `host_rows`; plain XLA takes arrays of one memory only.
    """
    if choose("copy_rows", implementation, None) == "pallas":
        return kernel.copy_rows(target, source, jnp.stack([source_row, target_row]).astype(jnp.int32), count)
    return xla.copy_rows(target, source, target_row, source_row, count)
