"""`eval mass`: the share of each head's attention that falls on keys a policy did not open. Nats, not mass, judge a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax import programs
from hga_jax.attention import HGAAttention
from hga_jax.backend import Stats
from hga_jax.blocks import summarise_new, window_starts
from hga_jax.cache import DeviceHistory
from hga_jax.eval.choices import Choice
from hga_jax.eval.nll import documents
from hga_jax.eval.reporting import Progress, table
from hga_jax.language_model import LanguageModel
from hga_jax.model import DecoderLayer
from hga_jax.policies import policy_for


@partial(jax.jit, static_argnames="backend")
def layer_mass(
    layer: DecoderLayer, x: Float[Array, "S D"], count: Int[Array, ""], skip: Int[Array, ""], *, backend: HGAAttention
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """(missed, middle) [N], averaged over the queries at positions skip+1 .. count-1 of one layer's input x.

    missed: exact softmax mass of the keys that the policy left closed; middle: of all keys outside the windows, opened or not.
    """
    config = backend.config
    query, key, value = layer.attention.project(x, layer.attention_norm, jnp.arange(x.shape[0]))
    length, heads, width = query.shape
    kv_heads, ratio, block = key.shape[1], heads // key.shape[1], config.chunk_size
    scale = 1 / math.sqrt(width)
    policy = policy_for(config, backend.rope, width, scale)
    size = -(-length // block) * block
    history = replace(DeviceHistory.holding(key, value, config.group_size, size), length=count)
    state = replace(backend.init_state(size, kv_heads, width, key.dtype), history=history)
    state = summarise_new(state, jnp.int32(0), size, config, policy)
    padded = jnp.pad(query, ((0, size - length), (0, 0), (0, 0))).reshape(-1, block, kv_heads, ratio, width).transpose(0, 2, 3, 1, 4)
    keys = jnp.pad(key, ((0, size - length), (0, 0), (0, 0))).astype(jnp.float32)
    page_start = jnp.arange(size // config.group_size) * config.group_size
    rows = jnp.arange(block)

    def one(chunk: Array, carry: tuple) -> tuple:
        missed, middle, stamps = carry
        q, positions = padded[chunk], chunk * block + rows
        scores = jnp.einsum("kgqh,skh->kgqs", q.astype(jnp.float32), keys) * scale
        causal = jnp.arange(size) <= positions[:, None]
        by_page = jnp.where(causal, scores, -jnp.inf).reshape(*scores.shape[:-1], -1, config.group_size)
        by_page = jax.nn.logsumexp(by_page, axis=-1)  # [K, G, Q, P]
        sinks, local = window_starts(chunk, config)
        window = (page_start < sinks) | (page_start >= local)
        windows_total = jax.nn.logsumexp(jnp.where(window, by_page, -jnp.inf), axis=-1)
        live = positions < count
        requests = policy.request(q[:, None], live[None], positions[None], state.summaries, windows_total[:, None])
        granted = policy.grant(requests, jnp.int32(0), chunk, stamps)
        since = _first_rows(granted.selection.pages, granted.selection.since, len(page_start), block)  # [K, R, P]
        opened = since[:, :, None, :] <= rows[:, None]
        share = jnp.exp(by_page - jax.nn.logsumexp(by_page, axis=-1, keepdims=True)) * ~window
        counted = (live & (positions > skip))[:, None]
        middle = middle + jnp.sum(share * counted, axis=(2, 3))
        return missed + jnp.sum(share * counted * ~opened, axis=(2, 3)), middle, granted.stamps

    zero = jnp.zeros((kv_heads, ratio), jnp.float32)
    missed, middle, _ = lax.fori_loop(0, -(-count // block), one, (zero, zero, state.stamps))
    queries = jnp.maximum(count - 1 - skip, 1)
    return missed.reshape(heads) / queries, middle.reshape(heads) / queries


def _first_rows(pages: Int[Array, "K R n"], since: Int[Array, "K R n"], count: int, never: int) -> Int[Array, "K R P"]:
    """For each page the first row that sees it, `never` when none does."""
    one = lambda ids, rows: jnp.full(count, never, rows.dtype).at[ids].min(rows, mode="drop")  # noqa: E731
    return jax.vmap(jax.vmap(one))(pages, since)


def text_mass(
    model: LanguageModel,
    tokens: Int[np.ndarray, " T"],
    backend: HGAAttention,
    skip: int,
    on_tokens: Callable[[int | float], None] | None = None,
) -> tuple[Float[np.ndarray, "L N"], Float[np.ndarray, "L N"]]:
    """(missed, middle) of every layer and head over one text; the activations are those of the model running under the policy itself."""
    decoder, length = model.params, len(tokens)
    size = programs.padded_size(length, programs.SEGMENT, 1 << 30)
    x = decoder.embed(jnp.asarray(np.pad(tokens, (0, size - length))))
    count, found = jnp.int32(length), []
    for i, layer in enumerate(decoder.layers):
        found.append(jax.device_get(layer_mass(layer, x, count, jnp.int32(skip), backend=backend)))
        state = backend.init_state(size, model.config.kv_heads, model.config.head_dim, model.kv_dtype)
        segment = programs.segment_of(size)
        x, _, _ = programs.prefill_layer(layer, x, jnp.int32(0), count, state, Stats.zero(), backend=backend, segment=segment)
        if on_tokens is not None:
            on_tokens(length * (i + 1) / len(decoder.layers))
    return np.stack([missed for missed, _ in found]), np.stack([middle for _, middle in found])


def evaluate(model: LanguageModel, texts: dict[str, str], length: int, choices: list[Choice], skip: int) -> dict[str, Any]:
    """The report of `eval mass`: per policy, layer and head, averaged over texts."""
    parts, policies = documents(model, texts, length), []
    with Progress(length * len(parts) * len(choices), "mass") as bar:
        for choice in choices:
            backend, found = model.backend("hga", choice.hga), []
            for part in parts:
                bar.note(f"{choice.name}, {part.name}")
                found.append(text_mass(model, part.tokens, backend, skip, partial(bar.within, bar.done)))
                bar.finish(length)
            missed, middle = (np.mean([item[i] for item in found], axis=0) for i in (0, 1))
            policies.append(
                {"policy": choice.name, "settings": choice.settings,
                 "missed_mean": float(missed.mean()), "middle_mean": float(middle.mean()),
                 "missed": missed.tolist(), "middle": middle.tolist()}
            )  # fmt: skip
    return {
        "model": model.name, "length": length, "skip": skip, "dtype": str(np.dtype(model.dtype)),
        "documents": [{"text": part.name, "tokens_sha256": part.digest} for part in parts], "policies": policies,
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """One table a policy, a row a layer."""
    names = ", ".join(part["text"] for part in report["documents"])
    parts = [
        f"{report['model']}, {report['dtype']}, {report['length']:,} tokens of {names}, queries at positions > {report['skip']:,}\n"
        "middle: attention mass outside the windows, of all heads; missed: the part of it on closed pages"
    ]
    for policy in report["policies"]:
        missed, middle = np.array(policy["missed"]), np.array(policy["middle"])
        rows = [
            [i, f"{b.mean():.2%}", f"{a.mean():.2%}", f"{np.median(a):.2%}", f"{a.max():.2%}", int(a.argmax())]
            for i, (a, b) in enumerate(zip(missed, middle, strict=True))
        ]
        rows.append(["all", f"{middle.mean():.2%}", f"{missed.mean():.2%}", f"{np.median(missed):.2%}", f"{missed.max():.2%}", None])
        parts.append(table((f"{policy['policy']}: layer", "middle", "missed", "median head", "worst head", "which"), rows))
    return "\n\n".join(parts)
