"""What probes are compared with: the keys as their sketches remember them, and each page's mean and spread. Made anew for each call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, UInt8

from pallas_kernels.sketch_prefill_routing.sketches import TINY, unsketch
from pallas_kernels.sketch_routing.api import LEVELS


class RoughKeys(NamedTuple):
    """Keys as sketches remember them for products of 8-bit integers: the chunk's mean, and the residual as it was sketched, rotated.

    residuals: token j of every chunk side by side, in `steps`, one a page: the outer level of the page's largest token is 127.
    """

    residuals: Int8[Array, "K chunk C H"]
    steps: Float[Array, "K P"]
    centres: Float[Array, "K C H"]
    rotation: Float[Array, "H H"]


class PageKeys(NamedTuple):
    """tokens: keys as sketches remember them, token j of every page side by side. means, spreads: as `page_statistics` makes them.

    rough: what a scan of all pages may score them by before it scores the few that matter by `tokens`.
    """

    tokens: Float[Array, "K g P H"]
    means: Float[Array, "K 1 P H"]
    spreads: Float[Array, "K P"]
    rough: RoughKeys | None = None


def page_keys(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    rotation: Float[Array, "H H"],
    group_size: int,
    end_chunk: Int[Array, ""],
    *,
    scanned: bool,
    implementation: Literal["pallas", "xla"],
    interpret: bool = False,
) -> PageKeys:
    """Of the first end_chunk chunks at least; beyond them anything. scanned: whether all pages will be scored for all queries; then, in 16
    bits, with rough keys for the kernels.
    """
    if implementation == "xla":
        tokens = sketched_keys(means, codes, scales, rotation, group_size)
        return PageKeys(tokens, *page_statistics(tokens))
    tokens, page_means, spreads, *rough = unsketch(
        means, codes, scales, rotation, group_size, end_chunk, rough=scanned and means.dtype != jnp.float32, interpret=interpret
    )  # fmt: skip
    return PageKeys(tokens, page_means, spreads, RoughKeys(*rough, means, rotation) if rough else None)


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
    levels = _levels(codes, head_dim).astype(means.dtype)
    residual = jnp.einsum("ksi,hi->ksh", levels, rotation.astype(means.dtype), precision=precision)
    by_chunk = (kv_heads, chunks, tokens // chunks, head_dim)
    wide = residual.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
    keys = (means[:, :, None].astype(jnp.float32) + wide.reshape(by_chunk)).astype(means.dtype)
    return keys.reshape(kv_heads, -1, group_size, head_dim).swapaxes(1, 2)


def _levels(codes: UInt8[Array, "K S B"], head_dim: int) -> Float[Array, "K S H"]:
    unpacked = jnp.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(*codes.shape[:2], -1)[..., :head_dim]
    inner = jnp.where(unpacked >= 2, LEVELS[2], LEVELS[1])
    return jnp.where((unpacked == 0) | (unpacked == 3), jnp.where(unpacked == 3, LEVELS[3], LEVELS[0]), inner)


def rough_keys(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    rotation: Float[Array, "H H"],
    group_size: int,
) -> RoughKeys:
    """In plain XLA; the kernel is sketches.unsketch."""
    (kv_heads, chunks, head_dim), tokens = means.shape, codes.shape[1]
    wide = scales.astype(jnp.float32)
    steps = jnp.maximum(wide.reshape(kv_heads, -1, group_size).max(-1), TINY) * (LEVELS[3] / 127)
    share = wide / jnp.repeat(steps, group_size, axis=1)
    whole = jnp.floor(_levels(codes, head_dim) * share[..., None] + 0.5).astype(jnp.int8)
    return RoughKeys(whole.reshape(kv_heads, chunks, tokens // chunks, head_dim).swapaxes(1, 2), steps, means, rotation)


def page_statistics(sketched: Float[Array, "K g P H"]) -> tuple[Float[Array, "K 1 P H"], Float[Array, "K P"]]:
    """Each page's mean key, and the root mean square of its keys' coordinates around it (float32)."""
    wide = sketched.astype(jnp.float32)
    mean = wide.mean(1, keepdims=True)
    return mean.astype(sketched.dtype), jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=(1, 3)))
