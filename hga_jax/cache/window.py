"""Where the pages of the windows (sinks, local window, own chunk) are kept, by arithmetic: places that follow from the position alone.

The sinks have fixed places, the chunks after them a ring: the place of a page never changes while it is in the windows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from hga_jax.config import HGAConfig


class WindowPlaces(NamedTuple):
    """pages: page at each place. valid: how many of its tokens the windows hold. open_place: place of the page of the newest token."""

    pages: Int[Array, " W"]
    valid: Int[Array, " W"]
    open_place: Int[Array, ""]


def window_page_count(config: HGAConfig) -> int:
    """Places for pages: sinks, local window and the own chunk."""
    return (config.sink_chunks + config.local_chunks + 1) * config.groups_per_chunk


def window_places(position: Int[Array, ""], config: HGAConfig) -> WindowPlaces:
    """The windows of the token at `position`, which counts itself."""
    per_chunk, sinks, ring = config.groups_per_chunk, config.sink_chunks, config.local_chunks + 1
    own = position // config.chunk_size
    place = jnp.arange(sinks + ring)
    chunk = jnp.where(place < sinks, place, own - (own - place) % ring)  # the youngest chunk whose turn in the ring it is
    chunk = jnp.where((place >= sinks) & (chunk < sinks), -1, chunk)
    pages = (chunk[:, None] * per_chunk + jnp.arange(per_chunk)).reshape(-1)
    valid = jnp.where(pages < 0, 0, jnp.clip(position + 1 - pages * config.group_size, 0, config.group_size))
    return WindowPlaces(pages, valid, place_of(position // config.group_size, config))


def place_of(page: Int[Array, ""], config: HGAConfig) -> Int[Array, ""]:
    """Where a page is kept while it is in the windows."""
    chunk, inside = jnp.divmod(page, config.groups_per_chunk)
    place = jnp.where(chunk < config.sink_chunks, chunk, config.sink_chunks + (chunk - config.sink_chunks) % (config.local_chunks + 1))
    return place * config.groups_per_chunk + inside
