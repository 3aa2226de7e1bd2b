"""The sketch policy's summaries: chunk means, and each token's residual from its chunk mean in 2 bits a coordinate.

Pure functions: keys in, a pytree out. At head dim 128 and bf16 that is 38 bytes a token and kv head beside the 512 of its K and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from hga_jax.pytree import register
from pallas_kernels.sketch_prefill_routing.pairs import by_pair

# Lloyd-Max quantiser of a unit Gaussian, four levels (Max 1960, table I, n = 4): levels +-INNER, +-OUTER, thresholds 0 and +-EDGE.
INNER, OUTER, EDGE = 0.4528, 1.5104, 0.9816
ROTATION_VERSION = 1  # part of every stored sketch's format: another rotation reads the codes as noise


@register
@dataclass(frozen=True)
class KeySketches:
    """means: of the post-RoPE keys of each chunk. codes: four coordinates a byte, of the rotated residual from the mean, which is
    remembered in some rotary pairs alone (see told_coordinates). scales: per token.

    Byte b of a token holds coordinates b, b + B, b + 2B, b + 3B (B bytes a token, missing ones zero), the first in the lowest bits; a code
    0..3 stands for -OUTER, -INNER, INNER, OUTER times the token's scale. Means and scales have the keys' dtype.
    """

    means: Float[Array, "K chunks H"]
    codes: UInt8[Array, "K S B"]
    scales: Float[Array, "K S"]


@cache
def built_in_rotation(head_dim: int) -> Float[np.ndarray, "H H"]:
    """The fixed random orthogonal matrix of this format version, float32; x @ rotation rotates a row vector.

    It spreads every residual evenly over the coordinates, so that one quantiser serves all of them. numpy's RandomState stream is frozen,
    and making R's diagonal positive makes the QR factors unique: the matrix does not depend on the library that computed it.
    """
    normal = np.random.RandomState(26063070 + ROTATION_VERSION).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(normal)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def told_coordinates(sinks: Float[Array, "K S H"], chunk_size: int, pairs: int) -> Float[Array, "K H"]:
    """1 at the coordinates of the `pairs` rotary pairs (i, i + H/2) in which keys are farthest from their chunk's mean, 0 elsewhere.

    sinks: whole chunks of keys, which need no sketches, so that no sketch waits for others.
    """
    if 2 * pairs == sinks.shape[-1]:
        return jnp.ones((sinks.shape[0], sinks.shape[2]))
    keys = sinks.astype(jnp.float32).reshape(len(sinks), -1, chunk_size, sinks.shape[-1])
    energy = by_pair(((keys - keys.mean(2, keepdims=True)) ** 2).sum((1, 2)))
    chosen = lax.top_k(energy, pairs)[1]
    told = jnp.zeros_like(energy).at[jnp.arange(len(energy))[:, None], chosen].set(1)
    return jnp.concatenate([told, told], axis=-1)


def key_sketches(keys: Float[Array, "K S H"], told: Float[Array, "K H"], chunk_size: int, rotation: Float[Array, "H H"]) -> KeySketches:
    """Sketches of whole chunks of post-RoPE keys; float32 inside. The residual is taken from the mean as stored, where `told` is 1."""
    kv_heads, tokens, width = keys.shape
    parts = keys.astype(jnp.float32).reshape(kv_heads, -1, chunk_size, width)
    means = parts.mean(2).astype(keys.dtype)
    residual = (parts - means[:, :, None].astype(jnp.float32)).reshape(kv_heads, tokens, width) * told[:, None]
    residual = jnp.einsum("ksh,hi->ksi", residual, jnp.asarray(rotation, jnp.float32), precision=lax.Precision.HIGHEST)
    edge = EDGE * jnp.sqrt(jnp.mean(residual**2, axis=-1, keepdims=True))
    outer, positive = jnp.abs(residual) >= edge, residual >= 0
    # Exactly on a threshold the upper level is taken: at -EDGE that is the inner one.
    outer = outer & (positive | (residual < -edge))
    size = jnp.where(outer, OUTER, INNER)
    scales = jnp.sum(jnp.abs(residual) * size, axis=-1) / jnp.sum(size**2, axis=-1)  # least squares: signs agree
    code = jnp.where(positive, jnp.where(outer, 3, 2), jnp.where(outer, 0, 1)).astype(jnp.uint8)
    code = jnp.pad(code, ((0, 0), (0, 0), (0, -width % 4))).reshape(kv_heads, tokens, 4, -1)
    packed = code[:, :, 0] | code[:, :, 1] << 2 | code[:, :, 2] << 4 | code[:, :, 3] << 6
    return KeySketches(means, packed, scales.astype(keys.dtype))


def codes_of(packed: UInt8[Array, "K S B"], head_dim: int) -> Int[Array, "K H S"]:
    """The codes 0..3, one a coordinate, neighbouring tokens side by side so that unpacking and what follows fill whole vectors."""
    kv_heads, tokens, width = packed.shape
    if width % 4 == 0:  # turn 32-bit words, not bytes: a third of the time on a CPU
        each, words = 4, lax.bitcast_convert_type(packed.reshape(kv_heads, tokens, width // 4, 4), jnp.uint32)
    else:
        each, words = 1, packed.astype(jnp.uint32)
    words = lax.optimization_barrier(words.swapaxes(1, 2))  # else the turn is done anew for every coordinate
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint32)[:, None] + jnp.arange(0, 8 * each, 8, dtype=jnp.uint32)
    codes = (words[:, None, :, None] >> shifts[:, None, :, None]) & 3  # [K, coordinate of the byte, word, byte of the word, S]
    return codes.reshape(kv_heads, -1, tokens)[:, :head_dim].astype(jnp.int32)


def estimated_scores(
    sketches: KeySketches, first_chunk: Int[Array, ""], chunks: int, rotated: Float[Array, "K r H"], rotation: Float[Array, "H H"]
) -> Float[Array, "K r S"]:
    """Dot products of queries with what the sketches of `chunks` neighbouring chunks remember of their keys; float32.

    rotated: query @ rotation, since the residuals are kept rotated.
    """
    size, width = sketches.scales.shape[1] // sketches.means.shape[1], sketches.means.shape[2]
    means = lax.dynamic_slice_in_dim(sketches.means, first_chunk, chunks, axis=1).astype(jnp.float32)
    packed = lax.dynamic_slice_in_dim(sketches.codes, first_chunk * size, chunks * size, axis=1)
    scales = lax.dynamic_slice_in_dim(sketches.scales, first_chunk * size, chunks * size, axis=1).astype(jnp.float32)[:, None]
    codes = codes_of(packed, width)
    levels = jnp.where(codes >= 2, jnp.where(codes == 3, OUTER, INNER), jnp.where(codes == 0, -OUTER, -INNER))
    means = jnp.einsum("kch,hi->kic", means, rotation, precision=lax.Precision.HIGHEST)
    if rotated.shape[1] >= width:  # many rows: one large matmul
        return jnp.einsum("krh,khs->krs", rotated, jnp.repeat(means, size, axis=2) + levels * scales, precision=lax.Precision.HIGHEST)
    # A few rows, as in decode: the product is fused with the unpacking, so nothing should stand between them.
    base = jnp.einsum("krh,khc->krc", rotated, means, precision=lax.Precision.HIGHEST)
    residual = jnp.einsum("krh,khs->krs", rotated, levels, precision=lax.Precision.HIGHEST)
    return jnp.repeat(base, size, axis=2) + residual * scales
