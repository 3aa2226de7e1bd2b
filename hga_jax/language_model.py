"""A checkpoint ready to use: logits for evaluation loops, generate for text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from hga_jax import programs
from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend, DenseAttention, Stats
from hga_jax.cache.host import is_host
from hga_jax.cache.tiers import on_disk
from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.generation import GenerateResult, Generation
from hga_jax.model import Decoder, weight_leaves
from hga_jax.placement import EXPERTS
from hga_jax.plan import place_history
from hga_jax.quantized import bounded_dtype
from hga_jax.rope import resolve_rope
from hga_jax.sampling import Sampling
from hga_jax.text.chat import render_chat
from hga_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hga_jax.session import Session


@jax.tree_util.register_pytree_node_class
class LanguageModel:
    """A decoder with its config and tokenizer. Made by `load_model`, or from your own parts for research.

    A pytree whose leaves are the weights: pass it to your jitted functions as an argument, so that weights are no constants of the program.

    >>> loss = jax.jit(lambda model, tokens: model.logits(tokens).mean())
    """

    def __init__(self, decoder: Decoder, config: ModelConfig, tokenizer: Tokenizer | None = None, name: str = "custom"):
        self._decoder, self.config, self.tokenizer, self.name = decoder, config, tokenizer, name

    def tree_flatten(self) -> tuple[tuple[Decoder], tuple[Any, ...]]:
        return (self._decoder,), (self.config, self.tokenizer, self.name)

    @classmethod
    def tree_unflatten(cls, settings: tuple[Any, ...], leaves: tuple[Decoder]) -> LanguageModel:
        return cls(leaves[0], *settings)

    @property
    def params(self) -> Decoder:
        """The NNX module tree; a pytree, so jax.jit, jax.grad and jax.tree.map take it as it is."""
        return self._decoder

    @property
    def dtype(self) -> Any:
        return self._decoder.embedding.get_value().dtype

    @property
    def kv_dtype(self) -> Any:
        """Of keys and values: FP8 checkpoints have float16 ones where the model is bfloat16."""
        return bounded_dtype(self.config, self.dtype)

    @property
    def host_experts(self) -> int:
        """In how many layers the experts lie in pinned host memory (see hga_jax.placement)."""
        experts = [leaf for path, leaf in weight_leaves(self._decoder).items() if EXPERTS.fullmatch(path) and path.endswith("gate")]
        return sum(is_host(jax.tree.leaves(leaf)[0]) for leaf in experts)

    def with_rope(self, rope: RopeConfig) -> LanguageModel:
        """The same weights under other rotary settings."""
        config = self.config.with_rope(rope)
        decoder = Decoder.abstract(config, self.dtype)
        nnx.update(decoder, nnx.state(self._decoder))
        return LanguageModel(decoder, config, self.tokenizer, self.name)

    def backend(self, attention: str | AttentionBackend = "hga", hga: HGAConfig | None = None) -> AttentionBackend:
        """The backend that a name stands for: "hga" (settings from `hga`, default HGAConfig()) or "dense"; a backend is passed through."""
        return make_backend(attention, self.config, hga)

    def hidden(self, tokens: Int[Array | np.ndarray, " T"], attention: str | AttentionBackend = "hga") -> tuple[Float[Array, "T D"], Stats]:
        """Activations after the last layer (before the final norm) of one sequence, layer by layer; usable under jit."""
        backend, length = self.backend(attention), tokens.shape[0]
        whole = -(-length // 64) * 64
        segment = min(programs.segment_of(whole), whole)
        size = -(-length // segment) * segment
        x = self._decoder.embed(jnp.pad(jnp.asarray(tokens), (0, size - length)))
        states = programs.new_states(self._decoder, backend, size, self.kv_dtype)
        first, count, stats = jnp.int32(0), jnp.int32(length), Stats.zero()
        for layer, state in zip(self._decoder.layers, states, strict=True):
            x, _, stats = programs.prefill_layer(layer, x, first, count, state, stats, backend=backend, segment=segment)
        return x[:length], stats

    def logits(self, tokens: Int[Array | np.ndarray, "B T"], *, attention: str | AttentionBackend = "hga") -> Float[Array, "B T V"]:
        """Teacher-forced logits, float32. attention: "hga", "dense" or a backend. May be called inside your own jax.jit.

        Memory is that of one sequence plus the result: for long texts keep B*T*V small, or score pieces with `nll`.
        """

        def one(row: Array) -> Array:
            return self._decoder.head(self.hidden(row, attention)[0])

        tokens = jnp.asarray(tokens)
        if tokens.shape[0] == 1 or not isinstance(tokens, jax.core.Tracer):
            return jnp.stack([one(row) for row in tokens])
        return jax.lax.map(one, tokens)

    def nll(self, tokens: Int[Array | np.ndarray, " T"], *, attention: str | AttentionBackend = "hga") -> tuple[np.ndarray, Stats]:
        """Negative log-likelihood (nats, float32 [T-1]) of each next token of one sequence, and what attention did."""
        tokens = jnp.asarray(tokens)
        x, stats = self.hidden(tokens, attention)
        step = 512  # rows of [step, V] float32 logits at a time
        padded = jnp.pad(tokens[1:], (0, -(len(tokens) - 1) % step))
        rows = jnp.pad(x[:-1], ((0, padded.shape[0] - len(tokens) + 1), (0, 0)))
        losses = [_nll(self._decoder, rows[i : i + step], padded[i : i + step]) for i in range(0, len(padded), step)]
        return np.concatenate([np.asarray(part) for part in losses])[: len(tokens) - 1], stats

    def generate(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        ctx: int | None = None,
        attention: str | AttentionBackend = "hga",
        hga: HGAConfig | None = None,
        kv_store: str = "auto",
        host_memory: float | None = None,
        rope_scaling: str = "auto",
        chat: bool | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_prefill: Callable[[float, int], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> GenerateResult:
        """Prefill the prompt, then draw up to max_new_tokens tokens; stops at the model's end token, a stop string, or when ctx is full.

        prompt: text (wrapped in the checkpoint's chat template unless chat=False or it has none) or token ids (taken as they are).
        ctx: tokens there is room for, prompt and answer (default: just enough). rope_scaling: "auto" (YaRN with the factor needed, only
        when prompt + max_new_tokens exceed the native context), "none", or "yarn:F". kv_store: "auto", "device", "host", or a directory:
        then the history lies there, and host_memory (GiB, default a quarter of what is free) bounds the memory for pages read from it.
        on_text gets final pieces of text as they come, on_prefill (tokens done, of how many), on_notice one line when something noteworthy
        was decided.
        Raises ValueError with one line that says what to do.
        """
        sampling = Sampling.checked(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens=} must be at least 1")
        ids = self.encode_prompt(prompt, chat)
        wanted = len(ids) + max_new_tokens
        ctx = wanted if ctx is None else ctx
        if len(ids) >= ctx:
            raise ValueError(f"the prompt has {len(ids)} tokens and {ctx=} leaves no room for an answer: raise --ctx or shorten the prompt")
        rope, scaling_note = resolve_rope(self.config, min(wanted, ctx), rope_scaling)
        if rope != self.config.rope:
            if on_notice is not None:
                on_notice(scaling_note)
            return self.with_rope(rope).generate(
                ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, ctx=ctx,
                attention=attention, hga=hga, kv_store=kv_store, host_memory=host_memory, rope_scaling="as-is:" + scaling_note, stop=stop,
                on_text=on_text, on_prefill=on_prefill, on_notice=on_notice,
            )  # fmt: skip
        backend = make_backend(attention, self.config, hga)
        if on_disk(kv_store):
            return self._generate_on_disk(
                ids, Path(kv_store), scaling_note, {"ctx": ctx, "attention": attention, "hga": hga, "host_memory": host_memory},
                {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop,
                 "on_text": on_text, "on_prefill": on_prefill},
                on_notice,
            )  # fmt: skip
        backend, plan = place_history(self.config, backend, ctx, self.dtype, kv_store, host_experts=self.host_experts)
        plan.check()
        generation = Generation(self, backend, ids, ctx, sampling, seed, stop, **plan.portions)
        return generation.run(max_new_tokens, plan.tier, scaling_note, on_text, on_prefill)

    def _generate_on_disk(
        self,
        ids: np.ndarray,
        directory: Path,
        scaling_note: str,
        where: dict[str, Any],
        how: dict[str, Any],
        on_notice: Callable[[str], None] | None,
    ) -> GenerateResult:
        """A run whose history lies below a directory and is removed when it ends: a session without a future."""
        from hga_jax.session.folder import delete, passing_name

        path = directory / passing_name()
        try:
            with self.session(path, kv_store=str(directory), rope_scaling="as-is:" + scaling_note, on_notice=on_notice, **where) as session:
                return session.generate(ids, chat=False, **how)
        finally:
            if path.exists():
                delete(path)

    def session(
        self,
        path: str | Path,
        *,
        ctx: int | None = None,
        attention: str | AttentionBackend = "hga",
        hga: HGAConfig | None = None,
        rope_scaling: str = "auto",
        kv_store: str = "auto",
        host_memory: float | None = None,
        on_damage: str = "recompute",
        on_notice: Callable[[str], None] | None = None,
    ) -> Session:
        """Begin or go on with the conversation stored in the folder `path`; its parent is the store whose sessions share equal beginnings.

        ctx: tokens there is room for (default: grows as needed). on_damage: "recompute" what is stored after a damaged place, with a
        notice, or "refuse". Other options as in `generate`; settings of `hga` that did not exist when the session was begun are, unless
        changed from their defaults, as things were done then. Raises ValueError when the session belongs to another model or other
        settings, is in use by another process, or (refuse) is damaged.

        >>> with model.session("sessions/report") as session:
        ...     session.generate("Summarise this report: ...").text
        ...     session.generate("And in one sentence?").text
        """
        from hga_jax.session import Session

        return Session(
            self, path, ctx=ctx, attention=attention, hga=hga, rope_scaling=rope_scaling, kv_store=kv_store, host_memory=host_memory,
            on_damage=on_damage, on_notice=on_notice,
        )  # fmt: skip

    def encode_prompt(self, prompt: str | Sequence[int] | np.ndarray, chat: bool | None = None) -> Int[np.ndarray, " T"]:
        """Token ids of a prompt, chat template applied to text when the checkpoint has one and chat is not False. Raises ValueError."""
        if not isinstance(prompt, str):
            ids = np.asarray(prompt, np.int32)
            if ids.ndim != 1 or ids.size == 0:
                raise ValueError(f"token ids must be a non-empty list, got shape {ids.shape}")
            if ids.min() < 0 or ids.max() >= self.config.vocab_size:
                raise ValueError(
                    f"token id {int(ids.min() if ids.min() < 0 else ids.max())} is outside the vocabulary of {self.config.vocab_size}"
                )
            return ids
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids")
        if not prompt.strip():
            raise ValueError("the prompt is empty: give --prompt, --prompt-file or text on standard input")
        if chat is None:
            chat = self.tokenizer.chat_template is not None
        if not chat:
            return self.tokenizer.encode(prompt, add_special=True)
        return self.tokenizer.encode(render_chat(self.tokenizer, [{"role": "user", "content": prompt}]))


def make_backend(attention: str | AttentionBackend, config: ModelConfig, hga: HGAConfig | None = None) -> AttentionBackend:
    """Raises ValueError for an unknown name."""
    if not isinstance(attention, str):
        return attention
    if attention == "dense":
        return DenseAttention()
    if attention == "hga":
        return HGAAttention(hga or HGAConfig(), config.rope)
    raise ValueError(f"{attention=} is not known: choose hga or dense, or pass a backend object")


@jax.jit
def _nll(decoder: Decoder, x: Float[Array, "T D"], targets: Int[Array, " T"]) -> Float[Array, " T"]:
    logits = decoder.head(x)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
