"""Rows of arrays in pinned host memory read and written in place over PCIe (Pallas, Triton lowering): only those rows cross the bus."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, Shaped

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
    plt.store(out_ref.at[outer(row, columns)], value.astype(out_ref.dtype), mask=mask)


def host_rows(
    table: Float[Array, "V D"], ids: Int[Array, " T"], dtype: Any = None, *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "T D"]:
    """See api.host_rows."""
    config = config or Config()
    out = jax.ShapeDtypeStruct((ids.shape[0], table.shape[1]), dtype or table.dtype)
    check_offsets(table=table, out=out)
    return pl.pallas_call(
        partial(_kernel, config=config),
        grid=(ids.shape[0], -(-table.shape[1] // config.columns)),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=pl.no_block_spec,
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="host_rows",
    )(ids.astype(jnp.int32), table)


def _copy_kernel(
    where_ref,  # i32[2] device: first row of the source, of the target
    source_ref,  # [K, n, ...] pinned host or device
    _,  # the target again
    target_ref,  # [K, S, ...] pinned host or device, in place
    *,
    count: int,
    rows: int,
):
    block, k = pl.program_id(0), pl.program_id(1)
    row = span(block * rows, rows)
    here = row < count
    if len(source_ref.shape) == 2:
        value = plt.load(source_ref.at[outer(k, where_ref[0] + row)], mask=here, other=0)
        plt.store(target_ref.at[outer(k, where_ref[1] + row)], value, mask=here)
        return
    width = source_ref.shape[2]
    column = span(0, pl.next_power_of_2(width))
    mask = here[:, None] & (column < width)[None, :]
    value = plt.load(source_ref.at[outer(k, where_ref[0] + row, column)], mask=mask, other=0)
    plt.store(target_ref.at[outer(k, where_ref[1] + row, column)], value, mask=mask)


def copy_rows(
    target: Shaped[Array, "K S *W"], source: Shaped[Array, "K n *W"], where: Int[Array, " 2"], count: int, *, interpret: bool = False
) -> Shaped[Array, "K S *W"]:
    """See api.copy_rows. where: first row of the source, of the target."""
    check_offsets(target=target, source=source)
    rows = min(pl.next_power_of_2(count), 64)
    return pl.pallas_call(
        partial(_copy_kernel, count=count, rows=rows),
        grid=(-(-count // rows), source.shape[0]),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        input_output_aliases={2: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="copy_rows",
    )(where, source, target)
