"""Teacher-forced losses of one text under one attention backend, and what two of them differ by."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax import programs
from hga_jax.backend import AttentionBackend, Stats
from hga_jax.language_model import LanguageModel
from hga_jax.model import Decoder

HEAD_ROWS = 256  # rows of [rows, V] float32 logits at a time
SE_BLOCK = 64  # tokens in a block of the paired standard error: neighbouring losses are correlated, blocks of a chunk hardly


@dataclass(frozen=True)
class Scored:
    """nats[i]: negative log-likelihood of token i + 1 given tokens 0..i. seconds: prefill and scoring, compilation not counted."""

    nats: Float[np.ndarray, " losses"]
    stats: Stats
    seconds: float
    compile_seconds: float


def score(
    model: LanguageModel, tokens: Int[np.ndarray, " T"], backend: AttentionBackend, on_tokens: Callable[[int | float], None] | None = None
) -> Scored:
    """Losses of one text, through the very prefill that generation uses. `on_tokens` hears how many tokens' worth of work is done."""
    decoder, length = model.params, len(tokens)
    begin = time.perf_counter()
    _compile(model, length, backend)
    compiled = time.perf_counter()
    targets = np.append(tokens[1:], 0).astype(np.int32)
    states = programs.new_states(decoder, backend, length, model.kv_dtype)
    parts, stats, done = [], Stats.zero(), 0
    for block in programs.prefill_blocks(decoder, tokens, states, backend, on_layer=on_tokens):
        wanted = jnp.asarray(np.pad(targets[done : done + block.count], (0, block.x.shape[0] - block.count)))
        parts.append(np.asarray(_losses(decoder, block.x, wanted, jnp.int32(block.count)))[: block.count])
        stats, done = stats + block.stats, done + block.count
    nats = np.concatenate(parts)[: length - 1]
    return Scored(nats, jax.device_get(stats), time.perf_counter() - compiled, compiled - begin)


def _compile(model: LanguageModel, length: int, backend: AttentionBackend) -> None:
    """Run each program that `score` needs on zero tokens, so that its seconds are those of the work."""
    decoder, config = model.params, model.config
    kinds = {config.is_moe_layer(index): layer for index, layer in enumerate(decoder.layers)}
    zero = jnp.int32(0)
    for size, segment in programs.layer_programs(length):
        x = decoder.embed(jnp.zeros(size, jnp.int32))
        _losses(decoder, x, jnp.zeros(size, jnp.int32), zero).block_until_ready()
        for layer in kinds.values():
            state = backend.init_state(length, config.kv_heads, config.head_dim, model.kv_dtype)
            x, _, _ = programs.prefill_layer(layer, x, zero, zero, state, Stats.zero(), backend=backend, segment=segment)
        x.block_until_ready()


@jax.jit
def _losses(decoder: Decoder, x: Float[Array, "S D"], targets: Int[Array, " S"], count: Int[Array, ""]) -> Float[Array, " S"]:
    """Loss of each row's target; rows from `count` on are not computed."""

    def step(i: Array, nats: Array) -> Array:
        logits = decoder.head(lax.dynamic_slice_in_dim(x, i * HEAD_ROWS, HEAD_ROWS))
        wanted = lax.dynamic_slice_in_dim(targets, i * HEAD_ROWS, HEAD_ROWS)
        loss = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return lax.dynamic_update_slice_in_dim(nats, loss, i * HEAD_ROWS, 0)

    return lax.fori_loop(0, -(-count // HEAD_ROWS), step, jnp.zeros(x.shape[0], jnp.float32))


def paired_gap(differences: list[Float[np.ndarray, " _"]]) -> tuple[float, float | None]:
    """Mean of per-token loss differences and its standard error.

    The standard error is that of the means of blocks of 64 neighbouring tokens (a text's last, shorter block joins the one before it),
    weighted by their tokens; None with fewer than two blocks.
    """
    blocks = [part for text in differences for part in np.split(text, np.arange(SE_BLOCK, max(len(text) - SE_BLOCK + 1, 1), SE_BLOCK))]
    sizes = np.array([len(part) for part in blocks], np.float64)
    means = np.array([part.mean(dtype=np.float64) for part in blocks])
    mean, count = float(np.average(means, weights=sizes)), len(blocks)
    if count < 2:
        return mean, None
    return mean, float(np.sqrt(np.sum((sizes / sizes.sum() * (means - mean)) ** 2) * count / (count - 1)))


def position_bins(skip: int, length: int, bins: int) -> list[tuple[int, int]]:
    """`bins` equal stretches (first, end) of the positions scored, skip + 1 .. length - 1."""
    edges = np.linspace(skip + 1, length, bins + 1).round().astype(int)
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges) if b > a]
