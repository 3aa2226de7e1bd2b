"""What is remembered of a page where votes keep it open: the last chunk in which it got any, whether it was open there, how many.

All three fit one int32, chunk << 10 | open << 9 | votes, so that a stamp stays one number and later chunks have larger ones. Works on
arrays of any shape, in XLA and inside kernels alike.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

MOST = 511  # votes that can be told apart: more than the query heads of a chunk that share a kv head ever need
_OPEN, _SHIFT = MOST + 1, (MOST + 1).bit_length()
NEVER = -2 << _SHIFT


def stamp_of(chunk: Any, opened: Any, votes: Any) -> Any:
    """The stamp of a page that got so many votes in a chunk and is, or is not, open there."""
    return (chunk << _SHIFT) + jnp.where(opened, _OPEN, 0) + jnp.minimum(votes, MOST)


def oldest_open(own_chunk: Any) -> Any:
    """No page with a smaller stamp is open to queries of `own_chunk`."""
    return (own_chunk - 1) << _SHIFT


def is_open(stamps: Any, own_chunk: Any, votes: int, more: Any = 0) -> Any:
    """Whether a page is open to a query of `own_chunk` before it asks: opened in this chunk, or kept by enough votes of the one before.

    more: votes of the chunk before that the stamps do not know of.
    """
    return (((stamps >> _SHIFT) == own_chunk) & ((stamps & _OPEN) > 0)) | (votes_in(stamps, own_chunk - 1) + more >= votes)


def votes_in(stamps: Any, chunk: Any) -> Any:
    """The votes that pages got in `chunk`, the last or any later one."""
    return jnp.where((stamps >> _SHIFT) == chunk, stamps & MOST, 0)
