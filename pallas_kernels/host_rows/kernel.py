"""Rows of a pinned host table read in place over PCIe (Pallas, Triton lowering): only the rows asked for cross the bus."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.host_rows.config import Config
from pallas_kernels.indexing import outer, span
from pallas_kernels.limits import check_offsets


def _kernel(
    ids_ref,  # i32[T] device
    table_ref,  # [V, D] pinned host or device
    out_ref,  # [T, D] device
    *,
    config: Config,
):
    row, width = pl.program_id(0), table_ref.shape[1]
    columns = pl.program_id(1) * config.columns + span(0, config.columns)
    mask = columns < width if width % config.columns else None
    value = plt.load(table_ref.at[outer(ids_ref[row], jnp.minimum(columns, width - 1))])
    plt.store(out_ref.at[outer(row, columns)], value, mask=mask)


def host_rows(
    table: Float[Array, "V D"], ids: Int[Array, " T"], *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "T D"]:
    """See api.host_rows."""
    config = config or Config()
    shape = (ids.shape[0], table.shape[1])
    check_offsets(table=table, out=jax.ShapeDtypeStruct(shape, table.dtype))
    return pl.pallas_call(
        partial(_kernel, config=config),
        grid=(ids.shape[0], -(-table.shape[1] // config.columns)),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(shape, table.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="host_rows",
    )(ids.astype(jnp.int32), table)
