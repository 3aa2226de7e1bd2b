"""The selection policies as data: what is remembered of closed chunks, what queries request of it, and what is granted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.routing import Granted, grant_each, grant_remembered, request_by_threshold, request_top
from hga_jax.sketches import built_in_rotation, key_sketches
from hga_jax.summaries import key_sums


class Policy(NamedTuple):
    """summarise: post-RoPE keys [K, whole chunks, H] -> summaries, any pytree that summaries.write understands.
    request: (query [K, B, G, Q, H] of B neighbouring chunks, live [B, Q], their chunks [B], summaries, log of the window scores' summed
    exponentials [K, B, G, Q]) -> what those queries ask for, any pytree; needs nothing of what was requested before.
    grant: (requests, b, chunk of block b, stamps) -> routing.Granted: the pages open to block b; called block by block.
    remembers: whether requests outlive their block; then `grant` takes and returns a stamp a page.
    """

    summarise: Callable[[Float[Array, "K S H"]], Any]
    request: Callable[..., Any]
    grant: Callable[..., Granted]
    remembers: bool

    def new_stamps(self, kv_heads: int, pages: int) -> Int[Array, "K P"] | None:
        """Stamps of pages never requested."""
        return jnp.full((kv_heads, pages), -2, jnp.int32) if self.remembers else None


def policy_for(
    config: HGAConfig, rope: RopeConfig | None, head_dim: int, scale: float, rotation: Array | np.ndarray | None = None
) -> Policy:
    """The functions of config.policy, their settings filled in. Raises ValueError when the policy needs a rope and none is given."""
    if config.policy == "paper":
        if config.summary == "mixed_rope" and rope is None:
            raise ValueError("summary='mixed_rope' needs rope=RopeConfig(theta=...): give the keys' rotation or choose summary='mean'")
        return Policy(partial(key_sums, config=config, rope=rope), partial(request_top, config=config), grant_each, remembers=False)
    rotation = jnp.asarray(built_in_rotation(head_dim) if rotation is None else rotation, jnp.float32)
    return Policy(
        partial(key_sketches, chunk_size=config.chunk_size, rotation=rotation),
        partial(request_by_threshold, config=config, rotation=rotation, scale=scale),
        partial(grant_remembered, capacity=config.page_capacity),
        remembers=True,
    )
