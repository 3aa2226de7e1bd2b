"""The row gather in plain JAX, for tables that lie anywhere."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int


def host_rows(table: Float[Array, "V D"], ids: Int[Array, " T"]) -> Float[Array, "T D"]:
    """See api.host_rows. A table in host memory is first copied to the device, whole."""
    if jax.typeof(table).memory_space == jax.memory.Space.Host:
        table = jax.device_put(table, jax.memory.Space.Device)
    return table[ids]
