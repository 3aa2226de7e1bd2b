"""The longest stored beginning of a prompt, and the states of the layers after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from hga_jax.cache.disk import PAGES, REQUESTS, BlockStore, Header, StoreError, block_id, read
from hga_jax.session.state_format import StateFormat, history_of, rebuild, unpack

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


def load_states(store: BlockStore, form: StateFormat, stored: Stored, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """States that hold the stored tokens, in place of the empty ones given. Raises DamagedBlock.

    Every byte read is checked against its checksum. Layers are read ahead of the one being rebuilt.
    """
    summaries = [_load_summaries(store, form, header) for header in stored.chain]
    last = stored.chain[-1]
    notes = load_notes(store, form, last, [stored.length]).get(stored.length)
    sources = [_opened(store, header) for header in stored.chain]
    layer_bytes = form.kv_heads * form.pages(stored.length) * form.page_bytes
    ahead = max(1, READ_AHEAD // layer_bytes)
    reads: list[list[Any]] = []
    done = []
    for layer, empty in enumerate(states):
        while len(reads) < min(form.layers, layer + 1 + ahead):
            reads.append([source[len(reads)].read() for source in sources])
        shape = history_of(empty).pages.shape
        pages = np.zeros(shape, jnp.dtype(form.dtype))
        filled = [np.zeros(leaf_shape, dtype) for leaf_shape, dtype in _summary_shapes(form, shape[1])]
        for header, future, parts in zip(stored.chain, reads[layer], summaries, strict=True):
            first, part = header.first // form.group_size, _checked(store, header, PAGES, future)
            count = min(part.shape[1], shape[1] - first)
            pages[:, first : first + count] = part[:, :count]
            for whole, (entries, _, _), piece in zip(filled, form.summaries, parts, strict=True):
                begin = header.first // form.chunk_size * entries
                count = min(piece.shape[2], whole.shape[1] - begin)
                whole[:, begin : begin + count] = piece[layer, :, :count]
        reads[layer] = []
        done.append(rebuild(form, empty, stored.length, pages, filled, None if notes is None else notes[layer]))
    return tuple(done)


def _summary_shapes(form: StateFormat, pages: int) -> list[tuple[tuple[int, ...], Any]]:
    chunks = pages * form.group_size // form.chunk_size
    return [((form.kv_heads, chunks * entries, *shape), jnp.dtype(dtype)) for entries, shape, dtype in form.summaries]


def _opened(store: BlockStore, header: Header) -> Any:
    return _checked(store, header, PAGES, store.open(header, PAGES))


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
