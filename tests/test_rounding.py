"""What a bfloat16 run keeps in float32: attention scores and the weights that experts are mixed by. Expectations from float64 numpy."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.backend import DenseAttention
from hga_jax.config import ModelConfig
from hga_jax.model import Decoder, MoE, Parameters, RMSNorm
from hga_jax.moe import expert_mlp


def test_dense_attention_does_not_round_the_scaled_query():
    """Scores of order 32, so that a query rounded once more shows: 6e-3 of the output, where probabilities and result cost 1e-3."""
    tokens, heads, kv_heads, width = 70, 4, 2, 32
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (tokens, n, width), jnp.bfloat16) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True))
    q = q * 32
    backend = DenseAttention(query_block=16, key_block=32)
    state = backend.init_state(96, kv_heads, width, jnp.bfloat16)
    prefill = jax.jit(backend.prefill)
    count = jnp.int32(35)
    _, state, _ = prefill(q[:35], k[:35], v[:35], state, count)
    out, state, _ = prefill(q[35:], k[35:], v[35:], state, count - 1)  # a later call: cuDNN, where there is one, took the first
    last, _, _ = backend.decode(q[69], k[69], v[69], state)

    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q[35:], k, v))
    wide_k, wide_v = (x.repeat(heads // kv_heads, axis=1) for x in (wide_k, wide_v))
    scores = np.einsum("tnh,snh->nts", wide_q, wide_k) / np.sqrt(width)
    scores[:, np.arange(tokens) > np.arange(35, tokens)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), wide_v)
    found = np.concatenate([np.asarray(out[:34], np.float64), np.asarray(last, np.float64)[None]])
    assert np.linalg.norm(found - expected) < 3e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("tokens", [1, 40])
def test_small_additions_of_many_layers_add_up(tokens):
    """48 layers, each of which adds a thousandth: a sum rounded to bfloat16 after every layer would stay what it was."""
    raw = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 64, "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    decoder, backend = Decoder(ModelConfig.from_hf(raw), jnp.bfloat16), DenseAttention()
    for layer in decoder.layers:
        layer.attention.o.weight.set_value(jnp.zeros_like(layer.attention.o.weight.get_value()))
        layer.mlp.down.weight.set_value(layer.mlp.down.weight.get_value() / 2048)
    x = start = decoder.embed(jnp.arange(tokens))
    added = np.zeros(start.shape)
    run = jax.jit(lambda layer, x, state: layer.prefill(x, jnp.int32(0), jnp.int32(tokens), state, backend)[0])
    for layer in decoder.layers:
        state = backend.init_state(64, 1, 32, jnp.bfloat16)
        layer_adds = run(layer, start, state) - start  # of an input that hardly changes
        x, added = run(layer, x, state), added + np.asarray(layer_adds, np.float64)
    moved = np.asarray(x, np.float64) - np.asarray(start, np.float64)
    assert np.abs(added).mean() < 0.05 * np.abs(np.asarray(start)).mean()
    assert np.linalg.norm(moved - added) < 0.1 * np.linalg.norm(added)


@pytest.mark.parametrize("tokens", [4, 40])
def test_what_experts_count_is_not_rounded(tokens):
    """Experts that are all the same give, mixed, what one gives, whatever the router says, if their weights still add up to one."""
    width = 256
    config = ModelConfig.from_hf(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": width, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64, "vocab_size": 64,
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        }
    )  # fmt: skip
    make = Parameters(config, jnp.bfloat16, 0)
    moe, norm = MoE(make, "model.layers.0.mlp"), RMSNorm(make, width)
    for weight in (moe.gate, moe.up, moe.down):
        weight.set_value(jnp.broadcast_to(weight.get_value()[:1], weight.shape))
    x = jax.random.normal(jax.random.key(1), (tokens, width), jnp.bfloat16) / 128  # small beside the mix: it costs the sum no digits
    mixed = moe(x, norm) - x
    moe.config = replace(config, experts_per_token=1)  # renormalised, its weight is 1
    one = moe(x, norm) - x
    mixed, one = np.asarray(mixed, np.float64), np.asarray(one, np.float64)
    ratio = (mixed * one).sum(-1) / (one * one).sum(-1)
    assert np.abs(ratio - 1).max() < 3e-4  # of a weight rounded to bfloat16 up to 2e-3 is missing


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_hold_what_float16_does_not(tokens):
    """Gate and up of 300 each: their product is beyond float16 and saturates, in plain XLA as in a dense MLP."""
    x = jnp.full((tokens, 64), 300 / 64, jnp.float16)
    ones, down = jnp.ones((2, 32, 64), jnp.float16), jnp.full((2, 64, 32), 1 / 64, jnp.float16)
    ids, weights = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1))
    out = np.asarray(expert_mlp(x, ids, weights, ones, ones, down, implementation="xla"), np.float64)
    np.testing.assert_allclose(out, 65504 / 2, rtol=1e-3)  # 32 times the largest number / 64; without, infinity
