"""The compiled programs: one layer over a super-block (prefill), all layers over n tokens (decode). Buffers are donated only here.

Prefill is layer-major: a whole super-block of the prompt runs through layer l before layer l+1, so that one compiled layer serves all
layers, one layer's K/V is at hand while it is needed, and each page moves once. Nothing recompiles when a length changes: lengths are
data, and arrays come in a few sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from hga_jax.backend import AttentionBackend, Stats
from hga_jax.cache.host import is_host
from hga_jax.model import Decoder, DecoderLayer
from hga_jax.sampling import Sampling, sample
from pallas_kernels.dispatch import on_cuda

SUPER_BLOCK = 65536  # tokens that run through a layer before the next layer starts
LAYERS_UNDER_WAY = 2  # layers that prefill dispatches before the first must be done: what each has on the device is planned for
SEGMENT = 1024  # tokens whose projections, attention and MLP are computed at a time: bounds activations
SEGMENT_CUDA = 16384  # where launches are dear: long enough that a layer's few dozen cost nothing beside its work


@dataclass(frozen=True)
class SuperBlock:
    """What prefill made of one super-block: activations after the last layer, of which the first `count` rows are tokens."""

    x: Float[Array, "S D"]
    count: int
    states: tuple[Any, ...]
    stats: Stats


def new_states(decoder: Decoder, backend: AttentionBackend, capacity: int, dtype: Any) -> tuple[Any, ...]:
    """An empty K/V state for each layer. dtype: of keys and values (LanguageModel.kv_dtype)."""
    config = decoder.config
    # One at a time: zeros for host memory are made on the device, and all layers' would not fit there.
    return tuple(jax.block_until_ready(backend.init_state(capacity, config.kv_heads, config.head_dim, dtype)) for _ in range(config.layers))


@partial(jax.jit, static_argnames=("backend", "segment"), donate_argnames=("x", "state"))
def prefill_layer(
    layer: DecoderLayer,
    x: Float[Array, "S D"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    state: Any,
    stats: Stats,
    *,
    backend: AttentionBackend,
    segment: int,
) -> tuple[Float[Array, "S D"], Any, Stats]:
    """Run the first `count` rows of x, tokens at positions first, first+1, ..., through one layer. S is a multiple of `segment`.

    Weights in host memory are copied to the device, once for all segments.
    """
    layer = _on_device(layer)

    def step(i: Array, carry: tuple[Array, Any, Stats]) -> tuple[Array, Any, Stats]:
        return _prefill_segment(layer, i, first, count, carry, backend, segment)

    return lax.fori_loop(0, -(-count // segment), step, (x, state, stats))


@partial(jax.jit, static_argnames=("backend", "segment", "note"), donate_argnames=("x", "state"))
def prefill_noted_layer(
    layer: DecoderLayer,
    x: Float[Array, "S D"],
    first: Int[Array, ""],
    count: Int[Array, ""],
    state: Any,
    stats: Stats,
    *,
    backend: AttentionBackend,
    segment: int,
    note: Callable[[Any], Array],
) -> tuple[Float[Array, "S D"], Any, Stats, Array]:
    """`prefill_layer`, and what `note` says of the state after each segment, stacked: [S / segment, ...]."""
    layer, shape = _on_device(layer), jax.eval_shape(note, state)

    def step(i: Array, carry: tuple[tuple[Array, Any, Stats], Array]) -> tuple[tuple[Array, Any, Stats], Array]:
        done = _prefill_segment(layer, i, first, count, carry[0], backend, segment)
        return done, carry[1].at[i].set(note(done[1]))

    start = ((x, state, stats), jnp.zeros((x.shape[0] // segment, *shape.shape), shape.dtype))
    done, noted = lax.fori_loop(0, -(-count // segment), step, start)
    return *done, noted


def _on_device(layer: DecoderLayer) -> DecoderLayer:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_host(x) else x, layer)


def _prefill_segment(
    layer: DecoderLayer, i: Array, first: Array, count: Array, carry: tuple[Array, Any, Stats], backend: AttentionBackend, segment: int
) -> tuple[Array, Any, Stats]:
    x, state, stats = carry
    begin = i * segment
    rows = lax.dynamic_slice_in_dim(x, begin, segment)
    out, state, more = layer.prefill(rows, first + begin, jnp.minimum(count - begin, segment), state, backend)
    return lax.dynamic_update_slice_in_dim(x, out, begin, 0), state, stats + more


@jax.jit
def _embed(decoder: Decoder, tokens: Int[Array, " S"]) -> Float[Array, "S D"]:
    return decoder.embed(tokens)


@jax.jit
def row_logits(decoder: Decoder, x: Float[Array, "S D"], row: Int[Array, ""]) -> Float[Array, " V"]:
    """Float32 logits after one row."""
    return decoder.head(lax.dynamic_index_in_dim(x, row, keepdims=False))


def padded_size(tokens: int, segment: int, limit: int) -> int:
    """The few array sizes that super-blocks come in: `segment` times a power of two, at most `limit`."""
    size = segment
    while size < min(tokens, limit):
        size *= 2
    return size


def segment_of(size: int) -> int:
    """How many tokens of a padded super-block go through a layer at a time."""
    return min(SEGMENT_CUDA, size) if on_cuda() else SEGMENT


def layer_programs(tokens: int, segment: int | None = None) -> set[tuple[int, int]]:
    """(rows, segment) of the programs by which `prefill_blocks` takes so many tokens through a layer."""
    lengths = {min(tokens - begin, SUPER_BLOCK) for begin in range(0, tokens, SUPER_BLOCK)}
    sizes = {padded_size(length, segment or SEGMENT, SUPER_BLOCK) for length in lengths}
    return {(size, segment or segment_of(size)) for size in sizes}


def prefill_blocks(
    decoder: Decoder,
    tokens: Int[np.ndarray, " T"],
    states: tuple[Any, ...],
    backend: AttentionBackend,
    *,
    first: int = 0,
    segment: int | None = None,
    stretches: Sequence[tuple[int, int | None]] = (),
    super_block: int = SUPER_BLOCK,
    on_layer: Callable[[float], None] | None = None,
    note: Callable[[Any], Array] | None = None,
    on_state: Callable[[int, int, int, Any, dict[int, tuple[Array | None, int]]], None] | None = None,
    home: Callable[[int], Any] | None = None,
) -> Iterator[SuperBlock]:
    """Run tokens (positions first, first+1, ...) through all layers, super-block by super-block.

    The states passed in are consumed; those of the last block yielded replace them. A block's activations are gone when the next is asked
    for. segment: tokens that go through a layer at a time (None: as suits the machine). stretches: (position of the end, segment) of
    stretches of tokens with segments of their own, the last one at the end of the tokens; the blocks yielded then hold activations of their
    last stretch only.
    `on_layer` hears, after every layer, how many tokens' worth of work is done. `on_state` hears (layer, first position, tokens, the
    layer's state, by position what `note` said of it there: an array and the index in it), and must copy what it wants to keep: the state's
    buffers live on. `home`: for each layer, what loads and unloads its history instead of the backend, whose methods of those names it has.
    """
    states = backend.before_prefill(states)
    buffer = (backend if home is None else home(0)).prefill_buffer(states[0])
    for begin in range(0, len(tokens), super_block):
        held, end = first + begin, first + min(begin + super_block, len(tokens))
        parts = [
            _Stretch.of(decoder, tokens[start - first : stop - first], start, length or segment, super_block)
            for start, stop, length in _cut(held, end, stretches)
        ]
        (states, stats, buffer), done = committed_like(parts[0].x, (states, Stats.zero(), buffer)), []
        for index, (layer, state) in enumerate(zip(decoder.layers, states, strict=True)):
            keeper = backend if home is None else home(index)
            worked, noted = keeper.load(state, buffer, held), {}
            for part in parts:
                worked, stats, found = part.run(layer, worked, stats, backend, note)
                noted |= found
            if on_state is not None:
                on_state(index, held, end - held, worked, noted)
            state, buffer = keeper.unload(state, worked, held, end, padded_size(end - held, segment or SEGMENT, super_block))
            done.append(state)
            jax.block_until_ready(done[-LAYERS_UNDER_WAY : 1 - LAYERS_UNDER_WAY])
            if on_layer is not None:
                parts[-1].x.block_until_ready()
                on_layer(begin + (end - held) * (index + 1) / len(states))
        states = tuple(done)
        yield SuperBlock(parts[-1].x, parts[-1].count, states, stats)
        if begin + super_block < len(tokens):
            for part in parts:  # whoever holds the block has not let go of it yet, and the next one needs the room
                part.x.delete()


def _cut(first: int, end: int, stretches: Sequence[tuple[int, int | None]]) -> list[tuple[int, int, int | None]]:
    """(first, end, segment) of the parts of stretches between two positions."""
    parts = []
    for stop, segment in stretches or [(end, None)]:
        stop = min(stop, end)
        if stop > first:
            parts.append((first, stop, segment))
            first = stop
    return parts


@dataclass
class _Stretch:
    """Tokens on their way through the layers: activations x, of which the first `count` rows are tokens at positions first, first+1, ..."""

    x: Float[Array, "S D"]
    first: int
    count: int
    segment: int

    @staticmethod
    def of(decoder: Decoder, tokens: Int[np.ndarray, " T"], first: int, segment: int | None, super_block: int) -> _Stretch:
        size = padded_size(len(tokens), segment or SEGMENT, super_block)
        x = _embed(decoder, jnp.asarray(np.pad(np.asarray(tokens, np.int32), (0, size - len(tokens)))))
        return _Stretch(x, first, len(tokens), segment or segment_of(size))

    def run(
        self, layer: DecoderLayer, state: Any, stats: Stats, backend: AttentionBackend, note: Callable[[Any], Array] | None
    ) -> tuple[Any, Stats, dict[int, tuple[Array | None, int]]]:
        """Through one layer. Also says what was noted, by position, at the ends of segments."""
        where, settings, noted = (jnp.int32(self.first), jnp.int32(self.count)), {"backend": backend, "segment": self.segment}, None
        if note is None:
            self.x, state, stats = prefill_layer(layer, self.x, *where, state, stats, **settings)
        else:
            self.x, state, stats, noted = prefill_noted_layer(layer, self.x, *where, state, stats, **settings, note=note)
        ends = range(self.segment, self.count + self.segment, self.segment)
        return state, stats, {self.first + min(done, self.count): (noted, index) for index, done in enumerate(ends)}


def committed_like(x: Array, tree: Any) -> Any:
    """The arrays of `tree` tied to x's device if x is: JAX compiles a program anew for arguments that are tied to a device and were not."""
    if not x.committed or len(x.sharding.device_set) > 1:
        return tree
    return jax.tree.map(lambda leaf: leaf if leaf.committed else jax.device_put(leaf, x.sharding), tree)


def decode_step(
    decoder: Decoder, token: Int[Array, ""], position: Int[Array, ""], states: tuple[Any, ...], backend: AttentionBackend
) -> tuple[Float[Array, " V"], tuple[Any, ...], Stats]:
    """Feed one token: float32 logits after it."""
    x, stats, done = decoder.embed(token[None])[0], Stats.zero(), []
    for layer, state in zip(decoder.layers, states, strict=True):
        x, state, more = _decode_layer(layer, x, position, state, backend=backend)
        stats = stats + more
        done.append(state)
    return decoder.head(x), tuple(done), stats


@partial(jax.jit, static_argnames="backend")  # jitted so that it is traced once, not once a layer
def _decode_layer(layer: DecoderLayer, x: Array, position: Array, state: Any, *, backend: AttentionBackend) -> tuple[Array, Any, Stats]:
    return layer.decode(x, position, state, backend)


def decode_tokens(
    decoder: Decoder,
    token: Int[Array, ""],
    position: Int[Array, ""],
    states: tuple[Any, ...],
    wanted: Int[Array, ""],
    stop_ids: Int[Array, " stops"],
    sampling: Sampling,
    key: Key[Array, ""],
    *,
    backend: AttentionBackend,
    room: int,
) -> tuple[Int[Array, " room"], Int[Array, ""], tuple[Any, ...], Stats]:
    """Feed `token` and draw up to `wanted` <= room new tokens, stopping after one of `stop_ids`. No host round trip in between.

    The loop over tokens is cut where a chunk is full, so that closing it (`AttentionBackend.settle`) needs no branch in every layer.
    Returns the new tokens (the first `made` count), made, states and stats. The last new token has not been fed yet. Draws depend on the
    key and the position alone, so the text does not depend on how many tokens a dispatch makes. The states are consumed.
    """
    return decode_program(on_cuda())(decoder, token, position, states, wanted, stop_ids, sampling, key, backend=backend, room=room)


@cache
def decode_program(cuda: bool) -> Any:
    """The compiled function behind `decode_tokens`."""
    options = concurrent_launches(cuda)
    return jax.jit(_decode_tokens, static_argnames=("backend", "room"), donate_argnames=("states",), compiler_options=options)


def concurrent_launches(cuda: bool) -> dict[str, str] | None:
    """Compiler options under which launches that do not wait for each other run side by side: pages come over PCIe while sketches are
    scanned (measured on an H100: 65 instead of 80 us a layer for one scan beside one fetch of 1,200 tokens a kv head)."""
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if cuda else None


def _decode_tokens(
    decoder: Decoder,
    token: Array,
    position: Array,
    states: tuple[Any, ...],
    wanted: Array,
    stop_ids: Array,
    sampling: Sampling,
    key: Array,
    *,
    backend: AttentionBackend,
    room: int,
) -> tuple[Array, Array, tuple[Any, ...], Stats]:
    def more(carry: tuple) -> Array:
        _, last, made, _, _, _ = carry
        return (made < wanted) & ~((made > 0) & jnp.isin(last, stop_ids))

    def step(carry: tuple) -> tuple:
        out, last, made, _, states, stats = carry
        logits, states, add = decode_step(decoder, last, position + made, states, backend)
        last = sample(logits, sampling, jax.random.fold_in(key, position + made))
        full = jnp.bool(False) if backend.settle_every is None else (position + made + 1) % backend.settle_every == 0
        return out.at[made].set(last), last, made + 1, full, states, stats + add

    def stretch(carry: tuple) -> tuple:
        out, last, made, _, states, stats = carry
        carry = (out, last, made, jnp.bool(False), states, stats)
        out, last, made, full, states, stats = lax.while_loop(lambda carry: more(carry) & ~carry[3], step, carry)
        # Also at the end of a dispatch inside a chunk, where it is not due: under a branch XLA would copy the host's pages, and cannot.
        return out, last, made, full, tuple(_settle(state, position + made, backend=backend) for state in states), stats

    states = tuple(backend.start_decoding(state, position) for state in states)
    start = (jnp.zeros(room, jnp.int32), token, jnp.int32(0), jnp.bool(False), states, Stats.zero())
    out, _, made, _, states, stats = lax.while_loop(more, stretch, start)
    return out, made, tuple(backend.finish_decoding(state, position + made) for state in states), stats


@partial(jax.jit, static_argnames="backend")
def _settle(state: Any, held: Array, *, backend: AttentionBackend) -> Any:
    return backend.settle(state, held)


first_token = jax.jit(lambda logits, sampling, key, position: sample(logits, sampling, jax.random.fold_in(key, position)))
