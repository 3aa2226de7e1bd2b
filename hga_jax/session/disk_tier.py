"""A run whose history lies on disk: prefill brings one layer's pages to the device at a time, decode reads the pages that are opened.

Decoding goes layer by layer, since a compiled program cannot wait for a disk: one program projects and routes and says which pages it
opens, the host brings them (from its cache, or the disk), a second one attends to them and finishes the layer. The newest pages, of the
block that is not full yet, are in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax.attention import HGAAttention
from hga_jax.backend import Stats
from hga_jax.blocks import LayerState, new_state
from hga_jax.cache import DeviceHistory
from hga_jax.cache.disk import BlockStore, Header, StoreError
from hga_jax.cache.disk_history import DiskHistory
from hga_jax.cache.host import as_host
from hga_jax.cache.landing import Landing
from hga_jax.cache.page_cache import PageCache
from hga_jax.cache.window import place_of, window_places
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.decoding import Awaited, How, cannot_decode, close_chunk, finish_token, open_token
from hga_jax.model import Decoder, DecoderLayer
from hga_jax.policies import policy_for
from hga_jax.sampling import Sampling, sample
from hga_jax.session.recording import Recorder
from hga_jax.session.reuse import DamagedBlock, Memory, Stored, StoredPages, open_pages, read_pages, read_sums
from hga_jax.session.state_format import StateFormat, take_pages, with_memory
from pallas_kernels import dispatch
from pallas_kernels.sketch_routing import PageList

SMALLEST_LIST = 64  # pages a kv head that one attention program takes at least; longer lists come in powers of two


class DiskTier:
    """Where the history of one sequence is: full blocks on disk, the open block in host memory, windows in the layer states.

    host_bytes bounds the page cache. Raises ValueError for a backend other than HGAAttention.
    """

    def __init__(self, store: BlockStore, form: StateFormat, backend: HGAAttention, capacity: int, heads: int, host_bytes: int):
        config = backend.config
        self.store, self.form, self.config, self.rope = store, form, config, backend.rope
        self.capacity = -(-capacity // config.chunk_size) * config.chunk_size
        reason = cannot_decode(config, heads, form.kv_heads, self.capacity, form.head_dim)
        self.how = How(dispatch.choose("decoding", backend.implementation, reason))
        page = (2, form.group_size, form.head_dim)
        self.block_pages = form.pages(form.block_tokens)
        self.tail = np.zeros((form.layers, form.kv_heads, self.block_pages, *page), jnp.dtype(form.dtype))
        self.fresh: dict[int, Array] = {}  # by layer, what prefill left for `tail`: on its way from the device, for nobody to wait for
        self.full = 0  # blocks that are complete, at the beginning of the chain
        self.sums: list[np.ndarray] = []  # checksums of the pieces of each of them
        self.chain: list[Header] = []
        self.recorder: Recorder | None = None
        self._older: tuple[StoredPages, Landing] | None = None
        chunks, piece = self.capacity // config.chunk_size, (config.groups_per_chunk, *page)
        self.cache = PageCache(form.layers, form.kv_heads, chunks, piece, jnp.dtype(form.dtype), host_bytes, self._read_pieces)

    def new_states(self) -> tuple[LayerState, ...]:
        form = self.form
        policy = policy_for(self.config, self.rope, form.head_dim, form.head_dim**-0.5)
        return tuple(
            new_state(
                DiskHistory.create(self.capacity, form.kv_heads, form.head_dim, jnp.dtype(form.dtype), self.config),
                jnp.dtype(form.dtype), self.config, policy,
            )
            for _ in range(form.layers)
        )  # fmt: skip

    def load(self, stored: Stored) -> tuple[LayerState, ...]:
        """States that hold the stored tokens; of the pages only the windows and the open block are read. Raises DamagedBlock."""
        form, held = self.form, stored.length
        memory = Memory(self.store, form, stored, self.capacity)
        self._use([header for header in stored.chain if header.end <= held and len(header.tokens) == form.block_tokens])
        self.chain = list(stored.chain)
        places = np.asarray(window_places(jnp.int32(held), self.config).pages)
        most = form.pages(held)
        wanted = np.unique(np.concatenate([places[(places >= 0) & (places < most)], np.arange(self._tail_page(held), most)]))
        states = []
        for layer, empty in enumerate(self.new_states()):
            pages = np.zeros((form.kv_heads, self.capacity // form.group_size, *self.tail.shape[3:]), self.tail.dtype)
            pages[:, wanted] = self._stored_pages(layer, wanted)
            tail = pages[:, self._tail_page(held) : most]
            self.tail[layer, :, : tail.shape[1]] = tail
            window = jnp.array(pages[:, np.clip(places, 0, pages.shape[1] - 1)])
            history = replace(empty.history, window=window, length=jnp.int32(held))
            states.append(with_memory(form, replace(empty, history=history), held, *memory.of(layer)))
        return tuple(states)

    def record(self, recorder: Recorder) -> None:
        """The recorder that writes this history from now on."""
        self.recorder = recorder
        recorder.take_pages = self._take_pages

    def home(self, layer: int) -> _Home:
        """What brings a layer's history to the device and back in prefill."""
        return _Home(self, layer)

    def decode_tokens(
        self,
        decoder: Decoder,
        token: Int[Array, ""],
        position: Int[Array, ""],
        states: tuple[LayerState, ...],
        wanted: Int[Array, ""],
        stop_ids: Int[Array, " stops"],
        sampling: Sampling,
        key: Any,
        **_: Any,
    ) -> tuple[Int[np.ndarray, " n"], int, tuple[LayerState, ...], Stats]:
        """As programs.decode_tokens, with the host between the layers."""
        self._catch_up(int(position))
        for layer in list(self.fresh):
            self.land(layer)
        out, total, held, stops = [], Stats.zero(), int(position), set(np.asarray(stop_ids).tolist())
        last = int(token)
        while len(out) < int(wanted) and not (out and last in stops):
            logits, states, stats = self.decode_step(decoder, last, held, states)
            last, held = int(_draw(logits, sampling, key, jnp.int32(held))), held + 1
            out.append(last)
            total = total + stats
            if held % self.config.chunk_size == 0 or len(out) == int(wanted) or last in stops:
                states = self._settle(states, held)
        return np.asarray(out, np.int32), len(out), states, total

    def decode_step(
        self, decoder: Decoder, token: int, position: int, states: Sequence[LayerState]
    ) -> tuple[Float[Array, " V"], tuple[LayerState, ...], Stats]:
        """Feed one token: float32 logits after it."""
        before = replace(self.cache.counters)
        x, total, done = _embed(decoder, jnp.int32(token)), Stats.zero(), []
        where = jnp.int32(position)
        for index, (layer, state) in enumerate(zip(decoder.layers, states, strict=True)):
            self.cache.prefetch(index)
            awaited, state = _open_layer(layer, x, where, state, config=self.config, how=self.how)
            self.cache.prefetch((index + 1) % len(states))
            lists = [part for listed in awaited.lists for part in _parts(listed)]
            pages, count = self._gather(index, lists, position)
            x, stats = _finish_layer(layer, x, where, awaited, jnp.asarray(pages), count, config=self.config, how=self.how)
            total = total + stats
            done.append(state)
        after = self.cache.counters
        hits, wanted = after.found - before.found, after.wanted - before.wanted
        total = replace(total, bank_hits=jnp.float32(hits), bank_requests=jnp.float32(wanted))
        return _head(decoder, x), tuple(done), total

    def _gather(
        self, layer: int, lists: Sequence[tuple[Int[np.ndarray, "K _"], Int[np.ndarray, " K"]]], position: int
    ) -> tuple[Float[np.ndarray, "K n 2 g H"], Int[np.ndarray, "K 1"]]:
        """The listed pages of each kv head, one list after the other, in an array of one of few sizes; and how many they are."""
        total = sum(count for _, count in lists)
        size = SMALLEST_LIST
        while size < total.max(initial=0):
            size *= 2
        ids, places = np.zeros((len(total), size), np.int64), np.arange(size)
        begin = np.zeros(len(total), np.int64)
        for listed, count in lists:
            heads, rank = np.nonzero(np.arange(listed.shape[1]) < count[:, None])
            ids[heads, begin[heads] + rank] = listed[heads, rank]
            begin += count
        out = np.zeros((len(ids), size, *self.tail.shape[3:]), self.tail.dtype)
        heads, places = np.nonzero(places < total[:, None])
        pages, first = ids[heads, places], self._tail_page(position)
        recent = pages >= first
        out[heads[recent], places[recent]] = self.tail[layer, heads[recent], pages[recent] - first]
        if not recent.all():
            out[heads[~recent], places[~recent]] = self.cache.pages(layer, heads[~recent], pages[~recent])
        self.cache.counters.wanted += int(recent.sum())
        self.cache.counters.found += int(recent.sum())
        return out, total[:, None].astype(np.int32)

    def _settle(self, states: tuple[LayerState, ...], held: int) -> tuple[LayerState, ...]:
        """Summarise the newest chunk, and keep its pages in the open block."""
        per_chunk = self.config.groups_per_chunk
        page = (held - 1) // self.config.chunk_size * per_chunk
        place, first = int(place_of(jnp.int32(page), self.config)), page - self._tail_page(held - 1)
        done = []
        for layer, state in enumerate(states):
            state = _close(state, jnp.int32(held), config=self.config, rope=self.rope, how=self.how)
            self.tail[layer, :, first : first + per_chunk] = np.asarray(state.history.window[:, place : place + per_chunk])
            done.append(replace(state, history=replace(state.history, length=jnp.int32(held))))
        return tuple(done)

    def _take_pages(self, form: StateFormat, layer: int, state: LayerState, first: int, blocks: int) -> Any:
        """The recorder's way to the pages of blocks: from the device in prefill, else (one block) from the open one."""
        if isinstance(state.history, DeviceHistory):
            return take_pages(form, layer, state, first, blocks)
        self.land(layer)
        return self.tail[layer].copy()

    def land(self, layer: int) -> None:
        """See to it that the open block's pages of a layer are in `tail`."""
        pages = self.fresh.pop(layer, None)
        if pages is not None:
            self.tail[layer, :, : pages.shape[1]] = np.asarray(pages)

    def older_pages(self, layer: int, pages: int) -> Float[Array, "K n 2 g H"]:
        """The first pages of a layer, all of full blocks, on the device. Raises DamagedBlock."""
        if self._older is None or self._older[0].count != pages:
            blocks = self.chain[: pages // self.block_pages]
            shape = (self.form.kv_heads, pages, *self.tail.shape[3:])
            self._older = StoredPages(self.store, self.form, blocks, pages), Landing(shape, self.tail.dtype, 1)
        stored, landing = self._older
        room = landing.room()
        try:
            stored.wait(layer, stored.start(layer, room.data))
        except BaseException:
            landing.give_back(room)
            raise
        return landing.take(room, "device")

    def _catch_up(self, held: int) -> None:
        """Wait until all full blocks can be read."""
        if self.full * self.block_pages < self._tail_page(held):
            self._use(self.recorder.flush())

    def _use(self, chain: Sequence[Header]) -> None:
        """These are the full blocks now; those known before are among them."""
        self.sums += [read_sums(self.store, header) for header in chain[self.full :]]
        self.full, self.chain = len(chain), list(chain)

    def _tail_page(self, held: int) -> int:
        """First page of the block that is open when `held` tokens are held."""
        return held // self.form.block_tokens * self.block_pages

    def _read_pieces(self, layer: int, heads: Int[np.ndarray, " n"], chunks: Int[np.ndarray, " n"]) -> Any:
        """Start reading pieces of full blocks."""
        per_block = self.form.block_tokens // self.form.chunk_size
        block, inside = np.divmod(chunks, per_block)
        parts = []
        for b in np.unique(block):
            rows = np.flatnonzero(block == b)
            first, sums = inside[rows] * self.form.piece_pages, self.sums[b][layer, heads[rows], inside[rows]]
            parts.append((b, rows, self.store.read_pieces(self.chain[b], layer, heads[rows], first, self.form.piece_pages, sums)))

        def result() -> np.ndarray:
            out = np.empty((len(heads), *self.cache.piece), self.tail.dtype)
            for b, rows, pieces in parts:
                try:
                    out[rows] = pieces()
                except StoreError as error:
                    raise DamagedBlock(self.chain[b], error) from error
            return out

        return result

    def _stored_pages(self, layer: int, pages: Int[np.ndarray, " n"]) -> Float[np.ndarray, "K n 2 g H"]:
        """Pages of all kv heads straight from the stored blocks, the last one (not full perhaps) included."""
        form, heads = self.form, np.arange(self.form.kv_heads)
        out = np.zeros((form.kv_heads, len(pages), *self.tail.shape[3:]), self.tail.dtype)
        chunks = np.unique(pages[pages < self.full * self.block_pages] // form.piece_pages)
        if len(chunks):
            read = self._read_pieces(layer, np.repeat(heads, len(chunks)), np.tile(chunks, len(heads)))()
            pieces = read.reshape(len(heads), -1, *out.shape[2:])
            rows = np.flatnonzero(pages < self.full * self.block_pages)
            piece, inside = np.divmod(pages[rows], form.piece_pages)
            out[:, rows] = pieces[:, np.searchsorted(chunks, piece) * form.piece_pages + inside]
        rows = np.flatnonzero(pages >= self.full * self.block_pages)
        if len(rows):
            last = self.chain[self.full]
            stored = read_pages(self.store, last, open_pages(self.store, last)[layer].read())
            out[:, rows] = stored[:, pages[rows] - self.full * self.block_pages]
        return out


class _Home:
    """One layer's way between disk and device in prefill; the methods are those of AttentionBackend."""

    def __init__(self, tier: DiskTier, layer: int):
        self.tier, self.layer = tier, layer

    def prefill_buffer(self, state: LayerState) -> Float[Array, "K P 2 g H"]:
        tail = self.tier.tail
        return jnp.zeros((tail.shape[1], self.tier.capacity // self.tier.form.group_size, *tail.shape[3:]), tail.dtype)

    def load(self, state: LayerState, buffer: Float[Array, "K P 2 g H"], held: int) -> LayerState:
        tier = self.tier
        if held:
            tier._catch_up(held)
            first = tier._tail_page(held)
            if first:
                buffer = _put_pages(buffer, tier.older_pages(self.layer, first), jnp.int32(0))
            count = min(tier.block_pages, buffer.shape[1] - first)
            tier.land(self.layer)
            buffer = _put_pages(buffer, jnp.asarray(tier.tail[self.layer, :, :count]), jnp.int32(first))
        return replace(state, history=DeviceHistory(buffer, jnp.int32(held)))

    def unload(self, state: LayerState, worked: LayerState, held: int, end: int, most: int) -> tuple[LayerState, Array]:
        tier, buffer = self.tier, worked.history.pages
        first = tier._tail_page(end)
        count = min(tier.block_pages, buffer.shape[1] - first)
        if count > 0:
            tier.fresh[self.layer] = _cut_pages(buffer, jnp.int32(first), count=count)
        history = _window_of(state.history, buffer, jnp.int32(end), config=tier.config)
        return replace(worked, history=history), buffer


@partial(jax.jit, donate_argnums=0)
def _put_pages(buffer: Float[Array, "K P 2 g H"], pages: Float[Array, "K n 2 g H"], first: Int[Array, ""]) -> Float[Array, "K P 2 g H"]:
    return jax.lax.dynamic_update_slice_in_dim(buffer, pages, first, axis=1)


@partial(jax.jit, static_argnames="count")
def _cut_pages(buffer: Float[Array, "K P 2 g H"], first: Int[Array, ""], *, count: int) -> Float[Array, "K n 2 g H"]:
    return as_host(jax.lax.dynamic_slice_in_dim(buffer, first, count, axis=1))


@partial(jax.jit, static_argnames="config")
def _window_of(history: DiskHistory, buffer: Float[Array, "K P 2 g H"], end: Int[Array, ""], *, config: HGAConfig) -> DiskHistory:
    return history.with_window_of(buffer, end, window_places(end, config))


@partial(jax.jit, static_argnames=("config", "how"), donate_argnames="state")
def _open_layer(
    layer: DecoderLayer, x: Float[Array, " D"], position: Int[Array, ""], state: LayerState, *, config: HGAConfig, how: How
) -> tuple[Awaited, LayerState]:
    q, k, v = layer.attention.project(x[None], layer.attention_norm, position[None])
    return open_token(q[0], k[0], v[0], state, position, config, q.shape[-1] ** -0.5, how)


@partial(jax.jit, static_argnames=("config", "how"))
def _finish_layer(
    layer: DecoderLayer,
    x: Float[Array, " D"],
    position: Int[Array, ""],
    awaited: Awaited,
    pages: Float[Array, "K n 2 g H"],
    count: Int[Array, "K 1"],
    *,
    config: HGAConfig,
    how: How,
) -> tuple[Float[Array, " D"], Stats]:
    out, stats = finish_token(awaited, pages, count, position, config, pages.shape[-1] ** -0.5, how)
    x = layer.attention.o(out.reshape(-1), x)
    return layer.mlp(x[None], layer.mlp_norm)[0], stats


@partial(jax.jit, static_argnames=("config", "rope", "how"), donate_argnames="state")
def _close(state: LayerState, held: Int[Array, ""], *, config: HGAConfig, rope: RopeConfig | None, how: How) -> LayerState:
    width = state.history.head_dim
    return close_chunk(state, held, config, policy_for(config, rope, width, width**-0.5), how)


_embed = jax.jit(lambda decoder, token: decoder.embed(token[None])[0])
_head = jax.jit(lambda decoder, x: decoder.head(x))
_draw = jax.jit(lambda logits, sampling, key, position: sample(logits, sampling, jax.random.fold_in(key, position)))


def _parts(listed: PageList) -> list[tuple[Int[np.ndarray, "K _"], Int[np.ndarray, " K"]]]:
    """The lists of a page list one by one: (page ids of each kv head, how many are valid)."""
    counts = np.asarray(listed.count).T
    return list(zip(np.split(np.asarray(listed.ids), len(counts), axis=1), counts, strict=True))
