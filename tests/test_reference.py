"""The fast path against the float64 oracle, over shapes the goldens do not have and any split into calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_cases import PAPER, ROPE, SKETCH, check, tensors

from hga_jax.attention import HGAAttention, hga_attention
from hga_jax.config import HGAConfig
from hga_jax.reference import reference_attention
from hga_jax.sketches import built_in_rotation

both = pytest.mark.parametrize("config", [PAPER, SKETCH], ids=["paper", "sketch"])


@both
@pytest.mark.parametrize("tokens", [1, 17])
def test_lengths(tokens, config):
    check(*tensors(tokens), config)


@both
def test_lengths_through_one_program(config):
    """Below a chunk, at its edges, across several: padded to one size, so one program serves all."""
    q, k, v = tensors(97)
    backend = HGAAttention(config, ROPE)
    prefill = jax.jit(backend.prefill)
    for tokens in (2, 15, 16, 32, 33, 48, 64, 96, 97):
        out, _, stats = prefill(q, k, v, backend.init_state(97, 2, 16, jnp.float32), jnp.int32(tokens))
        more = {"rotation": built_in_rotation(16)} if config is SKETCH else {}
        expected = reference_attention(q[:tokens], k[:tokens], v[:tokens], config=config, rope=ROPE, **more)
        np.testing.assert_allclose(out[:tokens], expected.out, atol=2e-5)
        np.testing.assert_allclose(stats.attended, (expected.visible_keys.mean(-1) / np.arange(1, tokens + 1)).sum(), rtol=1e-5)
        assert not np.any(out[tokens:])
    assert prefill._cache_size() == 1


@pytest.mark.parametrize(("ratio", "head_dim"), [(1, 64), (3, 80), (7, 16), (8, 128)])
def test_query_heads_per_kv_head_and_head_dims(ratio, head_dim):
    for config in (PAPER, SKETCH):
        check(*tensors(100, heads=2 * ratio, head_dim=head_dim), config)


@pytest.mark.parametrize(("start", "config"), [(100, PAPER), (159, PAPER), (112, SKETCH), (1, SKETCH), (159, SKETCH)])
def test_queries_that_start_late(start, config):
    check(*tensors(160), config, start=start)


def test_bfloat16_stays_close():
    # 8 bits of mantissa in K and V and in the softmax weights: 2^-8 relative, a few of them added up.
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in tensors(150))
    config = HGAConfig(chunk_size=16, group_size=4, sink_chunks=10, policy="paper")  # all of it windows: no selection to flip
    out = hga_attention(q[None], k[None], v[None], config=config, rope=ROPE)
    assert out.dtype == jnp.bfloat16
    expected = reference_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), config=config, rope=ROPE)
    np.testing.assert_allclose(np.asarray(out[0], np.float64), expected.out, atol=0.03)


def test_paper_prefill_in_several_calls_then_decode():
    """Each call is the oracle's call over the history so far, wherever in a chunk it starts; padding rows change nothing."""
    q, k, v = tensors(230)
    backend = HGAAttention(PAPER, ROPE)
    state = backend.init_state(230, 2, 16, jnp.float32)
    prefill, decode = jax.jit(backend.prefill), jax.jit(backend.decode)
    start = 0
    for count in (70, 1, 25, 80, 0, 48):  # in arrays of 80 rows
        part = [np.full((80, *x.shape[1:]), 9.0, np.float32) for x in (q, k, v)]
        for whole, padded in zip((q, k, v), part, strict=True):
            padded[:count] = whole[start : start + count]
        out, state, _ = prefill(*part, state, jnp.int32(count))
        end = start + count
        if count:
            expected = reference_attention(q[start:end], k[:end], v[:end], config=PAPER, rope=ROPE, query_start=start)
            np.testing.assert_allclose(out[:count], expected.out, atol=2e-5)
        assert not np.any(out[count:])
        start = end
    assert prefill._cache_size() == 1  # one program whatever the lengths
    for t in range(start, 230):
        out, state, _ = decode(q[t], k[t], v[t], state)
        expected = reference_attention(q[t : t + 1], k[: t + 1], v[: t + 1], config=PAPER, rope=ROPE, query_start=t)
        np.testing.assert_allclose(out, expected.out[0], atol=2e-5)
