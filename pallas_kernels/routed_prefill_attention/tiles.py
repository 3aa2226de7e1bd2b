"""What the kernels share: rows of a block, tokens of a tile, products and exponentials."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Int

from pallas_kernels.routed_prefill_attention.lists import NOBODY, SINCE_BITS

LOG2_E = math.log2(math.e)


class Rows(NamedTuple):
    """Rows of one block, one per (query head of the kv head, query).

    index: of the query, its number of rows where `here` is off. head: query head. row: position in the chunk. live: a query to compute.
    """

    index: Int[Array, " rows"]
    head: Int[Array, " rows"]
    row: Int[Array, " rows"]
    here: Bool[Array, " rows"]
    live: Bool[Array, " rows"]


def rows_of(flat: Any, query_ref: Any, k: Any, ratio: int, start: Any, first_position: Any, count: Any, chunk_size: int) -> Rows:
    """Rows `flat` of the chunk that starts at position `start`: row f is query f % chunk_size under head f // chunk_size of kv head k."""
    length = query_ref.shape[0]
    head, row = flat // chunk_size, flat % chunk_size
    index = start + row - first_position
    here = (index >= 0) & (index < length) & (head < ratio)
    # Rows that are off point past the end: the interpreter writes masked rows back too, and must not hit one that is on.
    return Rows(jnp.where(here, index, length), k * ratio + jnp.minimum(head, ratio - 1), row, here, here & (index < count))


def of_page(words: Any, index: Array) -> Array:
    """words[index] for an index vector whose entries the compiler knows: the choice costs nothing at run time."""
    out = jnp.full(index.shape, words[0], jnp.int32)
    for j, word in enumerate(words[1:], 1):
        out = jnp.where(index == j, word, out)
    return out


def pages_and_since(words: Any, index: Array) -> tuple[Array, Array]:
    """Page and first row that sees it, for tokens of the tile's pages `index`."""
    return of_page([word >> SINCE_BITS for word in words], index), of_page([word & NOBODY for word in words], index)


def load_tokens(pages_ref: Any, k: Any, page: Array, slot: Array, part: int, dim: Array, held: Array | None = None) -> Array:
    """[tokens, dim] keys (part 0) or values (part 1) of kv head k; zeros beyond the head dimension and where `held` is off."""
    inside = dim < pages_ref.shape[4]
    mask = None if held is None else jnp.broadcast_to(held[:, None], (held.shape[0], dim.shape[0]))
    if dim.shape[0] != pages_ref.shape[4]:
        mask = inside[None, :] if mask is None else mask & inside[None, :]
        mask = jnp.broadcast_to(mask, (slot.shape[0], dim.shape[0]))
    at = (k, page[:, None], part, slot[:, None], dim[None, :])
    return plt.load(pages_ref.at[at], mask=mask, other=None if mask is None else 0)


def dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
    """a @ b in float32; float32 operands in full precision."""
    return plt.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def exponential(scores: Array, factor: float, peak: Array, interpret: bool) -> Array:
    """exp2(scores * factor - peak), peak broadcast.

    Spelled in PTX because the compiler would neither fuse the product nor flush denormals: 4 more instructions an element, a quarter of the
    loop.
    """
    if interpret:
        return jnp.exp2(scores * factor - peak)
    literal = struct.pack(">f", factor).hex()
    asm = f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, 0f{literal}, $2; ex2.approx.ftz.f32 $0, t; }}"
    result = jax.ShapeDtypeStruct(scores.shape, jnp.float32)
    minus_peak = jnp.broadcast_to(-peak, scores.shape)
    [out] = plt.elementwise_inline_asm(asm, args=[scores, minus_peak], constraints="=f,f,f", pack=1, result_shape_dtypes=[result])
    return out
