"""hga_attention in the places where other people's models expect another attention: same results at full coverage, clear refusals."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference_cases import SKETCH, tensors

from hga_jax import AttentionCache, FlaxAttention, HGAAttention, RopeConfig, dot_product_attention, hga_attention

EVERYTHING = replace(SKETCH, local_chunks=9)  # windows over all tokens: the answer is that of dense attention


def batch(tokens):
    return tuple(jnp.stack(x) for x in zip(tensors(tokens, seed=0), tensors(tokens, seed=1), strict=True))


def test_drop_in_for_jax_nn():
    q, k, v = batch(50)
    lengths = jnp.array([50, 20])
    run = jax.jit(partial(dot_product_attention, is_causal=True, config=EVERYTHING))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    out = run(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(out[1, :20], expected[1, :20], atol=1e-5)
    assert not np.any(out[1, 20:])


def test_drop_in_without_a_batch_axis():
    """And with keys that no query sees."""
    q, k, v = tensors(40)
    out = jax.jit(partial(dot_product_attention, is_causal=True, config=EVERYTHING))(q[:20], k, v)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q[:20], k, v, is_causal=True), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "is_causal=False: routed attention is causal"),
        ({"is_causal": True, "mask": np.ones((1, 1, 5, 5), bool)}, "mask is given"),
        ({"is_causal": True, "local_window_size": 3}, "local_window_size is given"),
    ],
)
def test_drop_in_refuses_what_has_no_routed_form(change, message):
    q = jnp.ones((1, 5, 2, 8))
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, q, q, **change)


def test_flax_multi_head_attention():
    """The same module with Flax's own attention and with ours, prompt at once and token by token through the module's cache."""
    dense_fn = partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    make = partial(nnx.MultiHeadAttention, 4, 32, num_kv_heads=2, decode=False)
    dense, ours = (make(attention_fn=fn, rngs=nnx.Rngs(0)) for fn in (dense_fn, FlaxAttention(EVERYTHING, RopeConfig())))
    x = jax.random.normal(jax.random.key(0), (2, 40, 32))
    expected = dense(x, is_causal=True)
    run = jax.jit(lambda module, x: module(x, is_causal=True))
    np.testing.assert_allclose(run(ours, x), expected, atol=1e-5)

    ours.init_cache((2, 40, 32))
    graph, state = nnx.split(ours)

    @jax.jit
    def step(state, token):
        module = nnx.merge(graph, state)
        out = module(token[:, None], is_causal=True, decode=True)
        return nnx.state(module), out[:, 0]

    outs = []
    for t in range(3):
        state, out = step(state, x[:, t])
        outs.append(out)
    np.testing.assert_allclose(jnp.stack(outs, 1), expected[:, :3], atol=1e-5)


def test_flax_attention_refuses_what_has_no_routed_form():
    module = nnx.MultiHeadAttention(2, 8, dropout_rate=0.1, attention_fn=FlaxAttention(EVERYTHING), decode=False, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 8))
    with pytest.raises(ValueError, match="is_causal=False"):
        module(x, deterministic=True)
    with pytest.raises(ValueError, match="bias or mask is given"):
        module(x, mask=nnx.make_causal_mask(x[..., 0]), deterministic=True)
    with pytest.raises(ValueError, match="no dropout"):
        module(x, is_causal=True, deterministic=False)
    with pytest.raises(ValueError, match="no array of attention weights"):
        module(x, is_causal=True, deterministic=True, sow_weights=True)


def test_cache_in_a_decode_loop():
    """A ragged prompt, then tokens in a scan: what one call over each whole sequence gives."""
    q, k, v = batch(60)
    prompts = jnp.array([57, 40])
    cache = AttentionCache.create(HGAAttention(SKETCH), batch=2, capacity=64, kv_heads=2, head_dim=16, dtype=jnp.float32)

    @jax.jit
    def run(q, k, v, cache):
        out, cache = cache.attend(q, k, v, prompts)

        def step(cache, _):
            rows = [tuple(x[b, cache.lengths[b]] for x in (q, k, v)) for b in range(2)]
            token, cache = cache.attend(*(jnp.stack(x)[:, None] for x in zip(*rows, strict=True)))
            return cache, token[:, 0]

        cache, tokens = jax.lax.scan(step, cache, length=3)
        return out, tokens, cache.lengths

    out, tokens, lengths = run(q, k, v, cache)
    expected = jax.jit(partial(hga_attention, config=SKETCH))(q, k, v)
    assert lengths.tolist() == [60, 43]
    for b, prompt in enumerate(prompts.tolist()):
        np.testing.assert_allclose(out[b, :prompt], expected[b, :prompt], atol=1e-5)
        np.testing.assert_allclose(tokens[:, b], expected[b, prompt : prompt + 3], atol=1e-5)
        assert not np.any(out[b, prompt:])


def test_cache_refuses_arrays_that_do_not_fit():
    cache = AttentionCache.create(HGAAttention(SKETCH), batch=1, capacity=16, kv_heads=1, head_dim=8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="query holds 2 sequences and the cache 1"):
        cache.attend(*(jnp.ones((2, 1, 1, 8)),) * 3)
    with pytest.raises(ValueError, match="must be of the same tokens"):
        cache.attend(jnp.ones((1, 2, 1, 8)), *(jnp.ones((1, 3, 1, 8)),) * 2)
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        AttentionCache.create(HGAAttention(SKETCH), batch=1, capacity=0, kv_heads=1, head_dim=8, dtype=jnp.float32)
