"""Paper routing: kernels and XLA twin open what plain sorting in float64 opens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paper_routing import Config, empty_marks, paper_routing
from pallas_kernels.paper_routing.reference import reference_routing

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]


def check(run, query, chunk_sums, group_sums, own, capacity=128, **rules):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    how = {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret", "config": Config(16, list_pages=32)}
    marks = empty_marks(query.shape[0], group_sums.shape[1])
    expected = reference_routing(query, chunk_sums, group_sums, own, **rules)
    for _ in range(2):  # twice: the scratch must come back clean
        out = paper_routing(
            jnp.asarray(query), jnp.asarray(chunk_sums), jnp.asarray(group_sums), marks, jnp.int32(own), capacity=capacity, **rules, **how
        )
        marks = out.marks
        for k, opened in enumerate(expected):
            count = int(out.counts[k, 0])
            assert count == min(len(opened), capacity)
            assert int(out.counts[k, 1]) == len(opened) - count
            assert list(np.asarray(out.ids[k, :count])) == sorted(opened)[:count]
            seen = [{n for n in range(query.shape[1]) if bits >> n & 1} for bits in np.asarray(out.heads[k, :count])]
            assert seen == [opened[page] for page in sorted(opened)[:count]]
    return expected


def problem(heads, head_dim, chunks, dtype=np.float32, whole=False, seed=0):
    rng = np.random.default_rng(seed)

    def random(*shape):
        # Small whole numbers give many exact ties.
        return np.asarray(jnp.asarray(rng.integers(-1, 2, shape) if whole else rng.standard_normal(shape), dtype))

    return random(2, heads, head_dim), random(2, chunks, head_dim), random(2, 4 * chunks, head_dim)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (4, 128), (7, 64), (8, 80)])
def test_same_pages_as_sorting(run, dtype, heads, head_dim):
    rules = {"sink_chunks": 2, "local_chunks": 3, "top_chunks": 5, "top_groups": 14}
    expected = check(run, *problem(heads, head_dim, 37, dtype), own=36, **rules)
    assert max(len(opened) for opened in expected) >= 7


@pytest.mark.parametrize("run", RUNS)
def test_ties_go_to_the_lowest_index(run):
    check(run, *problem(4, 64, 37, whole=True), own=36, sink_chunks=1, local_chunks=1, top_chunks=6, top_groups=10)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("own", [0, 1, 2, 3, 9, 36])
def test_previous_chunk_is_forced_without_a_local_window(run, own):
    expected = check(run, *problem(3, 64, 37, seed=own), own=own, sink_chunks=1, local_chunks=0, top_chunks=4, top_groups=32)
    if own > 1:
        assert all({4 * own - 4, 4 * own - 3, 4 * own - 2, 4 * own - 1} <= set(opened) for opened in expected)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("own", [0, 5, 6, 9])
def test_short_histories_open_what_there_is(run, own):
    check(run, *problem(4, 64, 12), own=own, sink_chunks=2, local_chunks=3, top_chunks=16, top_groups=64)


@pytest.mark.parametrize("run", RUNS)
def test_pages_beyond_the_room_are_counted(run):
    check(run, *problem(4, 64, 37), own=36, capacity=10, sink_chunks=2, local_chunks=3, top_chunks=5, top_groups=14)
