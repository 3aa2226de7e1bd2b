"""The expert choice in plain JAX."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int


def moe_routing(scores: Float[Array, "T E"], choices: int, renormalise: bool) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See api.moe_routing."""
    weights, ids = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), choices)
    return ids, weights / weights.sum(-1, keepdims=True) if renormalise else weights
