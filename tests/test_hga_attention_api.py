"""hga_attention as a function: shapes, jit, vmap, statistics, what wrong arguments get."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_cases import PAPER, ROPE, SKETCH
from reference_cases import tensors as structured

from hga_jax.attention import HGAAttention, hga_attention, opened_pages
from hga_jax.backend import DenseAttention
from hga_jax.config import HGAConfig
from hga_jax.reference import reference_attention
from hga_jax.sketches import built_in_rotation

CONFIG = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, policy="paper", top_chunks=2, top_groups=6)


def tensors(batch=2, tokens=100, heads=4, kv_heads=2, head_dim=16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((batch, tokens, heads, head_dim), (batch, tokens, kv_heads, head_dim), (batch, tokens, kv_heads, head_dim))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def test_windows_over_everything_equal_dense_causal_attention():
    q, k, v = tensors(tokens=203)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    for windows in ({"local_chunks": 20}, {"sink_chunks": 6, "local_chunks": 6}):
        config = replace(CONFIG, **windows)
        out, stats = jax.jit(lambda *x, config=config: hga_attention(*x, config=config, rope=ROPE, return_stats=True))(q, k, v)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_array_equal(stats.visible_keys, np.broadcast_to(np.arange(1, 204)[None, :, None], (2, 203, 4)))
        assert stats.totals.attended == pytest.approx(np.full(2, 203.0))


def test_budgets_over_everything_equal_dense_causal_attention():
    q, k, v = tensors(tokens=203)
    config = replace(CONFIG, top_chunks=20, top_groups=200)
    out = jax.jit(lambda *x: hga_attention(*x, config=config, rope=ROPE))(q, k, v)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


def test_a_threshold_that_opens_everything_equals_dense_causal_attention():
    q, k, v = tensors(tokens=203)
    config = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, policy="sketch", threshold=1e-9)
    out, stats = jax.jit(lambda *x: hga_attention(*x, config=config, return_stats=True))(q, k, v)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    np.testing.assert_allclose(stats.totals.fetched, 13.0, rtol=1e-6)
    np.testing.assert_allclose(stats.totals.unopened, 0.0, atol=1e-4)


def test_batch_jit_and_vmap_agree():
    q, k, v = tensors()

    @jax.jit
    def run(q, k, v):
        return hga_attention(q, k, v, config=CONFIG, rope=ROPE)

    expected = jnp.concatenate([run(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(run(q, k, v), expected, atol=1e-6)
    np.testing.assert_allclose(hga_attention(q, k, v, config=CONFIG, rope=ROPE), expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(q[:, None], k[:, None], v[:, None])[:, 0], expected, atol=1e-6)


def test_a_traced_query_start_compiles_once():
    q, k, v = tensors(tokens=100)
    run = jax.jit(lambda q, k, v, start: hga_attention(q, k, v, config=CONFIG, rope=ROPE, query_start=start))
    out = run(q[:, 60:], k, v, jnp.int32(60))
    np.testing.assert_allclose(out, hga_attention(q[:, 60:], k, v, config=CONFIG, rope=ROPE, query_start=60), atol=1e-6)
    run(q[:, 60:], k, v, jnp.int32(60))
    assert run._cache_size() == 1


def test_sequences_of_different_lengths_under_vmap():
    q, k, v = tensors(tokens=96)
    backend = HGAAttention(CONFIG, ROPE)
    state = backend.init_state(100, 2, 16, jnp.float32)
    counts = jnp.array([96, 41])
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    out, _, stats = jax.jit(jax.vmap(backend.prefill))(q, k, v, states, counts)
    prefill = jax.jit(backend.prefill)
    for i, count in enumerate(counts):
        alone, _, expected = prefill(q[i], k[i], v[i], state, count)
        np.testing.assert_allclose(out[i], alone, atol=1e-6)
        np.testing.assert_allclose(stats.attended[i], expected.attended, rtol=1e-6)


def test_each_sequence_at_its_own_position():
    """A decode step of somebody else's batch: one query each, at different positions of caches that have room for more."""
    q, k, v = tensors(tokens=64)

    @jax.jit
    def run(q, k, v, start):
        return hga_attention(q, k, v, config=CONFIG, rope=ROPE, query_start=start)

    out = run(q[:, :1], k, v, jnp.array([63, 30]))
    np.testing.assert_allclose(out[0], run(q[:1, :1], k[:1], v[:1], jnp.int32(63))[0], atol=1e-6)
    shorter = (jnp.where(jnp.arange(64)[:, None, None] < 31, x[1:], 9) for x in (k, v))
    np.testing.assert_allclose(out[1], run(q[1:, :1], *shorter, jnp.int32(30))[0], atol=1e-6)


@pytest.mark.parametrize(("config", "start"), [(PAPER, 0), (SKETCH, 37)], ids=["paper", "sketch"])
def test_opened_pages_are_the_oracles(config, start):
    q, k, v = structured(100)
    expected = reference_attention(q[start:], k, v, config=config, rope=ROPE, rotation=built_in_rotation(16), query_start=start).opened
    pages = jax.jit(partial(opened_pages, config=config, rope=ROPE, query_start=start))(q[None, start:], k[None], v[None])[0]
    np.testing.assert_array_equal(pages[..., : expected.shape[-1]], expected)
    assert not np.any(pages[..., expected.shape[-1] :])
    assert 0 < expected.mean() < 0.5


def test_statistics_count_what_was_seen():
    q, k, v = tensors(batch=1, tokens=200)
    _, stats = hga_attention(q, k, v, config=CONFIG, rope=ROPE, return_stats=True)
    totals, causal = stats.totals, np.arange(1, 201)
    assert stats.visible_keys.dtype == jnp.int32
    assert totals.queries[0] == 200
    assert totals.blocks[0] == 13
    np.testing.assert_allclose(totals.attended[0], (np.asarray(stats.visible_keys[0]).mean(-1) / causal).sum(), rtol=1e-5)
    # Windows and own chunk bring 16 + 32 tokens, each query head at most 6 groups of 4 more.
    assert 48 < totals.fetched_tokens[0] / 13 <= 48 + 2 * 24
    assert 0 < totals.fetched[0] <= 13
    assert totals.refused[0] == 0


def test_one_head_fetches_what_it_sees():
    """With one query head a block's fetched tokens are what its last query sees: nothing is ever dropped inside a chunk."""
    q, k, v = tensors(batch=1, tokens=160, heads=1, kv_heads=1)
    _, stats = hga_attention(q, k, v, config=CONFIG, rope=ROPE, return_stats=True)
    ends = np.asarray(stats.visible_keys[0, 15::16, 0])
    assert stats.totals.fetched_tokens[0] == ends.sum()
    np.testing.assert_allclose(stats.totals.fetched[0], (ends / np.arange(16, 161, 16)).sum(), rtol=1e-6)


def test_dense_backend_agrees_when_windows_cover_everything():
    q, k, v = (x[0] for x in tensors(tokens=90))
    outs = []
    for backend in (DenseAttention(), HGAAttention(replace(CONFIG, local_chunks=9), ROPE)):
        state = backend.init_state(96, 2, 16, jnp.float32)
        prefill = jax.jit(backend.prefill)
        first, state, _ = prefill(q[:50], k[:50], v[:50], state, jnp.int32(50))
        second, state, stats = prefill(*(jnp.pad(x[50:89], ((0, 11), (0, 0), (0, 0))) for x in (q, k, v)), state, jnp.int32(39))
        second = second[:39]
        third, _, _ = jax.jit(backend.decode)(q[89], k[89], v[89], state)
        outs.append(jnp.concatenate([first, second, third[None]]))
        assert stats.attended == pytest.approx(39)
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 10, 3, 16)}, "query's 3 heads are not a multiple of key's 2 heads"),
        ({"k": (2, 11, 2, 16), "v": (2, 11, 2, 16)}, "key holds 11 tokens, but query_start=0 \\+ 10 query tokens make 10"),
        ({"k": (2, 10, 2, 32), "v": (2, 10, 2, 32)}, "query's head_dim 16 differs from key's 32"),
        ({"v": (2, 10, 1, 16)}, "key.shape=\\(2, 10, 2, 16\\) and value.shape=\\(2, 10, 1, 16\\) differ"),
        ({"k": (1, 10, 2, 16), "v": (1, 10, 2, 16)}, "query holds 2 sequences and key 1"),
        ({"q": (2, 0, 4, 16)}, "at least one token is needed"),
        ({"query_start": jnp.zeros(3, jnp.int32)}, "query_start has shape \\(3,\\): one number, or \\[2\\] of them, is needed"),
        ({"key_value_seq_lengths": np.zeros(3, np.int32)}, "key_value_seq_lengths is int32\\[3\\]: integers of shape \\[2\\] are needed"),
        ({"rope": None}, "summary='mixed_rope' needs rope=RopeConfig"),
        ({"implementation": "triton"}, 'implementation=\'triton\': choose None, "pallas" or "xla"'),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments(change, message):
    shapes = {"q": (2, 10, 4, 16), "k": (2, 10, 2, 16), "v": (2, 10, 2, 16)}
    more = {"rope": ROPE, **{name: value for name, value in change.items() if name not in shapes}}
    q, k, v = (jnp.ones(change.get(name, shape)) for name, shape in shapes.items())
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda q, k, v: hga_attention(q, k, v, config=CONFIG, **more))(q, k, v)


def test_kernels_asked_for_by_name_are_refused_where_they_cannot_run():
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="powers of two"):
        hga_attention(q, k, v, config=replace(CONFIG, chunk_size=12), rope=ROPE, implementation="pallas")
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs a CUDA GPU"):
            hga_attention(q, k, v, config=CONFIG, rope=ROPE, implementation="pallas")
