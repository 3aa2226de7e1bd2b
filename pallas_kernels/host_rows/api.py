"""The public function of the row gather; `implementation` picks the kernel or plain XLA."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.host_rows import kernel, xla


def host_rows(table: Float[Array, "V D"], ids: Int[Array, " T"], *, implementation: Implementation | None = None) -> Float[Array, "T D"]:
    """table[ids], on the device, of a table in pinned host memory; ids must lie in the table.

    implementation None: the kernel on a CUDA GPU, plain XLA elsewhere. Raises NotImplementedError when "pallas" cannot run.
    """
    if choose("host_rows", implementation, None) == "pallas":
        return kernel.host_rows(table, ids)
    return xla.host_rows(table, ids)
