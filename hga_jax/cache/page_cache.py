"""A bounded cache of pages in host memory, in front of pages that lie on disk.

Its unit is a *piece*, the pages of one chunk of one kv head: what is read from disk and checked in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

Reader = Callable[[int, Int[np.ndarray, " n"], Int[np.ndarray, " n"]], Any]


@dataclass
class Counters:
    """pages wanted, of which found in memory; bytes read from disk."""

    wanted: int = 0
    found: int = 0
    bytes_read: int = 0


class PageCache:
    """At most `limit` bytes of pages.

    Layers come in turn, token by token, and want most of what they wanted at the last token. So what was wanted at this token or the last
    one stays, and of the rest the least recently used gives way: with plain LRU, a cache smaller than a token's pages would lose each
    before it is wanted again.
    read: (layer, kv heads [n], chunks [n]) -> a future of their pages [n, pages a chunk, 2, g, H]; may take several at a time.
    Not safe for use by several threads.
    """

    def __init__(self, layers: int, kv_heads: int, chunks: int, piece: tuple[int, ...], dtype: Any, limit: int, read: Reader):
        self.kv_heads, self.chunks, self.piece, self.dtype, self.read = kv_heads, chunks, piece, np.dtype(dtype), read
        self.piece_bytes = int(np.prod(piece)) * self.dtype.itemsize
        slots = min(limit // self.piece_bytes, layers * kv_heads * chunks)
        self.data: Num[np.ndarray, "slots p 2 g H"] = np.zeros((slots, *piece), self.dtype)
        self.slot_of = np.full((layers, kv_heads * chunks), -1, np.int32)
        self.owner = np.full(slots, -1, np.int64)  # flat index into slot_of
        self.used = np.full(slots, -2, np.int64)  # the token that wanted a slot last
        self.now, self.last_layer = 0, -1
        self.ahead: dict[int, tuple[np.ndarray, Any]] = {}  # pieces being read before they are asked for, by layer
        self.wanted_last: dict[int, np.ndarray] = {}
        self.counters = Counters()

    def prefetch(self, layer: int) -> None:
        """Start reading what the layer wanted at the last token and what is no longer here: most of it will be wanted again."""
        last = self.wanted_last.get(layer)
        if last is None or layer in self.ahead:
            return
        missing = last[self.slot_of[layer, last] < 0]
        if len(missing):
            self.ahead[layer] = missing, self._start(layer, missing)

    def pages(self, layer: int, heads: Int[np.ndarray, " n"], pages: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 2 g H"]:
        """The named pages of a layer, those not in the cache from disk."""
        self.now += layer <= self.last_layer  # the layers begin anew: the next token
        self.last_layer = layer
        per_chunk = self.piece[0]
        keys, inverse, counts = np.unique(heads * self.chunks + pages // per_chunk, return_inverse=True, return_counts=True)
        slots = self.slot_of[layer, keys]
        there = slots >= 0
        self.used[slots[there]] = self.now
        self.counters.wanted += len(pages)
        self.counters.found += int(counts[there].sum())
        pieces = np.empty((len(keys), *self.piece), self.dtype)
        pieces[there] = self.data[slots[there]]
        if not there.all():
            missing = keys[~there]
            fresh = self._fetch(layer, missing)
            pieces[~there] = fresh
            self._keep(layer, missing, fresh)
        self.ahead.pop(layer, None)
        self.wanted_last[layer] = keys
        return pieces[inverse, pages % per_chunk]

    def _fetch(self, layer: int, keys: np.ndarray) -> np.ndarray:
        early, future = self.ahead.get(layer, (np.zeros(0, np.int64), None))
        late = np.setdiff1d(keys, early, assume_unique=True)
        reading = self._start(layer, late) if len(late) else None
        fresh = np.empty((len(keys), *self.piece), self.dtype)
        if future is not None:
            here, where = np.isin(keys, early), np.searchsorted(early, keys)
            fresh[here] = future()[where[here]]
        if reading is not None:
            fresh[np.isin(keys, late)] = reading()
        return fresh

    def _start(self, layer: int, keys: np.ndarray) -> Any:
        self.counters.bytes_read += len(keys) * self.piece_bytes
        return self.read(layer, keys // self.chunks, keys % self.chunks)

    def _keep(self, layer: int, keys: np.ndarray, fresh: np.ndarray) -> None:
        count = min(len(keys), len(self.used))
        if not count:
            return
        victims = np.argpartition(self.used, count - 1)[:count]
        victims = victims[self.used[victims] < self.now - 1]
        keys, fresh = keys[: len(victims)], fresh[: len(victims)]
        old = self.owner[victims]
        self.slot_of.reshape(-1)[old[old >= 0]] = -1
        self.data[victims], self.used[victims] = fresh, self.now
        self.owner[victims] = layer * self.slot_of.shape[1] + keys
        self.slot_of[layer, keys] = victims
