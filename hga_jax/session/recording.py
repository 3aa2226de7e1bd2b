"""Writing the history behind compute: blocks go to disk as layers and tokens are done, a bounded number of bytes at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hga_jax.cache.disk import PAGES, PIECE_SUMS, REQUESTS, BlockStore, BlockWriter, Header, block_id, piece_sums
from hga_jax.cache.host import put_on_host
from hga_jax.session.reuse import Stored, load_notes
from hga_jax.session.state_format import StateFormat, history_of, pack, take_pages, take_summaries
from pallas_kernels.dispatch import on_cuda

WRITERS = 4  # threads that wait for copies from the device, compute checksums and wait for TensorStore, which has its own for the disk
SYNCERS = 4  # threads that wait until complete blocks are on disk
SPAN = 16  # blocks of a layer that are copied from the device at a time, where there are so many: one launch, and copies at full speed
CPU_SEGMENT = 256  # tokens: on a CPU no slower than larger segments
SMALL_SEGMENT = 1024  # tokens: on a GPU some launches more, once or twice a prompt
LEAVING = 8  # spans that may be held on the device until they have left it: with more, prefill could run out of memory far ahead of them
IN_FLIGHT = 512 * 2**20  # bytes of pages on their way to the system's cache of files; more makes compute wait


class Budget:
    """Bytes in flight: `take` waits until there is room, or nothing else is under way."""

    def __init__(self, limit: int):
        self.limit, self.used, self.changed = limit, 0, threading.Condition()

    def take(self, size: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.used == 0 or self.used + size <= self.limit)
            self.used += size

    def give_back(self, size: int) -> None:
        with self.changed:
            self.used -= size
            self.changed.notify_all()


class _Block:
    """A block being written: its pages layer by layer, the rest when all layers are there."""

    def __init__(self, store: BlockStore, form: StateFormat, staging: Path, parent: str, first: int, tokens: np.ndarray):
        self.form, self.first, self.tokens = form, first, tokens
        self.end = first + len(tokens)
        self.writer = BlockWriter(store, staging, parent, first, tokens)
        self.writer.create(PAGES, form.arrays(len(tokens), self.end, 0)[PAGES])
        self.summaries = [[None] * form.layers for _ in form.summaries]
        self.sums: list[Any] = [None] * form.layers
        self.tasks: list[Future] = []

    def write_layer(self, layer: int, pages: np.ndarray, summaries: list[np.ndarray]) -> Any:
        """Start writing a layer; the arrays must not change until the future is done."""
        form, count = self.form, len(self.tokens)
        pages = pages[:, : form.pages(count)]
        beyond = self.end % form.group_size
        if beyond:
            pages = np.array(pages)
            pages[:, -1, :, beyond:] = 0  # what follows the last token is stale; equal tokens make equal files
        for held, part, (entries, _, _) in zip(self.summaries, summaries, form.summaries, strict=True):
            held[layer] = part[:, : entries * form.chunks(count)]
        future = self.writer.write(PAGES, pages, layer)
        self.sums[layer] = piece_sums(pages, form.piece_pages)
        return future

    def finish(self, notes: dict[int, Any]) -> Header:
        for task in self.tasks:
            task.result()
        points = sorted(position for position in notes if self.first < position <= self.end)
        specs = self.form.arrays(len(self.tokens), self.end, len(points))
        self.writer.create(PIECE_SUMS, specs[PIECE_SUMS])
        self.writer.write(PIECE_SUMS, np.stack(self.sums))
        for i, held in enumerate(self.summaries):
            self.writer.create(f"summaries.{i}", specs[f"summaries.{i}"])
            self.writer.write(f"summaries.{i}", np.stack(held))
        if REQUESTS in specs:
            self.writer.create(REQUESTS, specs[REQUESTS])
            pages = self.form.pages(self.end)
            stacked = [np.stack([pack(np.asarray(held)[i], pages, self.form.note) for held, i in notes[position]]) for position in points]
            self.writer.write(REQUESTS, np.stack(stacked, axis=1))
        return self.writer.finish(points)


class Recorder:
    """Stores one sequence as it grows. After an error nothing more is written and `error` says why; compute goes on.

    It starts after `stored`, the beginning that is on disk already. parent, first: of the block that is open. notes: by position in it, for
    each layer an (array, index) of what was noted there; None where the policy needs nothing.
    """

    def __init__(self, store: BlockStore, form: StateFormat, root: str, staging: Path, stored: Stored, in_flight: int = IN_FLIGHT):
        self.store, self.form, self.staging = store, form, staging
        self.parent, self.first = root, 0
        self.blocks: list[tuple[str, int]] = []
        self.notes: dict[int, list[tuple[Any, int]] | None] = {}
        for header in stored.chain:
            if header.end <= stored.length and len(header.tokens) == form.block_tokens:
                self._passed(header.id, len(header.tokens))
            else:
                points = [position for position in header.reuse if position <= stored.length]
                self.notes = dict.fromkeys(points)
                for position, held in load_notes(store, form, header, points).items():
                    self.notes[position] = [(held, layer) for layer in range(form.layers)]
        self.headers = {header.id: header for header in stored.chain}
        self.bytes_stored = sum(header.bytes for header in stored.chain)
        self.take_pages = take_pages  # how to come by a block's pages; other tiers than device and host have their own way
        self.error: Exception | None = None
        self._budget = Budget(in_flight)
        self._pool, self._syncers = ThreadPoolExecutor(WRITERS, "hga-store"), ThreadPoolExecutor(SYNCERS, "hga-sync")
        self._tasks: list[Future] = []
        self._leaving: deque[jax.Array] = deque()
        self._open: list[_Block] = []

    @property
    def note(self) -> Callable[[Any], Any] | None:
        """What prefill is to note of a layer's state after every segment."""
        return self.form.note

    def stretches(self, held: int, total: int) -> list[tuple[int, int | None]]:
        """How prefill is to go from `held` to `total` tokens: (end, tokens computed at a time, None: as planned), in order.

        There is a reuse point after every segment. They should end where blocks do, and lie close together where a next prompt is likely
        to differ: near the end, after the document. On a CPU small segments cost nothing, so all are small.
        """
        small = min(SMALL_SEGMENT if on_cuda() else CPU_SEGMENT, self.form.block_tokens)
        ends: dict[int, int | None] = {}
        if held % small:
            held = min(held + self.room(held), total)
            ends[held] = small
        if on_cuda() and total - held > 4 * small:
            held = (total - 1) // small * small - small
            ends[held] = None
        ends[total] = small
        return sorted(ends.items())

    def room(self, position: int) -> int:
        """Tokens from `position` to the end of its block: where decode must stop so that the block can be stored."""
        return self.form.block_tokens - position % self.form.block_tokens

    def prefilled(self, tokens: Int[np.ndarray, " T"], layer: int, state: Any, noted: dict[int, tuple[Any, int]]) -> None:
        """A layer has done all of `tokens`. noted: by position, what was noted of it there: an array and the index in it."""
        if self.error is None:
            self._attempt(self._prefilled, tokens, layer, state, noted)

    def _prefilled(self, tokens: np.ndarray, layer: int, state: Any, noted: dict[int, tuple[Any, int]]) -> None:
        size = self.form.block_tokens
        if layer == 0:
            parent = self.parent
            for begin in range(self.first, len(tokens) - size + 1, size):
                block = _Block(self.store, self.form, self.staging, parent, begin, tokens[begin : begin + size])
                self._open.append(block)
                parent = block.writer.id
            if self.form.note is None:
                size = self.form.chunk_size
                self.notes |= dict.fromkeys(range((self.first // size + 1) * size, len(tokens) + 1, size))
            else:
                self.notes |= {position: [] for position in noted}
        if self.form.note is not None:
            for position, found in noted.items():
                self.notes[position].append(found)
        spans = len(self._open) // SPAN * SPAN
        for begin in range(0, spans, SPAN):
            self._write_layer(self._open[begin : begin + SPAN], layer, state)
        for block in self._open[spans:]:
            self._write_layer([block], layer, state)
        if layer == self.form.layers - 1:
            for block in self._open:
                self._finish(block)
            self._open.clear()

    def decoded(self, tokens: Int[np.ndarray, " T"], states: Sequence[Any]) -> None:
        """All layers hold exactly these tokens; stores the block that ends with them, if one does."""
        if self.error is None and len(tokens) - self.first == self.form.block_tokens:
            self._attempt(self._store_open_block, tokens, states)

    def close_turn(self, tokens: Int[np.ndarray, " T"], states: Sequence[Any]) -> list[tuple[str, int]] | None:
        """Store what is left, wait for the disk, and return the chain of blocks that holds the tokens; None after an error."""
        blocks = self.blocks
        if self.error is None and len(tokens) > self.first:
            blocks = [*blocks, (block_id(self.parent, tokens[self.first :]), len(tokens) - self.first)]
            self._attempt(self._store_open_block, tokens, states)
        self._wait()
        if self.error is not None:
            return None
        self.bytes_stored = sum(self.headers[block].bytes for block, _ in blocks)
        return list(blocks)

    def flush(self) -> list[Header]:
        """Wait until all complete blocks are on disk, and return them. Raises OSError when they cannot be written."""
        self._wait()
        if self.error is not None:
            raise OSError(getattr(self.error, "errno", None), f"the history cannot be written below {self.store.directory}: {self.error}")
        return [self.headers[block] for block, _ in self.blocks]

    def _wait(self) -> None:
        wait(self._tasks)
        self._tasks.clear()
        self._leaving.clear()

    def close(self) -> None:
        for pool in (self._pool, self._syncers):  # in this order: what syncs waits for what writes
            pool.shutdown(wait=True, cancel_futures=True)

    def _store_open_block(self, tokens: np.ndarray, states: Sequence[Any]) -> None:
        end = len(tokens)
        self.notes[end] = None if self.form.note is None else [(_noted(state, note=self.form.note)[None], 0) for state in states]
        if self.form.note is None:
            self.notes |= dict.fromkeys(range(self.first + self.form.chunk_size, end, self.form.chunk_size))
        block = _Block(self.store, self.form, self.staging, self.parent, self.first, tokens[self.first :])
        for layer, state in enumerate(states):
            self._write_layer([block], layer, state)
        self._finish(block)

    def _write_layer(self, blocks: list[_Block], layer: int, state: Any) -> None:
        """Start writing a layer of neighbouring blocks."""
        form, first = self.form, blocks[0].first
        room = history_of(state).capacity - first
        size = form.kv_heads * form.pages(min(len(blocks) * form.block_tokens, room)) * form.page_bytes
        self._budget.take(size)
        if len(self._leaving) == LEAVING:
            self._leaving.popleft().block_until_ready()
        pages = self.take_pages(form, layer, state, first, len(blocks))
        if isinstance(pages, jax.Array):  # a copy of its own on the way to the host: the device goes on computing
            pages = put_on_host(pages)
            self._leaving.append(pages)
        summaries = take_summaries(form, state, first, len(blocks))
        for part in summaries:
            part.copy_to_host_async()

        def task() -> None:
            try:
                # Views: JAX's arrays stay as they are while there are any.
                data, parts = np.asarray(pages), [np.asarray(part) for part in summaries]
                writes = []
                for i, block in enumerate(blocks):
                    begin, per_block = i * form.pages(form.block_tokens), form.block_tokens // form.chunk_size
                    mine = [
                        part[:, i * per_block * entries : (i + 1) * per_block * entries]
                        for part, (entries, _, _) in zip(parts, form.summaries, strict=True)
                    ]
                    writes.append(block.write_layer(layer, data[:, begin : begin + form.pages(form.block_tokens)], mine))
                for write in writes:
                    write.result()
            finally:
                self._budget.give_back(size)

        future = self._submit(self._pool, task)
        for block in blocks:
            block.tasks.append(future)

    def _finish(self, block: _Block) -> None:
        notes = {position: note for position, note in self.notes.items() if block.first < position <= block.end}

        def task() -> None:
            self.headers[block.writer.id] = block.finish(notes)

        self._submit(self._syncers, task)
        if len(block.tokens) == self.form.block_tokens:
            self._passed(block.writer.id, len(block.tokens))
            self.notes = {position: note for position, note in self.notes.items() if position > block.end}

    def _passed(self, block: str, tokens: int) -> None:
        self.blocks.append((block, tokens))
        self.parent, self.first = block, self.first + tokens

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[[], Any]) -> Future:
        def guarded() -> Any:
            try:
                return task()
            except Exception as error:
                self.error = self.error or error
                raise

        future = pool.submit(guarded)
        self._tasks.append(future)
        return future

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Storage trouble of any kind must not end a generation."""
        try:
            action(*arguments)
        except (OSError, ValueError) as error:
            self.error = error


_noted = jax.jit(lambda state, note: note(state), static_argnames="note")
