"""Answers to prompts that share a long beginning: the beginning is read once, each prompt's own end and its answer follow on copies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax import programs
from hga_jax.backend import AttentionBackend
from hga_jax.eval.haystack import Prompt
from hga_jax.language_model import LanguageModel
from hga_jax.model import Decoder
from hga_jax.sampling import Sampling

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
        self.stop_ids = jnp.asarray(sorted({*model.config.eos_token_ids, *(model.tokenizer.eos_ids if model.tokenizer else ())}) or [-1])

    def generated(
        self, prompts: Sequence[Prompt], max_new_tokens: int, on_tokens: Callable[[int | float], None] | None = None
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, its end token left out."""
        if not 1 <= max_new_tokens <= ROOM:
            raise ValueError(f"{max_new_tokens=} must lie between 1 and {ROOM}")
        made = []
        for tokens, block in self._read([prompt.tokens for prompt in prompts], self._shared(prompts), on_tokens):
            logits = programs.row_logits(self.model.params, block.x, jnp.int32(block.count - 1))
            position, greedy, key = len(tokens), Sampling(), jax.random.key(0)
            first = programs.first_token(logits, greedy, key, jnp.int32(position - 1))
            out, count, _, _ = programs.decode_tokens(
                self.model.params, first, jnp.int32(position), block.states, jnp.int32(max_new_tokens - 1), self.stop_ids,
                greedy, key, backend=self.backend, room=ROOM,
            )  # fmt: skip
            answer = [int(first), *np.asarray(out)[: int(count)].tolist()]
            ends = [i for i, token in enumerate(answer) if token in np.asarray(self.stop_ids)]
            made.append(answer[: ends[0]] if ends else answer)
        return made

    def predicted(self, prompts: Sequence[Prompt], on_tokens: Callable[[int | float], None] | None = None) -> list[bool]:
        """Whether each token of each prompt's written-out answer is the most likely one when the answer is fed (teacher forcing)."""
        full = [np.concatenate([prompt.tokens, prompt.answer_tokens]) for prompt in prompts]
        right = []
        for prompt, (tokens, block) in zip(prompts, self._read(full, self._shared(prompts), on_tokens), strict=True):
            best = np.asarray(_most_likely(self.model.params, block.x))
            begin = block.count - len(tokens) + len(prompt.tokens) - 1
            right.append(bool(np.array_equal(best[begin : begin + len(prompt.answer_tokens)], prompt.answer_tokens)))
        return right

    def _shared(self, prompts: Sequence[Prompt]) -> int:
        chunk = math.lcm(CHUNK, getattr(getattr(self.backend, "config", None), "chunk_size", CHUNK))
        return shared_length([prompt.tokens for prompt in prompts], chunk)

    def _read(
        self, texts: Sequence[Int[np.ndarray, " _"]], length: int, on_tokens: Callable[[int | float], None] | None
    ) -> Iterator[tuple[Int[np.ndarray, " _"], programs.SuperBlock]]:
        """Yields each text and what prefill made of its tokens from `length` on; the first `length` tokens are those of all texts."""
        decoder, model = self.model.params, self.model
        states = programs.new_states(decoder, self.backend, self.capacity, model.dtype)
        for block in programs.prefill_blocks(decoder, texts[0][:length], states, self.backend, on_layer=on_tokens):
            states = block.states
        for i, tokens in enumerate(texts):
            here = states if i == len(texts) - 1 else jax.tree.map(jnp.copy, states)
            blocks = programs.prefill_blocks(decoder, tokens[length:], here, self.backend, first=length, segment=CHUNK)
            yield tokens, list(blocks)[-1]


@jax.jit
def _most_likely(decoder: Decoder, x: Float[Array, "S D"]) -> Int[Array, " S"]:
    return jnp.argmax(decoder.head(x), axis=-1)
