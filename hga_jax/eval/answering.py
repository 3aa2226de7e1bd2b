"""Answers to prompts that share a long beginning: the beginning is read once, each prompt's own end and its answer follow on copies.

A prompt by itself is read in one go. Programs depend on the capacity and on a few sizes, so that all prompts of a length share them;
`make_readers` compiles those of all lengths and attentions beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax import programs
from hga_jax.backend import AttentionBackend, Stats
from hga_jax.eval.choices import Choice
from hga_jax.eval.haystack import Prompt
from hga_jax.eval.reporting import side_by_side
from hga_jax.language_model import LanguageModel
from hga_jax.model import Decoder
from hga_jax.sampling import Sampling
from pallas_kernels.dispatch import on_cuda

ROOM = 128  # new tokens that the one compiled decode program has room for
CHUNK = 64


def shared_length(prompts: Sequence[Int[np.ndarray, " _"]], chunk: int = CHUNK) -> int:
    """Tokens that all prompts begin with, in whole chunks, at least one token of each left over.

    At a chunk's boundary any policy gives the same result in one prefill call or two.
    """
    shortest = min(len(prompt) for prompt in prompts) - 1
    same = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    return (shortest if same.all() else int(same.argmin())) // chunk * chunk


class Reader:
    """One attention backend reading prompts of one evaluation; the compiled programs depend on `capacity` alone."""

    def __init__(self, model: LanguageModel, backend: AttentionBackend, capacity: int):
        self.model, self.backend = model, backend
        self.capacity = -(-capacity // programs.SEGMENT) * programs.SEGMENT
        self.stop_ids = sorted({*model.config.eos_token_ids, *(model.tokenizer.eos_ids if model.tokenizer else ())})
        self._empty = jax.jit(lambda: programs.new_states(model.params, backend, self.capacity, model.kv_dtype))

    def generated(
        self, prompts: Sequence[Prompt], max_new_tokens: int, on_tokens: Callable[[int | float], None] | None = None
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, its end token left out."""
        if not 1 <= max_new_tokens <= ROOM:
            raise ValueError(f"{max_new_tokens=} must lie between 1 and {ROOM}")
        made = []
        for tokens, block in self._read([prompt.tokens for prompt in prompts], self._shared(prompts), on_tokens):
            logits = programs.row_logits(self.model.params, block.x, jnp.int32(block.count - 1))
            first = programs.first_token(logits, Sampling(), jax.random.key(0), jnp.int32(len(tokens) - 1))
            decoding = self._decoding(first, len(tokens), block.states, max_new_tokens - 1)
            out, count, _, _ = programs.decode_tokens(*decoding, backend=self.backend, room=ROOM)
            answer = [int(first), *np.asarray(out)[: int(count)].tolist()]
            ends = [i for i, token in enumerate(answer) if token in self.stop_ids]
            made.append(answer[: ends[0]] if ends else answer)
        return made

    def predicted(self, prompts: Sequence[Prompt], on_tokens: Callable[[int | float], None] | None = None) -> list[bool]:
        """Whether each token of each prompt's written-out answer is the most likely one when the answer is fed (teacher forcing)."""
        right = []
        for prompt, (tokens, block) in zip(prompts, self._read(_written_out(prompts), self._shared(prompts), on_tokens), strict=True):
            count = len(prompt.answer_tokens)
            begin = block.count - len(tokens) + len(prompt.tokens) - 1
            rows = np.minimum(begin + np.arange(-(-count // CHUNK) * CHUNK), block.count - 1)
            best = np.asarray(_most_likely(self.model.params, block.x, jnp.asarray(rows)))
            right.append(bool(np.array_equal(best[:count], prompt.answer_tokens)))
        return right

    def compilations(self, texts: Iterable[Sequence[Prompt]], teacher: bool) -> list[Callable[[], Any]]:
        """Calls that compile the large programs for reading these lists of prompts, and run nothing. teacher: for `predicted`."""
        decoder, config = self.model.params, self.model.config
        x, zero = decoder.embed(jnp.zeros(1, jnp.int32)), jnp.int32(0)
        like = partial(_abstract, sharding=x.sharding if x.committed else None)
        states, stats = like(jax.eval_shape(self._empty)), like(Stats.zero())
        kinds = {config.is_moe_layer(i): pair for i, pair in enumerate(zip(decoder.layers, states, strict=True))}
        sizes: set[tuple[int, int]] = set()
        for prompts in texts:
            shared = self._shared(prompts)
            sizes |= programs.layer_programs(shared)
            for tokens in _written_out(prompts) if teacher else [prompt.tokens for prompt in prompts]:
                sizes |= programs.layer_programs(len(tokens) - shared, _segment_after(shared))
        work = [
            partial(_compile, programs.prefill_layer, layer, like(jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)), zero, zero, state,
                    stats, backend=self.backend, segment=segment)
            for rows, segment in sorted(sizes) for layer, state in kinds.values()
        ]  # fmt: skip
        if not teacher:
            decoding = self._decoding(like(zero), 0, states, 0)
            work.append(partial(_compile, programs.decode_program(on_cuda()), *decoding, backend=self.backend, room=ROOM))
        return work

    def _decoding(self, first: Any, position: int, states: tuple[Any, ...], wanted: int) -> tuple[Any, ...]:
        """Arguments of `decode_tokens`: greedy, from a first token at `position`."""
        stop_ids = jnp.asarray(self.stop_ids or [-1], jnp.int32)
        return self.model.params, first, jnp.int32(position), states, jnp.int32(wanted), stop_ids, Sampling(), jax.random.key(0)

    def _shared(self, prompts: Sequence[Prompt]) -> int:
        """Tokens to be read once for all the prompts: none where there is only one prompt."""
        chunk = math.lcm(CHUNK, getattr(getattr(self.backend, "config", None), "chunk_size", CHUNK))
        return shared_length([prompt.tokens for prompt in prompts], chunk) if len(prompts) > 1 else 0

    def _read(
        self, texts: Sequence[Int[np.ndarray, " _"]], shared: int, on_tokens: Callable[[int | float], None] | None
    ) -> Iterator[tuple[Int[np.ndarray, " _"], programs.SuperBlock]]:
        """Yields each text and what prefill made of its last tokens, beyond the `shared` ones that all texts begin with."""
        decoder, states = self.model.params, self._empty()
        for block in programs.prefill_blocks(decoder, texts[0][:shared], states, self.backend, on_layer=on_tokens):
            states = block.states
        settings = {"first": shared, "segment": _segment_after(shared), "on_layer": None if shared else on_tokens}
        for i, tokens in enumerate(texts):
            here = states if i == len(texts) - 1 else jax.tree.map(jnp.copy, states)
            for block in programs.prefill_blocks(decoder, tokens[shared:], here, self.backend, **settings):
                last = block
            yield tokens, last


def make_readers(
    model: LanguageModel, choices: Sequence[Choice], texts: Mapping[int, Iterable[Sequence[Prompt]]], teacher: bool = False
) -> dict[tuple[int, str], Reader]:
    """A reader by length and name of the choice, its programs compiled. texts: the lists of prompts to be read, by length."""
    readers = {}
    for length in texts:
        for choice in choices:
            backend = model.backend("dense") if choice.hga is None else model.backend("hga", choice.hga)
            readers[length, choice.name] = Reader(model, backend, length)
    work = [call for (length, _), reader in readers.items() for call in reader.compilations(texts[length], teacher)]
    side_by_side("compiling", work)
    return readers


def _written_out(prompts: Sequence[Prompt]) -> list[Int[np.ndarray, " _"]]:
    return [np.concatenate([prompt.tokens, prompt.answer_tokens]) for prompt in prompts]


def _segment_after(shared: int) -> int | None:
    """Segment of what a prompt has beyond the shared tokens: a few hundred tokens, or all of it."""
    return CHUNK if shared else None


def _abstract(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _compile(program: Any, *arguments: Any, **settings: Any) -> None:
    """Compile a jitted function for some arguments; calls with such arguments find the program."""
    program.lower(*arguments, **settings).compile()


@jax.jit
def _most_likely(decoder: Decoder, x: Float[Array, "S D"], rows: Int[Array, " R"]) -> Int[Array, " R"]:
    return jnp.argmax(decoder.head(x[rows]), axis=-1)
