"""A layer's state taken apart into stretches of plain arrays, and put together again: all that storage knows about attention.

Pages and summaries of a stretch of tokens never change once its chunks are closed. Of the remembered requests only those of the last two
chunks matter to the queries that follow, so that a *reuse point* is described by two bits a page, or two bytes where votes count, and by
the energies of the first queries, where prefill chooses rotary pairs by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt, UInt8

from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend
from hga_jax.blocks import LayerState
from hga_jax.cache import HostHistory
from hga_jax.cache.disk import PAGES, PIECE_SUMS, REQUESTS, ArraySpec
from hga_jax.cache.host import is_host, put_on_host
from hga_jax.cache.window import window_places
from hga_jax.config import HGAConfig, ModelConfig
from pallas_kernels import votes
from pallas_kernels.host_rows import copy_rows
from pallas_kernels.routed_decode_attention import copy_pages

CHUNKS_A_BLOCK = 16  # 1024 tokens: 2 MB a layer of Qwen3-30B; what a turn rewrites at most
DENSE_CHUNK = 64  # dense attention has no chunks; reuse points and pieces of the same size as HGA's serve it


@dataclass(frozen=True)
class RequestNote:
    """What prefill notes after every segment: 2 for pages requested in the chunk that comes next, 1 in the one before, else 0.

    Where votes count: by how much a page's stamp passes the least that can matter to the chunk that comes next, plus 1; else 0.
    Before the pages come the bytes of the state's energies, of which there are so many a kv head.
    """

    chunk_size: int
    votes: int = 0
    energies: int = 0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.votes else np.uint8)

    @property
    def front(self) -> int:
        """Numbers before those of the pages."""
        return 4 * self.energies // self.dtype.itemsize

    def oldest(self, length: Any) -> Any:
        """The least stamp that matters to queries from token `length` on."""
        return votes.oldest_open(length // self.chunk_size, self.votes)

    def __call__(self, state: LayerState) -> UInt[Array, "K n"]:
        lately = jnp.maximum(state.stamps - self.oldest(state.length) + 1, 0).astype(self.dtype)
        if not self.energies:
            return lately
        energy = jnp.zeros((len(lately), self.energies)) if state.energy is None else state.energy
        words = lax.bitcast_convert_type(energy.astype(jnp.float32), self.dtype)
        return jnp.concatenate([words.reshape(len(lately), -1), lately], axis=1)

    def stamps(self, notes: UInt[np.ndarray, "K n"] | None, shape: tuple[int, ...], length: int) -> Int[np.ndarray, "K P"]:
        """The stamps that make these notes, others never requested."""
        lately = np.zeros(shape, np.int32)
        if notes is not None:
            of_pages = notes[:, self.front :][:, : shape[1]]
            lately[:, : of_pages.shape[1]] = of_pages
        return np.where(lately > 0, lately - 1 + self.oldest(length), votes.never(self.votes))

    def energy(self, notes: UInt[np.ndarray, "K n"] | None, shape: tuple[int, ...]) -> Float[np.ndarray, "K half"]:
        """The energies in these notes, or zeros."""
        if notes is None or not self.energies:
            return np.zeros(shape, np.float32)
        return np.ascontiguousarray(notes[:, : self.front]).view(np.float32)

    def packed_bytes(self, pages: int) -> int:
        return 4 * self.energies + (2 * pages if self.votes else -(-pages // 4))


@dataclass(frozen=True)
class StateFormat:
    """The shapes of what is stored of each layer, for one model and attention backend.

    summaries: (entries a chunk, shape of an entry, dtype) of each array the policy keeps. note: what describes a reuse point, None where
    queries remember nothing and every chunk's end is one. hga: the settings that say which pages are windows, None for dense attention.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    group_size: int
    chunk_size: int
    summaries: tuple[tuple[int, tuple[int, ...], str], ...]
    note: RequestNote | None
    hga: HGAConfig | None

    @staticmethod
    def of(backend: AttentionBackend, config: ModelConfig, dtype: Any, energies: bool = True) -> StateFormat:
        """energies: whether notes have them, where there are such; not those of sessions begun before."""
        hga = isinstance(backend, HGAAttention)
        chunk = backend.config.chunk_size if hga else DENSE_CHUNK
        group = backend.config.group_size if hga else backend.page_size
        state = jax.eval_shape(lambda: backend.init_state(chunk, config.kv_heads, config.head_dim, dtype))
        leaves = jax.tree.leaves(state.summaries) if hga else []
        summaries = tuple((leaf.shape[1], leaf.shape[2:], jnp.dtype(leaf.dtype).name) for leaf in leaves)
        note = None
        if hga and state.stamps is not None:
            half = config.head_dim // 2 if energies and has_energies(backend.config) else 0
            note = RequestNote(chunk, votes=backend.config.counts_votes, energies=half)
        settings = backend.config if hga else None
        return StateFormat(
            config.layers, config.kv_heads, config.head_dim, jnp.dtype(dtype).name, group, chunk, summaries, note, settings
        )  # fmt: skip

    @property
    def block_tokens(self) -> int:
        return CHUNKS_A_BLOCK * self.chunk_size

    @property
    def page_bytes(self) -> int:
        return 2 * self.group_size * self.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def piece_pages(self) -> int:
        """Pages of a kv head that are read and checked together when single pages are wanted: those of a chunk."""
        return self.chunk_size // self.group_size

    def chunks(self, tokens: int) -> int:
        """Chunks that `tokens` tokens touch."""
        return -(-tokens // self.chunk_size)

    def pages(self, tokens: int) -> int:
        """Pages that `tokens` tokens touch."""
        return -(-tokens // self.group_size)

    def arrays(self, tokens: int, end: int, points: int) -> dict[str, ArraySpec]:
        """The stored arrays of a block of `tokens` tokens that ends at position `end`, with `points` reuse points."""
        tail = (2, self.group_size, self.head_dim)
        held = (self.layers, self.kv_heads, self.pages(tokens), *tail)
        specs = {PAGES: ArraySpec(held, self.dtype, (1, *held[1:]))}
        held = (self.layers, self.kv_heads, self.chunks(tokens))
        specs[PIECE_SUMS] = ArraySpec(held, "uint32", held)
        for i, (entries, shape, dtype) in enumerate(self.summaries):
            held = (self.layers, self.kv_heads, entries * self.chunks(tokens), *shape)
            specs[f"summaries.{i}"] = ArraySpec(held, dtype, held)
        if self.note is not None and points:
            held = (self.layers, points, self.kv_heads, self.note.packed_bytes(self.pages(end)))
            specs[REQUESTS] = ArraySpec(held, "uint8", (self.layers, 1, *held[2:]))
        return specs


def has_energies(config: HGAConfig) -> bool:
    """Whether prefill may choose rotary pairs, by energies that a stored history must have for that."""
    return config.policy == "sketch" and config.screening == "off" and config.scan_pairs != 0


def history_of(state: Any) -> Any:
    """The K/V history inside a layer's state."""
    return state.history if isinstance(state, LayerState) else state


@partial(jax.jit, static_argnames="pages")
def _pages(history: Any, first: Int[Array, ""], *, pages: int) -> Float[Array, "K n 2 g H"]:
    if isinstance(history, HostHistory) and jax.default_backend() != "cpu":  # only kernels read host memory in place
        empty = jnp.zeros((history.kv_heads, pages, *history.pages.shape[2:]), history.pages.dtype)
        return copy_pages(
            empty, history.typed().pages, target_page=jnp.int32(0), source_page=first, count=jnp.int32(pages), most=pages,
            implementation="pallas",
        )  # fmt: skip
    return lax.dynamic_slice_in_dim(history.pages, first, pages, axis=1)


@partial(jax.jit, static_argnames=("chunks", "per_chunk"))
def _summaries(summaries: Any, first: Int[Array, ""], *, chunks: int, per_chunk: tuple[int, ...]) -> list[Array]:
    def rows(leaf: Array, entries: int) -> Array:
        first_row, count = first * entries, chunks * entries
        if is_host(leaf):
            empty = jnp.zeros((leaf.shape[0], count, *leaf.shape[2:]), leaf.dtype)
            return copy_rows(empty, leaf, target_row=jnp.int32(0), source_row=first_row, count=count)
        return lax.dynamic_slice_in_dim(leaf, first_row, count, axis=1)

    return [rows(leaf, entries) for leaf, entries in zip(jax.tree.leaves(summaries), per_chunk, strict=True)]


def take_pages(form: StateFormat, layer: int, state: Any, first: int, blocks: int = 1) -> Any:
    """A copy of the pages of some blocks from token `first` on, or what the history has room for: few programs serve all lengths."""
    history = history_of(state)
    return _pages(history, jnp.int32(first // form.group_size), pages=form.pages(min(blocks * form.block_tokens, history.capacity - first)))


def take_summaries(form: StateFormat, state: Any, first: int, blocks: int = 1) -> list[Array]:
    """Copies of their summaries, likewise."""
    if not form.summaries:
        return []
    chunks = form.chunks(min(blocks * form.block_tokens, history_of(state).capacity - first))
    per_chunk = tuple(entries for entries, _, _ in form.summaries)
    return _summaries(state.summaries, jnp.int32(first // form.chunk_size), chunks=chunks, per_chunk=per_chunk)


def pack(notes: UInt[np.ndarray, "*n P"], pages: int, note: RequestNote) -> UInt8[np.ndarray, "*n B"]:
    """Notes of the first `pages` pages; pages that the notes do not reach are zero.

    Energies as they are. Of requests four a byte, the first in the lowest bits; of votes two bytes each, the lower first.
    """
    front, notes = notes[..., : note.front], notes[..., note.front :][..., :pages]
    size = pages if note.votes else -(-pages // 4) * 4
    notes = np.pad(notes, ((0, 0),) * (notes.ndim - 1) + ((0, size - notes.shape[-1]),))
    if note.votes:
        return np.concatenate([front, notes], axis=-1).astype("<u2").view(np.uint8)
    four = notes.reshape(*notes.shape[:-1], -1, 4)
    return np.concatenate([front, four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6], axis=-1)


def unpack(packed: UInt8[np.ndarray, "*n B"], note: RequestNote) -> UInt[np.ndarray, "*n P"]:
    """The inverse of `pack`, with up to three pages more at the end."""
    if note.votes:
        return np.ascontiguousarray(packed).view("<u2").astype(np.uint16)
    front, packed = packed[..., : note.front], packed[..., note.front :]
    pages = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(*packed.shape[:-1], -1)
    return np.concatenate([front, pages], axis=-1)


class Blank:
    """What states that hold stored tokens are made of beside those: the shapes of all their arrays."""

    def __init__(self, backend: AttentionBackend, form: StateFormat, capacity: int):
        self.form = form
        self.shapes = jax.eval_shape(lambda: backend.init_state(capacity, form.kv_heads, form.head_dim, jnp.dtype(form.dtype)))

    @property
    def on_host(self) -> bool:
        """Whether pages live in host memory."""
        return isinstance(history_of(self.shapes), HostHistory)

    def window(self, length: int, pages: Float[np.ndarray, "K P 2 g H"]) -> Array | None:
        """The windows of a history in host memory, from all its pages; None for the others, which have them among their pages."""
        if not self.on_host:
            return None
        places = np.asarray(_places(jnp.int32(length), config=self.form.hga))
        return jnp.array(pages[:, np.clip(places, 0, pages.shape[1] - 1)])

    def state(
        self, length: int, pages: Float[Array, "K P 2 g H"], window: Array | None, summaries: list[np.ndarray], notes: np.ndarray | None
    ) -> Any:
        """A layer's state that holds `length` tokens. For the last two see `with_memory`."""
        held = {"pages": pages, "length": jnp.int32(length)} | ({"window": window} if self.on_host else {})
        history = replace(history_of(self.shapes), **held)
        if not isinstance(self.shapes, LayerState):
            return history
        leaves, tree = jax.tree.flatten(self.shapes.summaries)
        filled = [jnp.array(data, leaf.dtype) for data, leaf in zip(summaries, leaves, strict=True)]
        if self.on_host:
            filled = [put_on_host(part) for part in filled]
        marks = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes.marks)
        filled = jax.tree.unflatten(tree, filled)
        return replace(self.shapes, history=history, summaries=filled, marks=marks, **_noted(self.form, self.shapes, length, notes))


@partial(jax.jit, static_argnames="config")
def _places(length: Int[Array, ""], *, config: HGAConfig) -> Int[Array, " W"]:
    return window_places(length, config).pages


def with_memory(form: StateFormat, state: Any, length: int, summaries: list[np.ndarray], notes: UInt[np.ndarray, "K P"] | None) -> Any:
    """The state with these summaries, the requests that matter to queries from token `length` on, and energies."""
    leaves, tree = jax.tree.flatten(state.summaries)
    filled = jax.tree.unflatten(tree, [jnp.array(data, leaf.dtype) for data, leaf in zip(summaries, leaves, strict=True)])
    return replace(state, summaries=filled, **_noted(form, state, length, notes))


def _noted(form: StateFormat, state: LayerState, length: int, notes: np.ndarray | None) -> dict[str, Array | None]:
    """What notes say of a state of these shapes."""
    stamps = None if state.stamps is None else jnp.array(form.note.stamps(notes, state.stamps.shape, length), jnp.int32)
    return {"stamps": stamps, "energy": None if state.energy is None else jnp.array(form.note.energy(notes, state.energy.shape))}
