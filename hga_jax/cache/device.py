"""The device tier: the whole history of one layer and one sequence in one device array."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.cache.pages import Paged, page_count
from hga_jax.pytree import register


@register
@dataclass(frozen=True)
class DeviceHistory(Paged):
    """K/V of every token so far. pages[k, p, 0] are the keys of kv head k, tokens p*g .. p*g+g-1; pages[k, p, 1] their values.

    length: tokens held, int32 scalar (None inside a decode loop, where the position says it). What lies beyond it is zero or stale and
    must be masked by the reader.
    """

    pages: Float[Array, "K P 2 g H"]
    length: Int[Array, ""] | None

    @staticmethod
    def create(capacity: int, kv_heads: int, head_dim: int, group_size: int, dtype) -> DeviceHistory:
        """Room for `capacity` tokens, rounded up to whole pages."""
        shape = (kv_heads, page_count(capacity, group_size), 2, group_size, head_dim)
        return DeviceHistory(jnp.zeros(shape, dtype), jnp.int32(0))

    @staticmethod
    def holding(key: Float[Array, "S K H"], value: Float[Array, "S K H"], group_size: int, capacity: int) -> DeviceHistory:
        """A history of the tokens given, with room for `capacity` (whole pages, at least S)."""
        tokens, kv_heads, head_dim = key.shape
        rows = jnp.pad(jnp.stack([key, value.astype(key.dtype)]), ((0, 0), (0, capacity - tokens), (0, 0), (0, 0)))
        pages = rows.reshape(2, capacity // group_size, group_size, kv_heads, head_dim).transpose(3, 1, 0, 2, 4)
        return DeviceHistory(pages, jnp.int32(tokens))

    def append(self, key: Float[Array, "T K H"], value: Float[Array, "T K H"], count: Int[Array, ""]) -> DeviceHistory:
        """Add the first `count` rows after the tokens held. The caller sees to it that they fit."""
        rows = jnp.stack([key, value]).transpose(2, 0, 1, 3).astype(self.pages.dtype)  # [K, 2, T, H]
        if key.shape[0] == 1:
            page, slot = jnp.divmod(self.length, self.group_size)
            pages = lax.dynamic_update_slice(self.pages, rows[:, None], (0, page, 0, slot, 0))
            return replace(self, pages=pages, length=self.length + count)
        # A stretch of whole pages that covers the new rows wherever they start in a page; rows outside the new ones keep what was there.
        span = min(-(-key.shape[0] // self.group_size) + 1, self.pages.shape[1])
        first = jnp.minimum(self.length // self.group_size, self.pages.shape[1] - span)
        old = lax.dynamic_slice_in_dim(self.pages, first, span, axis=1)
        source = jnp.arange(span * self.group_size) + first * self.group_size - self.length
        new = rows[:, :, jnp.clip(source, 0, key.shape[0] - 1)].reshape(*rows.shape[:2], span, self.group_size, -1).swapaxes(1, 2)
        fresh = ((source >= 0) & (source < count)).reshape(span, 1, self.group_size, 1)
        pages = lax.dynamic_update_slice_in_dim(self.pages, jnp.where(fresh, new, old), first, axis=1)
        return replace(self, pages=pages, length=self.length + count)

    def span(self, first_page: Int[Array, ""], pages: int) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
        """Keys and values of `pages` neighbouring pages; a stretch that would pass an end is moved inside."""
        part = lax.dynamic_slice_in_dim(self.pages, first_page, pages, axis=1)  # [K, n, 2, g, H]
        keys, values = part[:, :, 0], part[:, :, 1]
        flat = (part.shape[0], pages * self.group_size, part.shape[-1])
        return keys.reshape(flat), values.reshape(flat)

    def take(self, page_ids: Int[Array, "K n"]) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
        """Keys and values of the named pages of each kv head, in that order."""
        # Two gathers, each copying its rows once; one gather of both and a slice would copy them twice.
        keys, values = (jax.vmap(lambda pages, ids, side=side: pages[ids, side])(self.pages, page_ids) for side in (0, 1))
        flat = (keys.shape[0], keys.shape[1] * self.group_size, keys.shape[-1])
        return keys.reshape(flat), values.reshape(flat)
