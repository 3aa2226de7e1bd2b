"""Prefill by page lists, all blocks at once, is prefill block by block: same outputs, visible keys, state and statistics."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_goldens import PAPER, TOLERANCE, load

from hga_jax.attention import HGAAttention
from hga_jax.blocks import attend, summarise_new
from hga_jax.config import HGAConfig
from hga_jax.listed import attend_listed
from hga_jax.policies import policy_for

CONFIG = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, threshold=0.02, votes=0)


def tensors(tokens, heads=4, kv_heads=2, head_dim=16, seed=0):
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((6, head_dim))
    keys = np.repeat(topics[rng.integers(0, 6, tokens // 4 + 1)], 4, axis=0)[:tokens, None] + 0.6 * rng.standard_normal(
        (tokens, kv_heads, head_dim)
    )
    query = 2 * topics[rng.integers(0, 6, (tokens, heads))] + rng.standard_normal((tokens, heads, head_dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (query, keys, rng.standard_normal(keys.shape)))


def both(config, pieces, tokens=200, implementation="xla"):
    """Outputs, visible keys, state and statistics after each piece (rows given, rows that count), by each way."""
    q, k, v = tensors(tokens)
    policy = policy_for(config, None, 16, 0.25)

    def step(state, q, k, v, count, listed):
        start = state.length
        state = replace(state, history=state.history.append(k, v, count))
        state = summarise_new(state, start, k.shape[0], config, policy)
        if listed:
            return attend_listed(q, start, count, state, config, policy, 0.25, implementation)[:4]
        return attend(q, start, count, state, config, policy, 0.25)

    results = []
    for listed in (False, True):
        state, begin, made = HGAAttention(config).init_state(256, 2, 16, jnp.float32), 0, []
        run = jax.jit(lambda *x, listed=listed: step(*x, listed))
        for rows, count in pieces:
            part = (jnp.pad(x[begin : begin + count], ((0, rows - count), (0, 0), (0, 0)), constant_values=5.0) for x in (q, k, v))
            out, visible, state, stats = run(state, *part, jnp.int32(count))
            made.append((out, visible, state.stamps, stats))
            begin += count
        results.append(made)
    return results


def compare(expected, found, unopened=0.3):
    """unopened: how far that figure may be off, which page lists estimate from every fourth query."""
    for (out, visible, stamps, stats), (out_2, visible_2, stamps_2, stats_2) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(visible_2, visible)
        np.testing.assert_array_equal(stamps_2, stamps)
        np.testing.assert_allclose(out_2, out, atol=2e-5)
        for field in fields(stats):
            if field.name == "unopened":
                np.testing.assert_allclose(stats_2.unopened, stats.unopened, rtol=unopened, atol=0.1)
                continue
            np.testing.assert_allclose(getattr(stats_2, field.name), getattr(stats, field.name), rtol=1e-4, atol=1e-3, err_msg=field.name)


@pytest.mark.parametrize("voting", [{}, {"votes": 2, "vote_share": 0.5}], ids=["requests", "votes"])
def test_prompt_in_two_calls_that_meet_inside_a_chunk(voting):
    """The second runs out of room: requests are refused in the same order."""
    block_by_block, at_once = both(replace(CONFIG, page_capacity=18, **voting), [(120, 107), (120, 93)])
    compare(block_by_block, at_once)
    stats = [piece[3] for piece in block_by_block]
    assert stats[0].refused == 0
    assert stats[1].refused > 0
    assert stats[1].unopened > 0


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    with jax.default_matmul_precision("highest"):  # XLA's own default on these GPUs has 10 bits
        for case in ((CONFIG, [(120, 107), (120, 93)]), (replace(CONFIG, page_capacity=5), [(200, 200)])):
            by_block, kernels = both(*case, implementation="pallas")
            compare(by_block, kernels, unopened=1.0)  # too few queries for a good estimate, but for the same one as XLA's
            compare(both(*case)[1], kernels, unopened=1e-3)


def paper_golden(name, implementation):
    """Outputs and visible keys of a stored case by page lists, and as the authors' code has them."""
    data, meta, config, rope = load(name, "paper")
    q, k, v = (jnp.asarray(data[x][: meta["seq"]]) for x in "qkv")
    backend, scale = HGAAttention(config, rope), q.shape[2] ** -0.5
    policy = policy_for(config, rope, q.shape[2], scale)

    @jax.jit
    def run(q, k, v, state):
        count = jnp.int32(len(q))
        state = summarise_new(replace(state, history=state.history.append(k, v, count)), jnp.int32(0), len(q), config, policy)
        return attend_listed(q, jnp.int32(0), count, state, config, policy, scale, implementation)[:2]

    out, visible = run(q, k, v, backend.init_state(len(q), *k.shape[1:], jnp.float32))
    np.testing.assert_array_equal(visible, data["prefill_visible_keys"])
    np.testing.assert_allclose(out, data["prefill_out"], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gqa_sinks_local"])
def test_paper_policy_by_page_lists_gives_the_goldens(name):
    paper_golden(name, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAPER[:-1])
def test_paper_policy_through_the_kernels_gives_the_goldens(name):
    with jax.default_matmul_precision("highest"):
        paper_golden(name, "pallas")


@pytest.mark.gpu
def test_sketch_policy_through_the_kernels_gives_the_golden():
    data, _, config, _ = load("sketch_small_pages", "sketch")
    q, k, v = (jnp.asarray(data[x]) for x in "qkv")
    policy = policy_for(config, None, q.shape[2], q.shape[2] ** -0.5, data["rotation"])

    @jax.jit
    def run(q, k, v, state):
        count = jnp.int32(len(q))
        state = summarise_new(replace(state, history=state.history.append(k, v, count)), jnp.int32(0), len(q), config, policy)
        return attend_listed(q, jnp.int32(0), count, state, config, policy, q.shape[2] ** -0.5, "pallas")[:2]

    with jax.default_matmul_precision("highest"):
        out, visible = run(q, k, v, HGAAttention(config).init_state(len(q), *k.shape[1:], jnp.float32))
    np.testing.assert_array_equal(visible, data["visible_keys"])
    np.testing.assert_allclose(out, data["out"], atol=TOLERANCE)


def test_short_prompts_can_attend_densely():
    """The first call sees everything; what follows is routed."""
    q, k, v = tensors(160)
    backend = HGAAttention(replace(CONFIG, dense_below=128))
    run, state = jax.jit(backend.prefill), backend.init_state(256, 2, 16, jnp.float32)
    out, state, stats = run(*(x[:128] for x in (q, k, v)), state, jnp.int32(120))
    expected = jax.nn.dot_product_attention(q[None, :120], k[None, :120], v[None, :120], is_causal=True)[0]
    np.testing.assert_allclose(out[:120], expected, atol=1e-5)
    assert not np.any(out[120:])
    assert stats.attended == stats.queries == 120
    later, _, stats = run(*(jnp.pad(x[120:], ((0, 88), (0, 0), (0, 0))) for x in (q, k, v)), state, jnp.int32(40))
    assert np.all(np.isfinite(later))
    assert 10 < stats.attended < 40
