"""The state of one layer whose history is on disk: only the windows are on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hga_jax.cache.host import HostHistory
from hga_jax.cache.pages import page_count
from hga_jax.cache.window import window_page_count
from hga_jax.config import HGAConfig
from hga_jax.pytree import register


@register
@dataclass(frozen=True)
class DiskHistory(HostHistory):
    """`pages` has no byte: it only says how many pages there may be. window, length: as in HostHistory."""

    pages: Float[Array, "K P 0 g H"]

    @staticmethod
    def create(capacity: int, kv_heads: int, head_dim: int, dtype: Any, config: HGAConfig) -> DiskHistory:
        """Room for `capacity` tokens, whole pages; never a bank."""
        none = jnp.zeros((kv_heads, page_count(capacity, config.group_size), 0, config.group_size, head_dim), dtype)
        window = jnp.zeros((kv_heads, window_page_count(config), 2, config.group_size, head_dim), dtype)
        return DiskHistory(none, window, None, jnp.int32(0))

    def with_window_written(self, source_place: Int[Array, ""], page: Int[Array, ""], count: int, how: dict[str, Any]) -> DiskHistory:
        """Nothing to do: whoever stores the history reads the window itself."""
        return self
