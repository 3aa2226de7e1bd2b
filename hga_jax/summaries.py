"""What is remembered of closed chunks and groups so that queries can be routed: pure functions, keys in, a pytree of arrays out.

Every array of a summaries pytree has its chunks, groups or tokens on axis 1, a whole number of entries to a chunk, so that `write` and
whoever places summaries in memory need not know which policy made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.cache.host import as_host, is_host
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.pytree import register
from hga_jax.rope import frequencies
from pallas_kernels.host_rows import copy_rows


@register
@dataclass(frozen=True)
class KeySums:
    """Paper policy: one vector a chunk and one a group, in the keys' dtype.

    summary="mixed_rope": chunk sums unscaled, group sums times 1 / (g + sqrt g), as the paper has them; "mean": plain means of both.
    Scores are only compared within a level, so the scaling chooses nothing.
    """

    chunks: Float[Array, "K chunks H"]
    groups: Float[Array, "K groups H"]


def slow_pair_angles(tokens: int, head_dim: int, config: HGAConfig, rope: RopeConfig) -> Float[np.ndarray, "tokens half"]:
    """Angles that turn rotated keys of `tokens` neighbours to their middle token; 0 for pairs too fast to be averaged raw.

    Raw keys rotated at the middle are the rotated keys turned back by their offset from it, whatever the position. A pair is slow when it
    turns at most 0.5 rad over a chunk (the chunk's size counts for groups too). Source: arXiv 2606.30709.
    """
    turns = frequencies(rope, head_dim)
    offsets = (tokens - 1) // 2 - np.arange(tokens)
    return np.where((config.chunk_size - 1) * turns > 0.5, 0.0, offsets[:, None] * turns)


def key_sums(keys: Float[Array, "K S H"], config: HGAConfig, rope: RopeConfig | None) -> KeySums:
    """Chunk and group summaries of whole chunks of post-RoPE keys; float32 inside, the keys' dtype in the result."""

    def sums(size: int) -> Float[Array, "K n H"]:
        parts = keys.astype(jnp.float32).reshape(keys.shape[0], -1, size, keys.shape[-1])
        if config.summary == "mean":
            return parts.mean(2)
        angle = slow_pair_angles(size, keys.shape[-1], config, rope)
        cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
        first, second = jnp.split(parts, 2, axis=-1)
        return jnp.concatenate([(first * cos - second * sin).sum(2), (second * cos + first * sin).sum(2)], axis=-1)

    scale = 1.0 if config.summary == "mean" else 1.0 / (config.group_size + config.group_size**0.5)
    return KeySums(sums(config.chunk_size).astype(keys.dtype), (sums(config.group_size) * scale).astype(keys.dtype))


def empty(summarise: Callable[[Array, Array], Any], kv_heads: int, tokens: int, head_dim: int, dtype: Any) -> Any:
    """The pytree that `summarise` makes of `tokens` tokens, all zeros."""
    keys = jax.ShapeDtypeStruct((kv_heads, tokens, head_dim), dtype)
    shapes = jax.eval_shape(summarise, keys, keys)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def write(summaries: Any, fresh: Any, first_chunk: Int[Array, ""], fresh_chunks: int) -> Any:
    """Put the summaries of `fresh_chunks` neighbouring chunks in their place, in either memory."""

    def put(old: Array, new: Array) -> Array:
        first = first_chunk * (new.shape[1] // fresh_chunks)
        if is_host(old):
            return as_host(copy_rows(old, new, target_row=first, source_row=jnp.int32(0), count=new.shape[1]))
        return lax.dynamic_update_slice_in_dim(old, new, first, axis=1)

    return jax.tree.map(put, summaries, fresh)
