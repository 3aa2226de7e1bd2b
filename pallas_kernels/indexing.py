"""Indexing kernel refs by vectors of indices: gathers, masked edges and the interpreter all take the same form."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def span(start: Any, size: int) -> Int[Array, " size"]:
    """start, start + 1, ... as int32."""
    return start + jnp.arange(size, dtype=jnp.int32)


def outer(*indices: Any) -> tuple[Int[Array, "*shape"], ...]:
    """One index array per argument, broadcasting to one axis per vector, in order; scalars apply everywhere.

    `load(ref.at[outer(expert, rows, columns)])` is [rows, columns] of that expert. Slices would say the same, but Pallas' interpreter takes
    no mix of slices and index arrays and checks static slices against the edge before any mask; the compiler sees the same contiguous
    addresses.
    """
    arrays = [jnp.asarray(index, jnp.int32) for index in indices]
    rank = sum(array.ndim for array in arrays)
    out, axis = [], 0
    for array in arrays:
        shape = [1] * rank
        if array.ndim:
            shape[axis] = array.shape[0]
            axis += 1
        out.append(jnp.broadcast_to(array.reshape(shape) if array.ndim else array, shape))
    return tuple(out)
