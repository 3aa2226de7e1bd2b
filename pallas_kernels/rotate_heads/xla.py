"""The heads in plain JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.normalise import Norm, narrow, rms_norm


def rotate_heads(
    joined: Float[Array, "T total"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    q_norm: Norm | None,
    k_norm: Norm | None,
    heads: int,
    kv_heads: int,
    dtype: Any,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """See api.rotate_heads."""
    parts = joined.reshape(joined.shape[0], heads + 2 * kv_heads, -1)
    q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=1)
    q, k = (x if norm is None else rms_norm(x, norm, joined.dtype) for x, norm in ((q, q_norm), (k, k_norm)))
    return turn(q, cos, sin, dtype), turn(k, cos, sin, dtype), narrow(v, dtype)


def turn(x: Float[Array, "*B T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"], dtype: Any) -> Float[Array, "*B T N H"]:
    """Rotate the pairs (i, i + H/2), in float32."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return narrow(jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), dtype)
