"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hga_jax.pytree import register


@register
@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0: the most likely token. top_k 0 and top_p 1: no cut."""

    temperature: float | Float[Array, ""] = 0.0
    top_k: int | Int[Array, ""] = 0
    top_p: float | Float[Array, ""] = 1.0

    @staticmethod
    def checked(temperature: float, top_k: int, top_p: float) -> Sampling:
        """Raises ValueError naming the value that makes no sense."""
        if not temperature >= 0:
            raise ValueError(f"{temperature=} must be 0 (greedy) or positive")
        if top_k < 0:
            raise ValueError(f"{top_k=} must be 0 (no cut) or positive")
        if not 0 < top_p <= 1:
            raise ValueError(f"{top_p=} must lie in (0, 1]")
        return Sampling(temperature, top_k, top_p)


def sample(logits: Float[Array, " V"], sampling: Sampling, key: Key[Array, ""]) -> Int[Array, ""]:
    """One token id, int32. top_k counts first, then top_p over what it left, as transformers does."""

    def draw() -> Array:
        order = jnp.argsort(-logits)
        scaled = logits[order] / sampling.temperature
        rank = jnp.arange(logits.shape[0])
        scaled = jnp.where((sampling.top_k <= 0) | (rank < sampling.top_k), scaled, -jnp.inf)
        share = jax.nn.softmax(scaled)
        before = jnp.cumsum(share) - share  # the most likely token always stays
        return order[jax.random.categorical(key, jnp.where(before < sampling.top_p, scaled, -jnp.inf))]

    greedy = jnp.argmax(logits).astype(jnp.int32)
    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, lambda: draw().astype(jnp.int32), lambda: greedy)
