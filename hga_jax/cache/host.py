"""The host tier: all pages of one layer in pinned host memory, the windows and a bank of pages on the device.

On a CPU the device's memory is the host's and everything runs through the same code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hga_jax.cache.pages import Paged, page_count
from hga_jax.cache.window import WindowPlaces, place_of, window_page_count
from hga_jax.config import HGAConfig
from hga_jax.pytree import register
from pallas_kernels.routed_decode_attention import Bank, copy_pages

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"  # JAX's own variable, read when its GPU client starts
PINNED_DEFAULT = 64  # GiB that JAX pins at most where the variable is not set: 640K tokens of Qwen3-30B-A3B


@register
@dataclass(frozen=True)
class HostHistory(Paged):
    """K/V of every token so far: closed pages in `pages` (host), those of the windows also, and the open chunk only, in `window` (device).

    pages[k, p, 0] are the keys of kv head k, tokens p*g .. p*g+g-1; pages[k, p, 1] their values. window: the same, by the places of
    cache.window. bank: routed pages kept on the device (None: every one is read from the host). length: tokens held; None inside a decode
    loop, where the position says it.
    """

    pages: Float[Array, "K P 2 g H"]
    window: Float[Array, "K W 2 g H"]
    bank: Bank | None
    length: Int[Array, ""] | None

    @staticmethod
    def create(capacity: int, kv_heads: int, head_dim: int, dtype: Any, config: HGAConfig) -> HostHistory:
        """Room for `capacity` tokens, whole pages; no bank."""
        page = (2, config.group_size, head_dim)
        window = jnp.zeros((kv_heads, window_page_count(config), *page), dtype)
        pages = jnp.zeros((kv_heads, page_count(capacity, config.group_size), *page), dtype)
        return HostHistory(put_on_host(pages), window, None, jnp.int32(0))

    def with_bank(self, bank_pages: int) -> HostHistory:
        """With an empty bank of at most so many pages of each kv head; 0: without one."""
        kv_heads, pages = self.pages.shape[:2]
        bank_pages = min(bank_pages, pages)
        if not bank_pages:
            return replace(self, bank=None)
        unused = jnp.full((kv_heads, pages), -1, jnp.int32), jnp.full((kv_heads, bank_pages), -1, jnp.int32)
        return replace(self, bank=Bank(jnp.zeros((kv_heads, bank_pages, *self.pages.shape[2:]), self.pages.dtype), *unused))

    def typed(self) -> HostHistory:
        """The same arrays; inside a program, where JAX takes an argument for device memory, the pages typed as what they are."""
        return replace(self, pages=as_host(self.pages))

    def with_window_written(self, source_place: Int[Array, ""], page: Int[Array, ""], count: int, how: dict[str, Any]) -> HostHistory:
        """Copy `count` neighbouring pages of the window to the host."""
        pages = copy_pages(
            self.pages, self.window, target_page=page, source_page=source_place, count=jnp.int32(count), most=count, **how
        )  # fmt: skip
        return replace(self, pages=as_host(pages))

    def with_pages_written(
        self,
        source: Float[Array, "K P 2 g H"],
        first: Int[Array, ""],
        end: Int[Array, ""],
        most: int,
        places: WindowPlaces,
        how: dict[str, Any],
    ) -> HostHistory:
        """Take the pages of tokens first .. end-1 from a device array laid out like `pages`, and the windows anew.

        `most`: a bound on the number of pages.
        """
        page, after = first // self.group_size, -(-end // self.group_size)
        pages = copy_pages(self.pages, source, target_page=page, source_page=page, count=after - page, most=most, **how)
        return replace(self.with_window_of(source, end, places), pages=as_host(pages))

    def with_window_of(self, source: Float[Array, "K P 2 g H"], end: Int[Array, ""], places: WindowPlaces) -> HostHistory:
        """Take the windows anew from a device array of all pages, which holds `end` tokens."""
        window = source[:, jnp.clip(places.pages, 0, source.shape[1] - 1)].astype(self.window.dtype)
        return replace(self, window=window, length=end)

    def read_into(
        self, target: Float[Array, "K P 2 g H"], end: Int[Array, ""], config: HGAConfig, how: dict[str, Any]
    ) -> Float[Array, "K P 2 g H"]:
        """Copy the pages of tokens 0 .. end-1 to the same places of a device array; those of the newest chunk from the windows."""
        nothing, count = jnp.int32(0), -(-end // self.group_size)
        target = copy_pages(target, self.pages, target_page=nothing, source_page=nothing, count=count, most=target.shape[1], **how)
        page, per_chunk = jnp.maximum(end - 1, 0) // config.chunk_size * config.groups_per_chunk, config.groups_per_chunk
        place = place_of(page, config)
        return copy_pages(target, self.window, target_page=page, source_page=place, count=jnp.int32(per_chunk), most=per_chunk, **how)


def allow_pinning(size: int) -> None:
    """Let JAX pin so many bytes of host memory, unless the user said how many. To be called before JAX looks for devices."""
    os.environ.setdefault(PINNED_LIMIT, str(size // 2**30))


def pinned_limit() -> int:
    """Bytes of host memory that JAX pins at most."""
    said = os.environ.get(PINNED_LIMIT, "")
    return (int(said) if said.isdecimal() else PINNED_DEFAULT) * 2**30


def put_on_host(array: Array) -> Array:
    """Move an array into pinned host memory, if it is elsewhere; on a CPU it is there already."""
    if jax.default_backend() == "cpu" or is_host(array):
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def put_on_device(array: Array) -> Array:
    """The inverse of `put_on_host`."""
    if jax.default_backend() == "cpu" or not is_host(array):
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def is_host(array: Array) -> bool:
    """Whether an array, also one inside a program, lies in host memory apart from the device's."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def as_host(array: Array) -> Array:
    """Inside a program: the same buffer, typed as host memory (a kernel's output is typed as device memory wherever it lies)."""
    return array if jax.default_backend() == "cpu" else jax.device_put(array, jax.memory.Space.Host)
