"""The longest stored beginning of a prompt, and the states of the layers after it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int, UInt

from hga_jax.backend import AttentionBackend
from hga_jax.cache.disk import PAGES, PIECE_SUMS, REQUESTS, BlockStore, Header, StoreError, block_id, read
from hga_jax.cache.landing import Landing
from hga_jax.session.state_format import Blank, StateFormat, history_of, unpack

READ_AHEAD = 5 * 2**28  # bytes of pages under way at a time, on the host and for a moment on the device: 2 layers of 256K tokens
MOST_AT_ONCE = 4  # layers under way at a time, enough to keep a disk busy


class DamagedBlock(StoreError):
    """A block whose content failed its checksum; `header` says which tokens it held."""

    def __init__(self, header: Header, reason: Exception):
        super().__init__(f"{reason} (tokens {header.first} to {header.end - 1})")
        self.header = header


@dataclass(frozen=True)
class Stored:
    """The first `length` tokens of a prompt are in the blocks of `chain`; the last block may hold more. problems: damage met on the way."""

    chain: tuple[Header, ...] = ()
    length: int = 0
    problems: tuple[str, ...] = field(default=())


def longest_stored(store: BlockStore, form: StateFormat, root: str, tokens: Int[np.ndarray, " T"], limit: int) -> Stored:
    """Follow the chain of blocks as far as the tokens agree; the last reuse point at or before `limit` counts."""
    parent, position, chain, points, problems = root, 0, [], [], []
    while position < limit:
        whole = tokens[position : position + form.block_tokens]
        candidates = store.children(parent)
        exact = block_id(parent, whole)
        candidates.sort(key=lambda block: block != exact)  # the one that agrees to its end first
        best: tuple[int, Header | None] = (position, None)
        for block in candidates:
            try:
                header = store.header(parent, block)
            except StoreError as error:
                problems.append(str(error))
                continue
            common = _common(header.tokens, tokens[position:])
            reached = max((p for p in header.reuse if p <= min(position + common, limit)), default=position)
            if block == exact and len(header.tokens) == form.block_tokens:
                best = (reached, header)
                break
            if reached > best[0]:
                best = (reached, header)
        reached, header = best
        if header is None:
            break
        chain.append(header)
        points.append(reached)
        if block_id(parent, whole) != header.id or len(header.tokens) < form.block_tokens:
            break
        parent, position = header.id, header.end
    # Blocks after the last usable reuse point are of no use.
    length = max(points, default=0)
    return Stored(tuple(header for header in chain if header.first < length), length, tuple(problems))


def _common(a: Int[np.ndarray, " m"], b: Int[np.ndarray, " n"]) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


def load_notes(store: BlockStore, form: StateFormat, header: Header, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """Request notes [L, K, P] of some of a block's reuse points. Raises DamagedBlock."""
    if form.note is None or not positions:
        return {}
    indices = [header.reuse.index(position) for position in positions]
    folder = store.folder(header.parent, header.id) / REQUESTS
    try:
        array = read(store.open(header, REQUESTS), folder)
        return {p: unpack(read(array[:, i].read(), folder), form.note) for p, i in zip(positions, indices, strict=True)}
    except StoreError as error:
        raise DamagedBlock(header, error) from error


class Memory:
    """What a state needs beside its pages, of all layers: summaries and the requests at the end. Raises DamagedBlock.

    capacity: tokens the states have room for.
    """

    def __init__(self, store: BlockStore, form: StateFormat, stored: Stored, capacity: int):
        chunks = form.chunks(capacity)
        shapes = [((form.layers, form.kv_heads, chunks * n, *shape), jnp.dtype(dtype)) for n, shape, dtype in form.summaries]
        self.summaries = [np.zeros(*shape) for shape in shapes]
        reads = [(header, f"summaries.{i}") for i in range(len(form.summaries)) for header in stored.chain]
        opened = [_checked(store, header, name, store.open(header, name)) for header, name in reads]
        futures = []
        for (header, name), source in zip(reads, opened, strict=True):
            index = int(name.rpartition(".")[2])
            begin = header.first // form.chunk_size * form.summaries[index][0]
            count = min(source.shape[2], self.summaries[index].shape[2] - begin)
            futures.append(ts.array(self.summaries[index][:, :, begin : begin + count]).write(source[:, :, :count]))
        for (header, name), future in zip(reads, futures, strict=True):
            _checked(store, header, name, future)
        self.notes = load_notes(store, form, stored.chain[-1], [stored.length]).get(stored.length)

    def of(self, layer: int) -> tuple[list[np.ndarray], UInt[np.ndarray, "K P"] | None]:
        """Summaries and requests of a layer."""
        return [held[layer] for held in self.summaries], None if self.notes is None else self.notes[layer]


class Spent:
    """Seconds spent on what: of the threads that did it, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        with self._lock:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - begin


def load_states(
    store: BlockStore, form: StateFormat, stored: Stored, backend: AttentionBackend, capacity: int, spent: Spent | None = None
) -> tuple[Any, ...]:
    """States that hold the stored tokens, with room for `capacity`. Raises DamagedBlock. spent: what it took is added there.

    Every byte read is checked against its checksum. A few layers are under way at a time.
    """
    spent = spent or Spent()
    with spent.on("opening"):
        blank = Blank(backend, form, capacity)
        shape = history_of(blank.shapes).pages.shape
        pages = StoredPages(store, form, stored.chain, shape[1])
    layer_bytes = math.prod(shape) * jnp.dtype(form.dtype).itemsize
    at_once = min(max(1, READ_AHEAD // layer_bytes), MOST_AT_ONCE, form.layers)
    landing = Landing(shape, form.dtype, at_once)

    def load(layer: int) -> Any:
        with spent.on("making or waiting for room"):
            room = landing.room()
        try:
            with spent.on("reading and checking pages"):
                pages.wait(layer, pages.start(layer, room.data))
        except BaseException:
            landing.give_back(room)  # for those who wait for it
            raise
        with spent.on("windows"):
            window = blank.window(stored.length, room.data)
        with spent.on("moving pages"):
            held = landing.take(room, "host" if blank.on_host else "device")
        with spent.on("waiting for summaries"):
            rest = memory.result().of(layer)
        with spent.on("moving summaries"):
            return blank.state(stored.length, held, window, *rest)

    def remember() -> Memory:
        with spent.on("reading and checking summaries"):
            return Memory(store, form, stored, history_of(blank.shapes).capacity)

    # While one layer's pages are on their way to the device, or memory is made for them, others' are being read.
    with ThreadPoolExecutor(at_once + 1, "hga-load") as pool:
        memory = pool.submit(remember)
        return tuple(pool.map(load, range(form.layers)))


class StoredPages:
    """The pages of a chain of blocks, one layer after the other, as far as `most` pages. Raises DamagedBlock."""

    def __init__(self, store: BlockStore, form: StateFormat, chain: Sequence[Header], most: int):
        self.store, self.chain = store, chain
        self.parts = _open_all(store, chain)
        whole = ts.concat(self.parts, axis=2)
        self.count = min(whole.shape[2], most)
        self.whole = whole[:, :, : self.count]

    def start(self, layer: int, target: Float[np.ndarray, "K P 2 g H"]) -> Any:
        """Start reading a layer straight into its place; the future is for `wait`. Pages beyond the stored ones are left as they are."""
        return ts.array(target[:, : self.count]).write(self.whole[layer])

    def wait(self, layer: int, future: Any) -> None:
        try:
            future.result()
        except (ValueError, KeyError, OSError):
            for header, part in zip(self.chain, self.parts, strict=True):  # which one it was
                _checked(self.store, header, PAGES, part[layer].read())
            raise


def _open_all(store: BlockStore, chain: Sequence[Header], name: str = PAGES) -> list[Any]:
    opened = [store.open(header, name) for header in chain]
    return [_checked(store, header, name, future) for header, future in zip(chain, opened, strict=True)]


def open_pages(store: BlockStore, header: Header) -> Any:
    """The pages of a block as a TensorStore. Raises DamagedBlock."""
    return _checked(store, header, PAGES, store.open(header, PAGES))


def read_pages(store: BlockStore, header: Header, future: Any) -> np.ndarray:
    """Pages of a block that were asked for. Raises DamagedBlock."""
    return _checked(store, header, PAGES, future)


def read_sums(store: BlockStore, header: Header) -> np.ndarray:
    """Checksums of a block's pieces, [L, K, chunks]. Raises DamagedBlock."""
    opened = _checked(store, header, PIECE_SUMS, store.open(header, PIECE_SUMS))
    return _checked(store, header, PIECE_SUMS, opened.read())


def _checked(store: BlockStore, header: Header, name: str, future: Any) -> Any:
    try:
        return read(future, store.folder(header.parent, header.id) / name)
    except StoreError as error:
        raise DamagedBlock(header, error) from error
