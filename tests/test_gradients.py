"""Gradients of hga_attention: they flow through the tokens attended to, exactly; the selection, piecewise constant, has none."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_cases import PAPER, ROPE, SKETCH, tensors

from hga_jax.attention import hga_attention, opened_pages
from hga_jax.blocks import attend_and_keep, new_state, summarise_new
from hga_jax.cache import DeviceHistory
from hga_jax.config import HGAConfig
from hga_jax.gradients import routed_attention_gradient
from hga_jax.policies import policy_for
from hga_jax.reference import reference_attention
from hga_jax.sketches import built_in_rotation


def loss_gradients(q, k, v, d_out, config, **more):
    """Gradients of sum(out * d_out) of one sequence."""

    def loss(q, k, v):
        out, stats = hga_attention(q[None], k[None], v[None], config=config, rope=ROPE, return_stats=True, **more)
        return jnp.sum(out[0].astype(jnp.float32) * d_out), stats.visible_keys[0]

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def masked_attention(q, k, v, visible):
    """Attention in the arrays' own precision, numpy or JAX: q [T, N, H], k, v [S, K, H], visible [T, N, S]."""
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat(ratio, axis=1) for x in (k, v))
    scores = (q[:, :, None] * k.swapaxes(0, 1)).sum(-1) / q.shape[-1] ** 0.5
    weights = visible * np.e ** (scores - scores.max(-1, keepdims=True))
    return (weights[..., None] * v.swapaxes(0, 1)).sum(2) / weights.sum(-1, keepdims=True)


def visible_tokens(opened, config, start, tokens):
    """bool [T, N, S] from the pages opened beside the windows, bool [T, N, P]."""
    token, position = np.arange(tokens), start + np.arange(len(opened))[:, None]
    own = position // config.chunk_size * config.chunk_size
    windows = (token < config.sink_chunks * config.chunk_size) | (token >= own - config.local_chunks * config.chunk_size)
    pages = np.zeros((*opened.shape[:2], tokens), bool)
    by_token = opened.repeat(config.group_size, axis=-1)[..., :tokens]
    pages[..., : by_token.shape[-1]] = by_token
    return (pages | windows[:, None]) & (token <= position)[:, None]


@pytest.mark.parametrize(
    ("config", "start"),
    [(PAPER, 0), (SKETCH, 0), (replace(PAPER, local_chunks=0), 37), (replace(SKETCH, sink_chunks=0), 37), (SKETCH, 99)],
    ids=["paper", "sketch", "paper-late", "sketch-late", "one-query"],
)
def test_gradients_are_those_of_attention_over_the_tokens_seen(config, start):
    q, k, v = tensors(100)
    q = q[start:]
    random = np.random.default_rng(1)
    d_out = random.standard_normal(q.shape)
    gradients, visible_keys = loss_gradients(q, k, v, d_out, config, query_start=start)
    more = {"rotation": built_in_rotation(16)} if config.policy == "sketch" else {}
    expected = reference_attention(q, k, v, config=config, rope=ROPE, query_start=start, **more)
    np.testing.assert_array_equal(visible_keys, expected.visible_keys)
    visible = visible_tokens(expected.opened, config, start, len(k))
    np.testing.assert_array_equal(visible.sum(-1), expected.visible_keys)
    assert start == 99 or not np.all(visible.sum(-1) == start + 1 + np.arange(len(q))[:, None])  # something is left out

    check_every_element(gradients, q, k, v, d_out, visible)

    # And along random directions against float64 central differences, step 1e-5: errors of about 1e-9.
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    for which in range(3):
        direction = random.standard_normal(arrays[which].shape)
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[which] = moved[which] + sign * 1e-5 * direction
            ends.append((masked_attention(*moved, visible) * d_out).sum())
        np.testing.assert_allclose((np.asarray(gradients[which], np.float64) * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


def check_every_element(gradients, q, k, v, d_out, visible):
    """Against autodiff of the masked formula."""
    _, pull = jax.vjp(lambda *x: masked_attention(*x, visible), *(jnp.asarray(x) for x in (q, k, v)))
    for ours, theirs in zip(gradients, pull(jnp.asarray(d_out, jnp.float32)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("change", "start"), [({"screening": "on"}, 37), ({"scan_pairs": 3}, 0)], ids=["screened", "pairs"])
def test_gradients_when_all_blocks_are_listed_at_once(change, start):
    """The form that GPUs run, which may choose pages by ways of its own: gradients of what it opened."""
    q, k, v = tensors(100)
    q, config = q[start:], replace(SKETCH, **change)
    d_out = np.random.default_rng(1).standard_normal(q.shape)
    gradients, visible_keys = loss_gradients(q, k, v, d_out, config, query_start=start)
    opened = jax.jit(partial(opened_pages, config=config, query_start=start))(q[None], k[None], v[None])[0]
    visible = visible_tokens(np.asarray(opened), config, start, 100)
    np.testing.assert_array_equal(visible.sum(-1), visible_keys)
    assert 0 < np.mean(opened) < 0.5
    check_every_element(gradients, q, k, v, d_out, visible)


@pytest.mark.parametrize(
    ("change", "dtype", "tolerance"),
    # bfloat16 keeps 8 bits: sums over some 50 tokens of weights and scores rounded to it are good to about one per cent.
    [({"local_chunks": 20}, jnp.float32, 1e-5), ({"threshold": 1e-9}, jnp.float32, 1e-5), ({"threshold": 1e-9}, jnp.bfloat16, 0.02)],
    ids=["windows", "pages", "bfloat16"],
)
def test_full_coverage_has_dense_gradients(change, dtype, tolerance):
    q, k, v = tensors(75)
    d_out = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    rounded = tuple(jnp.asarray(x, dtype) for x in (q, k, v))
    gradients, _ = loss_gradients(*rounded, d_out, replace(SKETCH, **change))
    exact = (x.astype(jnp.float32) for x in rounded)
    dense = jax.vjp(lambda *x: jax.nn.dot_product_attention(*(y[None] for y in x), is_causal=True)[0], *exact)[1](d_out)
    for ours, theirs in zip(gradients, dense, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
def test_kernels_give_what_xla_gives(name):
    """The gradient in the two forms, for queries that start and end inside chunks."""
    config = HGAConfig(sink_chunks=1, local_chunks=1, threshold=0.1)
    q, k, v = (jnp.asarray(x) for x in tensors(290, heads=2, kv_heads=1))
    q, start, count = q[70:], jnp.int32(70), jnp.int32(215)
    policy = policy_for(config, None, 16, 0.25)
    history = DeviceHistory.holding(k, v, 16, 320)
    state = summarise_new(new_state(history, k.dtype, config, policy), jnp.int32(0), 320, config, policy)
    out, _, _, _, opened = jax.jit(lambda *x: attend_and_keep(*x, config, policy, 0.25))(q, start, count, state)
    in_use = jnp.arange(opened.since.shape[-1]) < opened.counts[:, None, None, None]
    assert 0 < jnp.sum(in_use & (opened.since < 64)) < 12  # some of the pages between the windows are opened, and some are not
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    arrays = (d_out, out, q, k, v, start, count, opened)
    with jax.default_matmul_precision("highest"):  # XLA's own default on NVIDIA GPUs has 10 bits
        gradients, expected = (jax.jit(lambda *x, by=by: routed_attention_gradient(*x, config, 0.25, by))(*arrays) for by in (name, "xla"))
        for ours, theirs in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_padding_under_checkpoint():
    """A sequence beside a longer one has the gradients it has alone, recomputed or not; its padding has none."""
    sequences = [tensors(40, seed=seed) for seed in (0, 1)]
    q, k, v = (jnp.stack(x) for x in zip(*sequences, strict=True))
    lengths, d_out = jnp.array([40, 23]), np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def pulled(attend, *arrays, d_out):
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(d_out)

    together = jax.checkpoint(lambda *x: hga_attention(*x, config=SKETCH, key_value_seq_lengths=lengths))
    ours = jax.jit(partial(pulled, together))(q, k, v, d_out=d_out)
    alone = jax.jit(partial(pulled, partial(hga_attention, config=SKETCH)))
    for mine, theirs in zip(ours, alone(*(x[1:, :23] for x in (q, k, v)), d_out=d_out[1:, :23]), strict=True):
        np.testing.assert_allclose(mine[1, :23], theirs[0], atol=1e-5)
        assert not np.any(mine[1, 23:])
        assert np.all(np.any(mine[0] != 0, axis=(1, 2)))
