"""What probes are compared with: the keys as their sketches remember them, and each page's mean and spread. Made anew for each call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.sketch_prefill_routing.sketches import unsketch
from pallas_kernels.sketch_routing.api import LEVELS


class PageKeys(NamedTuple):
    """tokens: keys as sketches remember them, token j of every page side by side. means, spreads: as `page_statistics` makes them."""

    tokens: Float[Array, "K g P H"]
    means: Float[Array, "K 1 P H"]
    spreads: Float[Array, "K P"]


def page_keys(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    rotation: Float[Array, "H H"],
    group_size: int,
    end_chunk: Int[Array, ""],
    *,
    implementation: Literal["pallas", "xla"],
    interpret: bool = False,
) -> PageKeys:
    """Of the first end_chunk chunks at least; beyond them anything."""
    if implementation == "pallas":
        return PageKeys(*unsketch(means, codes, scales, rotation, group_size, end_chunk, interpret=interpret))
    tokens = sketched_keys(means, codes, scales, rotation, group_size)
    return PageKeys(tokens, *page_statistics(tokens))


def sketched_keys(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    rotation: Float[Array, "H H"],
    group_size: int,
) -> Float[Array, "K g P H"]:
    """The keys as sketches remember them, in the means' dtype; token j of every page side by side, as the scoring kernels read them.

    codes: coordinates b, B + b, 2B + b, 3B + b of the rotated residual in byte b, see pallas_kernels/README.md.
    """
    kv_heads, chunks, head_dim = means.shape
    tokens = codes.shape[1]
    precision = lax.Precision.HIGHEST if means.dtype == jnp.float32 else None
    unpacked = jnp.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(kv_heads, tokens, -1)[..., :head_dim]
    inner = jnp.where(unpacked >= 2, LEVELS[2], LEVELS[1])
    levels = jnp.where((unpacked == 0) | (unpacked == 3), jnp.where(unpacked == 3, LEVELS[3], LEVELS[0]), inner).astype(means.dtype)
    residual = jnp.einsum("ksi,hi->ksh", levels, rotation.astype(means.dtype), precision=precision)
    by_chunk = (kv_heads, chunks, tokens // chunks, head_dim)
    wide = residual.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
    keys = (means[:, :, None].astype(jnp.float32) + wide.reshape(by_chunk)).astype(means.dtype)
    return keys.reshape(kv_heads, -1, group_size, head_dim).swapaxes(1, 2)


def page_statistics(sketched: Float[Array, "K g P H"]) -> tuple[Float[Array, "K 1 P H"], Float[Array, "K P"]]:
    """Each page's mean key, and the root mean square of its keys' coordinates around it (float32)."""
    wide = sketched.astype(jnp.float32)
    mean = wide.mean(1, keepdims=True)
    return mean.astype(sketched.dtype), jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=(1, 3)))
