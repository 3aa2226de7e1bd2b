"""The longest stored beginning of a prompt, and the states of the layers after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Int

from hga_jax.cache.disk import PAGES, REQUESTS, BlockStore, Header, StoreError, block_id, read
from hga_jax.session.state_format import StateFormat, history_of, unpack, with_memory, with_pages

READ_AHEAD = 512 * 2**20  # bytes of pages being read at a time: enough to keep a disk busy, little beside the history


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
        return {p: unpack(read(array[:, i].read(), folder)) for p, i in zip(positions, indices, strict=True)}
    except StoreError as error:
        raise DamagedBlock(header, error) from error


class Memory:
    """What a state needs beside its pages, of all layers: summaries and the requests at the end. Raises DamagedBlock."""

    def __init__(self, store: BlockStore, form: StateFormat, stored: Stored):
        self.form, self.stored = form, stored
        self.summaries = [_load_summaries(store, form, header) for header in stored.chain]
        self.notes = load_notes(store, form, stored.chain[-1], [stored.length]).get(stored.length)

    def put(self, layer: int, state: Any) -> Any:
        """The layer's state with its summaries and requests filled in."""
        chunks = history_of(state).capacity // self.form.chunk_size
        filled = [np.zeros((self.form.kv_heads, chunks * n, *shape), jnp.dtype(dtype)) for n, shape, dtype in self.form.summaries]
        for header, parts in zip(self.stored.chain, self.summaries, strict=True):
            for whole, (entries, _, _), piece in zip(filled, self.form.summaries, parts, strict=True):
                begin = header.first // self.form.chunk_size * entries
                count = min(piece.shape[2], whole.shape[1] - begin)
                whole[:, begin : begin + count] = piece[layer, :, :count]
        return with_memory(self.form, state, self.stored.length, filled, None if self.notes is None else self.notes[layer])


def load_states(store: BlockStore, form: StateFormat, stored: Stored, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """States that hold the stored tokens, in place of the empty ones given. Raises DamagedBlock.

    Every byte read is checked against its checksum. Layers are read ahead of the one being rebuilt.
    """
    memory = Memory(store, form, stored)
    sources = [open_pages(store, header) for header in stored.chain]
    layer_bytes = form.kv_heads * form.pages(stored.length) * form.page_bytes
    ahead = max(1, READ_AHEAD // layer_bytes)
    reads: list[tuple[np.ndarray, list[Any]]] = []
    done = []
    for layer, empty in enumerate(states):
        while len(reads) < min(form.layers, layer + 1 + ahead):
            reads.append(_start_reading(form, stored, sources, len(reads), history_of(empty).pages.shape))
        pages, futures = reads[layer]
        for header, future in zip(stored.chain, futures, strict=True):
            _checked(store, header, PAGES, future)
        reads[layer] = (np.zeros(0), [])
        done.append(memory.put(layer, with_pages(form, empty, stored.length, pages)))
    return tuple(done)


def _start_reading(
    form: StateFormat, stored: Stored, sources: list[Any], layer: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, list[Any]]:
    """Room for a layer's pages, and the futures of its parts being read straight into their places."""
    pages = np.empty(shape, jnp.dtype(form.dtype))
    target, futures, reached = ts.array(pages), [], 0
    for header, source in zip(stored.chain, sources, strict=True):
        first = header.first // form.group_size
        count = min(source.shape[2], shape[1] - first)
        futures.append(target[:, first : first + count].write(source[layer, :, :count]))
        reached = first + count
    pages[:, reached:] = 0
    return pages, futures


def open_pages(store: BlockStore, header: Header) -> Any:
    """The pages of a block as a TensorStore. Raises DamagedBlock."""
    return _checked(store, header, PAGES, store.open(header, PAGES))


def read_pages(store: BlockStore, header: Header, future: Any) -> np.ndarray:
    """Pages of a block that were asked for. Raises DamagedBlock."""
    return _checked(store, header, PAGES, future)


def _load_summaries(store: BlockStore, form: StateFormat, header: Header) -> list[np.ndarray]:
    names = [f"summaries.{i}" for i in range(len(form.summaries))]
    opened = [_checked(store, header, name, store.open(header, name)) for name in names]
    reads = [array.read() for array in opened]
    return [_checked(store, header, name, future) for name, future in zip(names, reads, strict=True)]


def _checked(store: BlockStore, header: Header, name: str, future: Any) -> Any:
    try:
        return read(future, store.folder(header.parent, header.id) / name)
    except StoreError as error:
        raise DamagedBlock(header, error) from error
