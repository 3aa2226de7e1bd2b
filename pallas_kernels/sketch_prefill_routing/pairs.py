"""Scoring a page by few coordinates: its mean key in full, and its tokens' deviations from that in the rotary pairs that matter.

Post-RoPE queries and keys are far from isotropic: of the variance of their deviations' scores, a quarter of the pairs holds three to four
fifths (Qwen2.5-Coder-0.5B, SmolLM2-135M). Which pairs is a property of the layer and kv head more than of the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8 import conversion_for
from pallas_kernels.normalise import narrow
from pallas_kernels.sketch_prefill_routing.kernel import LOG2E

TAKEN = 32  # coordinates of float8 that the tensor cores take at least


class Pairs(NamedTuple):
    """dims: the coordinates that deviations have. factors: what queries are multiplied by there, and deviations divided, so that both have
    about the same size; powers of two.
    """

    dims: Int[Array, "K d"]
    factors: Float[Array, " K"]


class PairKeys(NamedTuple):
    """tokens: deviations of a page's keys from their mean in some coordinates, token j of every page side by side; rounded to float8 (e4m3)
    where keys have 16 bits, and padded. means: in all coordinates, in the keys' format.
    """

    tokens: Float[Array, "K g P d"]
    means: Float[Array, "K 1 P H"]
    pairs: Pairs


def by_pair(squares: Float[Array, "*n H"]) -> Float[Array, "*n half"]:
    """Sums over the two coordinates i, i + H/2 of each rotary pair."""
    return squares.reshape(*squares.shape[:-1], 2, -1).sum(-2)


def query_energy(
    query: Float[Array, "T N H"], kv_heads: int, first_position: Int[Array, ""], count: Int[Array, ""], end: int
) -> Float[Array, "K half"]:
    """Sum of the squares of the live queries at positions before `end`, by kv head and rotary pair; at most `end` rows are read."""
    length, heads, width = query.shape
    rows = min(length, end)
    live = jnp.arange(rows) < jnp.minimum(count, end - first_position)
    squares = jnp.where(live[:, None, None], query[:rows].astype(jnp.float32), 0) ** 2
    return by_pair(squares.reshape(rows, kv_heads, heads // kv_heads, width).sum((0, 2)))


def choose_pairs(
    energy: Float[Array, "K half"], pages: Float[Array, "K P 2 g H"], first_pages: int, pairs: int, ratio: int, scale: float
) -> Pairs:
    """The `pairs` rotary pairs in which queries of that energy, summed over `ratio` heads and the tokens of the first pages, and those
    pages' keys, less their page's mean, have the largest products of energies: the variance of a pair's scores, but for phases.
    scale: of the scores.
    """
    keys = pages[:, :first_pages, 0].astype(jnp.float32)
    deviations = by_pair(((keys - keys.mean(2, keepdims=True)) ** 2).sum((1, 2)))
    chosen = jnp.sort(lax.top_k(energy * deviations, pairs)[1], axis=-1)
    asked, held = (jnp.take_along_axis(x, chosen, axis=-1).sum(-1) + jnp.finfo(jnp.float32).tiny for x in (energy, deviations))
    even = (jnp.log2(held * ratio) - jnp.log2(asked * (scale * LOG2E) ** 2)) / 4
    return Pairs(jnp.concatenate([chosen, chosen + energy.shape[1]], axis=-1), jnp.exp2(jnp.clip(jnp.round(even), -16, 16)))


def pair_keys(pages: Float[Array, "K P 2 g H"], pairs: Pairs, kept: Any = None) -> PairKeys:
    """kept: the format in which deviations are kept when they are rounded to float8. None: that, or float16 on GPUs that do not multiply
    it.
    """
    kept = kept or (jnp.float8_e4m3fn if conversion_for() == "cast" else jnp.float16)
    keys = pages[:, :, 0]
    means = keys.astype(jnp.float32).mean(2, keepdims=True).astype(keys.dtype)
    at = pairs.dims[:, None, None]
    few, few_means = (jnp.take_along_axis(x, at, axis=-1).astype(jnp.float32) for x in (keys, means))
    deviations = _rounded((few - few_means) / pairs.factors[:, None, None, None], keys.dtype, kept)
    return PairKeys(deviations.swapaxes(1, 2), means.swapaxes(1, 2), pairs)


def pair_queries(query: Float[Array, "T N H"], keys: PairKeys, scale: float) -> Float[Array, "T N d"]:
    """The queries' coordinates that deviations have, in the deviations' format: products are scores, in powers of two."""
    length, heads, width = query.shape
    dims, factors = keys.pairs
    by_head = query.reshape(length, dims.shape[0], -1, width)
    few = jnp.take_along_axis(by_head, dims[None, :, None], axis=-1).astype(jnp.float32) * (scale * LOG2E * factors[:, None, None])
    return _rounded(few, query.dtype, keys.tokens.dtype).reshape(length, heads, -1)


def _rounded(x: Array, dtype: Any, kept: Any) -> Array:
    """To float8 in place of 16-bit formats: tensor cores multiply it twice as fast, and add its products up in float16, which halves the
    work on their sums. With zeros up to the coordinates that they take.
    """
    if dtype == jnp.float32:
        return x
    full = max(TAKEN, pl.next_power_of_2(x.shape[-1])) - x.shape[-1]
    return jnp.pad(narrow(x, jnp.float8_e4m3fn), ((0, 0),) * (x.ndim - 1) + ((0, full),)).astype(kept)
