"""Scoring a page by few coordinates: its mean key in full, and its tokens' deviations from that in the rotary pairs that matter.

Post-RoPE queries and keys are far from isotropic: of the variance of their deviations' scores, a quarter of the pairs holds three to four
fifths (Qwen2.5-Coder-0.5B, SmolLM2-135M). Which pairs is a property of the layer and kv head more than of the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.normalise import narrow


class PairKeys(NamedTuple):
    """tokens: deviations of a page's keys from their mean in some coordinates, token j of every page side by side; in float16 where keys
    have 16 bits. means: in all coordinates, in the keys' format. dims: the coordinates that deviations have.
    """

    tokens: Float[Array, "K g P d"]
    means: Float[Array, "K 1 P H"]
    dims: Int[Array, "K d"]


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


def choose_dims(energy: Float[Array, "K half"], pages: Float[Array, "K P 2 g H"], first_pages: int, pairs: int) -> Int[Array, "K d"]:
    """The coordinates of the `pairs` rotary pairs in which queries of that energy and the keys of the first pages, less their page's mean,
    have the largest products of energies: the variance of a pair's scores, but for phases.
    """
    keys = pages[:, :first_pages, 0].astype(jnp.float32)
    deviations = by_pair(((keys - keys.mean(2, keepdims=True)) ** 2).sum((1, 2)))
    chosen = jnp.sort(lax.top_k(energy * deviations, pairs)[1], axis=-1)
    return jnp.concatenate([chosen, chosen + energy.shape[1]], axis=-1)


def pair_keys(pages: Float[Array, "K P 2 g H"], dims: Int[Array, "K d"]) -> PairKeys:
    keys = pages[:, :, 0]
    means = keys.astype(jnp.float32).mean(2, keepdims=True).astype(keys.dtype)
    at = dims[:, None, None]
    few, few_means = (jnp.take_along_axis(x, at, axis=-1).astype(jnp.float32) for x in (keys, means))
    return PairKeys(_narrow(few - few_means, keys.dtype).swapaxes(1, 2), means.swapaxes(1, 2), dims)


def pair_queries(query: Float[Array, "T N H"], dims: Int[Array, "K d"], scale: float) -> Float[Array, "T N d"]:
    """The queries' coordinates that deviations have, times `scale`, in the deviations' format: products that are scores fit float16."""
    length, heads, width = query.shape
    by_head = query.reshape(length, dims.shape[0], -1, width)
    few = jnp.take_along_axis(by_head, dims[None, :, None], axis=-1).astype(jnp.float32) * scale
    return _narrow(few, query.dtype).reshape(length, heads, -1)


def _narrow(x: Array, dtype: Any) -> Array:
    """As float16 in place of 16-bit formats: tensor cores add its products up in float16, which halves the work on their sums and more."""
    return x if dtype == jnp.float32 else narrow(x, jnp.float16)
