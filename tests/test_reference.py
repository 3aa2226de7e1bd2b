"""The fast path against the float64 oracle, over shapes the goldens do not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.attention import HGAAttention, hga_attention
from hga_jax.config import HGAConfig, Llama3Scaling, RopeConfig, YarnScaling
from hga_jax.reference import reference_attention
from hga_jax.rope import rotate

ROPE = RopeConfig(10000.0)
SMALL = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=2, policy="paper", top_chunks=3, top_groups=8)


def tensors(tokens, heads=4, kv_heads=2, head_dim=16, seed=0, rope=ROPE):
    """Rotated queries and keys with some structure, so that selection is not a coin toss."""
    random = np.random.default_rng(seed)
    topics = random.standard_normal((5, head_dim))
    topic = topics[random.integers(0, 5, tokens // 3 + 1).repeat(3)[:tokens]]
    q = random.standard_normal((tokens, heads, head_dim)) + topic[:, None]
    k = random.standard_normal((tokens, kv_heads, head_dim)) + topic[:, None]
    v = random.standard_normal((tokens, kv_heads, head_dim))
    positions = jnp.arange(tokens)
    turned = (rotate(jnp.asarray(x, jnp.float32), positions, rope) for x in (q, k))
    return *(np.asarray(x) for x in turned), v.astype(np.float32)


def check(q, k, v, config, rope=ROPE, start=0, **more):
    """Outputs within float32's rounding, and the same number of visible keys for every query and head."""
    expected = reference_attention(q[start:], k, v, config=config, rope=rope, query_start=start, **more)
    run = jax.jit(lambda q, k, v: hga_attention(q, k, v, config=config, rope=rope, query_start=start, return_stats=True, **more))
    out, stats = run(q[None, start:], k[None], v[None])
    np.testing.assert_array_equal(stats.visible_keys[0], expected.visible_keys)
    np.testing.assert_allclose(out[0], expected.out, atol=2e-5)
    return stats.totals, expected


@pytest.mark.parametrize("tokens", [1, 5, 15, 16, 17, 64, 97, 160])
def test_lengths(tokens):
    check(*tensors(tokens), SMALL)


@pytest.mark.parametrize("ratio", [1, 3, 7, 8])
def test_query_heads_per_kv_head(ratio):
    check(*tensors(150, heads=2 * ratio), SMALL)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_dims(head_dim):
    check(*tensors(130, heads=2, kv_heads=1, head_dim=head_dim), SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 8, "group_size": 8},
        {"chunk_size": 12, "group_size": 3},
        {"chunk_size": 32, "group_size": 2, "top_groups": 20},
        {"sink_chunks": 0},
        {"local_chunks": 0},
        {"sink_chunks": 0, "local_chunks": 0},
        {"sink_chunks": 4, "local_chunks": 0},
        {"local_chunks": 0, "top_chunks": 1, "top_groups": 2},
        {"top_chunks": 30, "top_groups": 200},
        {"summary": "mean"},
    ],
    ids=str,
)
def test_settings(changes):
    config = HGAConfig(**{**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}, **changes})
    check(*tensors(200), config)


@pytest.mark.parametrize("start", [1, 100, 112, 159])
def test_queries_that_start_late(start):
    check(*tensors(160), SMALL, start=start)


@pytest.mark.parametrize(
    "rope", [RopeConfig(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 64)), RopeConfig(10000.0, YarnScaling(4.0, 64))], ids=["llama3", "yarn"]
)
def test_scaled_rope(rope):
    check(*tensors(150, head_dim=32, rope=rope), SMALL, rope=rope)


def test_score_scale():
    check(*tensors(150), SMALL, scale=0.6)


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
    backend = HGAAttention(SMALL, ROPE)
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
            expected = reference_attention(q[start:end], k[:end], v[:end], config=SMALL, rope=ROPE, query_start=start)
            np.testing.assert_allclose(out[:count], expected.out, atol=2e-5)
        assert not np.any(out[count:])
        start = end
    assert prefill._cache_size() == 1  # one program whatever the lengths
    for t in range(start, 230):
        out, state, _ = decode(q[t], k[t], v[t], state)
        expected = reference_attention(q[t : t + 1], k[: t + 1], v[: t + 1], config=SMALL, rope=ROPE, query_start=t)
        np.testing.assert_allclose(out, expected.out[0], atol=2e-5)
