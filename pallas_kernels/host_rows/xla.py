"""The same in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


def host_rows(table: Float[Array, "V D"], ids: Int[Array, " T"], dtype: Any = None) -> Float[Array, "T D"]:
    """See api.host_rows. A table in host memory is first copied to the device, whole."""
    if jax.typeof(table).memory_space == jax.memory.Space.Host:
        table = jax.device_put(table, jax.memory.Space.Device)
    return table[ids].astype(dtype or table.dtype)


def copy_rows(
    target: Shaped[Array, "K S *W"], source: Shaped[Array, "K n *W"], target_row: Int[Array, ""], source_row: Int[Array, ""], count: int
) -> Shaped[Array, "K S *W"]:
    """See api.copy_rows."""
    rows = lax.dynamic_slice_in_dim(source, source_row, count, axis=1)
    return lax.dynamic_update_slice_in_dim(target, rows, target_row, axis=1)
