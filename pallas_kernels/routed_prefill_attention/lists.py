"""Page lists as the kernels read them: windows and opened pages in one list of words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

SINCE_BITS = 8  # of a word: the first row of the chunk that sees the page; the other bits are the page
NOBODY = 2**SINCE_BITS - 1  # a word that no row sees


def window_pages(
    own_chunk: Int[Array, " B"], *, chunk_size: int, group_size: int, sink_chunks: int, local_chunks: int
) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
    """(pages, live) of the sinks and the local window of each block, W slots."""
    each = chunk_size // group_size
    local = jnp.maximum(own_chunk - local_chunks, 0)[:, None]
    sink, near = jnp.arange(sink_chunks * each), jnp.arange(local_chunks * each)
    pages = jnp.concatenate([jnp.broadcast_to(sink, (own_chunk.shape[0], sink.shape[0])), local * each + near], axis=1)
    live = jnp.concatenate([sink < local * each, local * each + near < own_chunk[:, None] * each], axis=1)
    return pages.astype(jnp.int32), live


def list_words(
    pages: Any, page_ids: Int[Array, "K B R M"], since: Int[Array, "K B R M"], counts: Int[Array, "K B R"],
    own_chunk: Int[Array, " B"], multiple: int, *, chunk_size: int, sink_chunks: int, local_chunks: int,
) -> tuple[Int[Array, "K B R slots"], Int[Array, "K B R"]]:  # fmt: skip
    """One word a page, page * 256 + first row that sees it, windows first; and the words in use. Slots are a multiple of `multiple`."""
    held, group_size = pages.shape[1], pages.shape[3]
    near, live = window_pages(own_chunk, chunk_size=chunk_size, group_size=group_size, sink_chunks=sink_chunks, local_chunks=local_chunks)
    window = jnp.where(live, near << SINCE_BITS, NOBODY)
    seen = (jnp.arange(page_ids.shape[3]) < counts[..., None]) & (since < chunk_size) & (page_ids >= 0) & (page_ids < held)
    listed = jnp.where(seen, (page_ids << SINCE_BITS) + jnp.maximum(since, 0), NOBODY)
    words = jnp.concatenate([jnp.broadcast_to(window[None, :, None], (*listed.shape[:3], window.shape[1])), listed], axis=-1)
    slots = max(pl.cdiv(words.shape[-1], multiple), 1) * multiple
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, slots - words.shape[-1])), constant_values=NOBODY)
    return words.astype(jnp.int32), (window.shape[1] + jnp.minimum(counts, page_ids.shape[3])).astype(jnp.int32)
