"""Stamps: what is remembered of a page, one int32, and which pages are open by them.

Where any request keeps a page open for the next chunk (`votes` 0), its stamp is the last chunk in which it was requested. Where votes do:
the last chunk in which it got any or was opened, whether it was open there, how many; chunk << 10 | open << 9 | votes, counted so that
ENOUGH of them keep the page open, however many that takes: who only asks whether a page is open need not know. Later chunks have larger
stamps either way. Works on arrays of any shape, in XLA and inside kernels alike.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

ENOUGH = 256
_MOST = 2 * ENOUGH - 1
_OPEN, _SHIFT = _MOST + 1, (_MOST + 1).bit_length()
NEVER = -2 << _SHIFT


def never(votes: int) -> int:
    """The stamp of a page that was not requested, or got no vote, yet."""
    return NEVER if votes else -2


def stamp_of(chunk: Any, opened: Any, cast: Any, votes: int) -> Any:
    """The stamp of a page for which so many votes were cast in a chunk, where `votes` keep it open, and that is, or is not, open there."""
    return (chunk << _SHIFT) + jnp.where(opened, _OPEN, 0) + jnp.minimum(cast + (ENOUGH - votes), _MOST)


def oldest_open(own_chunk: Any, votes: int) -> Any:
    """No page with a smaller stamp is open to queries of `own_chunk`."""
    return (own_chunk - 1) << (_SHIFT if votes else 0)


def is_open(stamps: Any, own_chunk: Any, votes: int, more: Any = 0) -> Any:
    """Whether a page is open to a query of `own_chunk` before it asks: opened in this chunk, or kept by the one before.

    votes: how many keep it open, 0: any request does. Without `more`, votes of the chunk before that the stamps do not know of, any number
    above 0 says the same.
    """
    if not votes:
        return stamps >= own_chunk - 1
    return (((stamps >> _SHIFT) == own_chunk) & ((stamps & _OPEN) > 0)) | (votes_in(stamps, own_chunk - 1, votes) + more >= votes)


def votes_in(stamps: Any, chunk: Any, votes: int) -> Any:
    """The votes that pages got in `chunk`, the last or any later one, where `votes` keep a page open."""
    return jnp.where((stamps >> _SHIFT) == chunk, (stamps & _MOST) - (ENOUGH - votes), 0)
