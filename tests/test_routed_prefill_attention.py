"""Routed prefill attention, kernel and XLA twin, against float64 numpy that goes query by query."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routed_prefill_attention as prefill
from pallas_kernels.routed_prefill_attention.reference import reference_attention

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]
WINDOWS = {"chunk_size": 64, "sink_chunks": 1, "local_chunks": 1}


def how(run, config=None):
    return {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret", "config": config}


def attention(run, windows, scale, config=None):
    return jax.jit(partial(prefill.routed_prefill_attention, **windows, scale=scale, **how(run, config)))


def error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def page_lists(rng, kv_heads, blocks, lists, slots, first_chunk, lengths, windows, each, held):
    """Lists of closed pages outside the windows, seen from random rows on; `lengths`: a number of pages, or None for all there are."""
    ids = np.full((kv_heads, blocks, lists, slots), 2**20, np.int32)  # what lies beyond the count must not matter
    since = rng.integers(0, windows["chunk_size"] + 8, ids.shape).astype(np.int32)
    since[rng.random(ids.shape) < 0.5] = 0
    counts = np.zeros(ids.shape[:3], np.int32)
    for k, b, r in np.ndindex(*counts.shape):
        middle = np.arange(windows["sink_chunks"] * each, max(first_chunk + b - windows["local_chunks"], windows["sink_chunks"]) * each)
        chosen = rng.permutation(middle[middle < held])[: slots if lengths is None else lengths]
        counts[k, b, r] = len(chosen)
        ids[k, b, r, : len(chosen)] = chosen
    return ids, since, counts


def problem(length, heads, kv_heads, head_dim, first, count, lists, pages, dtype, *, windows=WINDOWS, group=16, seed=0, spare=3):
    """Arguments of the function; `pages` listed a block (None: all), and `spare` pages of NaN after the last live query's page."""
    rng = np.random.default_rng(seed)
    held = -(-(first + count) // group)
    history = rng.standard_normal((kv_heads, held + spare, 2, group, head_dim))
    history[:, held:] = np.nan
    flat = history.swapaxes(1, 2).reshape(kv_heads, 2, -1, head_dim)
    flat[:, :, first + count :] = np.nan
    history = flat.reshape(kv_heads, 2, -1, group, head_dim).swapaxes(1, 2)
    chunk = windows["chunk_size"]
    blocks = (length - 1 + chunk - 1) // chunk + 1
    each = chunk // group
    slots = max(pages if pages is not None else held, 1)
    ids, since, counts = page_lists(rng, kv_heads, blocks, lists, slots, first // chunk, pages, windows, each, held)
    last = (first + max(count, 1) - 1) // chunk - first // chunk
    counts[:, last + 1 :] = 0
    query = jnp.asarray(rng.standard_normal((length, heads, head_dim)), dtype)
    return query, jnp.asarray(history, dtype), jnp.int32(first), jnp.int32(count), *map(jnp.asarray, (ids, since, counts))


def check(run, arguments, tolerance, *, windows=WINDOWS, config=None, scale=None):
    query, history, first, count, ids, since, counts = arguments
    scale = scale or query.shape[2] ** -0.5
    out, lse = attention(run, windows, scale, config)(*arguments)
    assert out.dtype == query.dtype
    assert lse.dtype == jnp.float32
    expected, expected_lse = reference_attention(
        query, history, int(first), int(count), *map(np.asarray, (ids, since, counts)), **windows, scale=scale
    )
    assert error(out, expected) <= tolerance
    assert np.abs(np.asarray(lse) - expected_lse).max() <= max(tolerance, 1e-5) * np.abs(expected_lse).max()
    live = int(count)
    assert not np.asarray(out[live:], np.float32).any()
    assert not np.asarray(lse[live:]).any()


# float32 leaves sums of some hundred terms near 1e-6; bfloat16 rounds weights and outputs at 2^-9 each.
SHAPES = [
    # T, N, K, H, first, count, lists, pages, dtype
    (70, 4, 2, 64, 300, 70, 1, 9, np.float32),
    (65, 3, 1, 80, 333, 60, 1, 5, np.float32),
    (130, 2, 1, 64, 256, 130, 2, 7, np.float32),
    (37, 7, 1, 128, 201, 37, 7, 3, jnp.bfloat16),
    (70, 4, 2, 96, 300, 41, 1, 9, jnp.bfloat16),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_and_pages(run, shape):
    check(run, problem(*shape), 2e-5 if shape[-1] == np.float32 else 1e-2)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("pages", [0, 1, None])
def test_no_page_one_page_all_pages(run, pages):
    check(run, problem(64, 2, 1, 64, 320, 64, 1, pages, np.float32), 2e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("sinks", "local"), [(2, 3), (0, 0)])
def test_windows_at_the_start_of_the_history(run, sinks, local):
    """Blocks whose windows do not fit before them yet, and more rows than live queries."""
    windows = {"chunk_size": 32, "sink_chunks": sinks, "local_chunks": local}
    check(run, problem(200, 1, 1, 64, 0, 170, 1, 4, np.float32, windows=windows, group=8), 2e-5, windows=windows)


@pytest.mark.parametrize("run", RUNS)
def test_tiles_larger_than_a_chunk_and_pages_larger_than_a_tile(run):
    config = prefill.Config(rows=64, keys=64, warps=4, stages=1)
    windows = {"chunk_size": 32, "sink_chunks": 1, "local_chunks": 2}
    check(run, problem(40, 4, 1, 64, 100, 40, 1, 5, np.float32, windows=windows, group=8), 2e-5, windows=windows, config=config)
    config = prefill.Config(rows=16, keys=16, warps=4, stages=1)
    windows = {"chunk_size": 64, "sink_chunks": 1, "local_chunks": 1}
    check(run, problem(20, 1, 1, 64, 200, 20, 1, 2, np.float32, windows=windows, group=32), 2e-5, windows=windows, config=config)


@pytest.mark.parametrize("run", RUNS)
def test_no_live_query(run):
    windows = {"chunk_size": 16, "sink_chunks": 0, "local_chunks": 1}
    query, history, first, _, *lists = problem(20, 2, 1, 64, 100, 1, 1, 2, np.float32, windows=windows)
    out, lse = attention(run, windows, 0.1)(query, history, first, jnp.int32(0), *lists)
    assert not np.asarray(out).any()
    assert not np.asarray(lse).any()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("heads", "head_dim", "lists"), [(3, 48, 1), (2, 64, 2)])
def test_gradients_are_the_slopes_of_the_reference(run, heads, head_dim, lists):
    """Along random directions, against central differences in float64; both outputs carry a gradient, rows beyond `count` none."""
    windows = {"chunk_size": 32, "sink_chunks": 1, "local_chunks": 1}
    arguments = problem(40, heads, 1, head_dim, 150, 36, lists, 4, np.float32, windows=windows, group=8)
    rng = np.random.default_rng(1)
    seen_out, seen_lse = (rng.standard_normal((40, heads, *more)) for more in ((head_dim,), ()))
    scale = 0.2

    def loss(query, history):
        out, lse = attention(run, windows, scale)(query, history, *arguments[2:])
        return jnp.sum(out * seen_out) + jnp.sum(lse * seen_lse)

    def exact(query, history):
        first, count, *lists = (np.asarray(x) for x in arguments[2:])
        out, lse = reference_attention(query, history, first, count, *lists, **windows, scale=scale)
        return np.sum(out * seen_out) + np.sum(lse * seen_lse)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments[:2])
    point = [np.asarray(x, np.float64) for x in arguments[:2]]
    assert not np.asarray(found[0][36:]).any()
    for which in (0, 1):
        assert np.isfinite(found[which]).all()
        direction = rng.standard_normal(point[which].shape)
        ends = [[x + sign * 1e-4 * direction if i == which else x for i, x in enumerate(point)] for sign in (1, -1)]
        slope = (exact(*ends[0]) - exact(*ends[1])) / 2e-4
        size = np.linalg.norm(np.asarray(found[which], np.float64))
        assert abs(np.sum(np.asarray(found[which], np.float64) * direction) - slope) <= 2e-5 * size


@pytest.mark.gpu
@pytest.mark.parametrize(("lists", "head_dim"), [(1, 128), (8, 128), (1, 80)])
def test_real_gradients(lists, head_dim):
    """bfloat16 kernels against the XLA twin in float32."""
    windows = {"chunk_size": 64, "sink_chunks": 2, "local_chunks": 8}
    arguments = problem(300, 16, 2, head_dim, 3000, 290, lists, 40, jnp.bfloat16, windows=windows, spare=0)
    seen = jax.random.normal(jax.random.key(0), arguments[0].shape)

    def gradient(run, query, history):
        def loss(query, history):
            return jnp.sum(attention(run, windows, head_dim**-0.5)(query, history, *arguments[2:])[0].astype(jnp.float32) * seen)

        return jax.grad(loss, argnums=(0, 1))(query, history)

    expected = gradient("xla", *(x.astype(jnp.float32) for x in arguments[:2]))
    for found, exact in zip(gradient("native", *arguments[:2]), expected, strict=True):
        assert jnp.linalg.norm(found.astype(jnp.float32) - exact) <= 1e-2 * jnp.linalg.norm(exact)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lists", "group_heads", "head_dim"), [(1, 8, 128), (8, 8, 128), (1, 7, 64), (1, 4, 80), (1, 16, 96), (1, 2, 256), (1, 1, 128)]
)
def test_real_sizes(lists, group_heads, head_dim):
    windows = {"chunk_size": 64, "sink_chunks": 2, "local_chunks": 8}
    arguments = problem(150, 2 * group_heads, 2, head_dim, 5000, 140, lists, 80, jnp.bfloat16, windows=windows)
    check("native", arguments, 1e-2, windows=windows)


def test_wrong_input_is_refused():
    arguments = problem(20, 2, 1, 64, 100, 20, 1, 2, np.float32)
    settings = WINDOWS | {"scale": 0.1, "implementation": "pallas"}
    call = prefill.routed_prefill_attention
    with pytest.raises(ValueError, match="scale=0"):
        call(*arguments, **settings | {"scale": 0.0})
    with pytest.raises(ValueError, match="chunk_size=24"):
        call(*arguments, **settings | {"chunk_size": 24})
    with pytest.raises(NotImplementedError, match="chunk_size=48"):
        call(*arguments, **settings | {"chunk_size": 48})
    with pytest.raises(ValueError, match="rows=24"):
        prefill.Config(rows=24)
