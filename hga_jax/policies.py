"""The selection policies as data: what is remembered of closed chunks, and how a block of queries turns it into opened pages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.routing import Selection, route_top
from hga_jax.summaries import key_sums


class Routed(NamedTuple):
    """What routing a block gives: the opened pages, the remembered requests, pages refused for lack of room (summed over kv heads), and
    the estimated attention mass of unopened pages (summed over live queries, averaged over heads)."""

    selection: Selection
    stamps: Int[Array, "K P"] | None
    refused: Int[Array, ""]
    unopened: Float[Array, ""]


class Policy(NamedTuple):
    """summarise: post-RoPE keys [K, whole chunks, H] -> summaries, any pytree that summaries.write understands.
    route: (query [K, G, Q, H], live [Q], own chunk, summaries, stamps, log of the window scores' summed exponentials [K, G, Q]) -> Routed.
    remembers: whether requests outlive their block; then `route` takes and returns a stamp a page.
    """

    summarise: Callable[[Float[Array, "K S H"]], Any]
    route: Callable[..., Routed]
    remembers: bool

    def new_stamps(self, kv_heads: int, pages: int) -> Int[Array, "K P"] | None:
        """Stamps of pages never requested."""
        return jnp.full((kv_heads, pages), -2, jnp.int32) if self.remembers else None


def policy_for(config: HGAConfig, rope: RopeConfig | None, head_dim: int, scale: float, rotation: Array | None = None) -> Policy:
    """The functions of config.policy, their settings filled in. Raises ValueError when the policy needs a rope and none is given."""
    if config.policy == "paper":
        if config.summary == "mixed_rope" and rope is None:
            raise ValueError("summary='mixed_rope' needs rope=RopeConfig(theta=...): give the keys' rotation or choose summary='mean'")
        return Policy(partial(key_sums, config=config, rope=rope), partial(_route_paper, config=config), remembers=False)
    raise NotImplementedError(f"policy={config.policy!r}")


def _route_paper(
    query: Float[Array, "K G Q H"],
    live: Bool[Array, " Q"],
    own_chunk: Array,
    summaries: Any,
    stamps: None,
    window_mass: Array,
    config: HGAConfig,
) -> Routed:
    return Routed(route_top(query, live, own_chunk, summaries, config), stamps, jnp.int32(0), jnp.float32(0))
