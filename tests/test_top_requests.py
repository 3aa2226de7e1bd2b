"""Who asked first for the best columns, without sorting: against numpy's sort, on the cases where bisection could go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.routing import first_requests, largest


def cases():
    random = np.random.default_rng(0)
    normal = random.standard_normal((3, 20, 40)).astype(np.float32)
    holes = np.where(random.random(normal.shape) < 0.9, -np.inf, normal).astype(np.float32)
    yield "normal", normal
    yield "neighbouring floats", (1 + np.argsort(normal, axis=-1) * 2.0**-23).astype(np.float32)
    yield "huge and tiny", (normal * 10.0 ** random.integers(-30, 30, normal.shape)).astype(np.float32)
    yield "few finite", holes
    yield "a row of nothing", np.where(np.arange(20)[:, None] == 3, -np.inf, normal).astype(np.float32)
    yield "nothing at all", np.full_like(normal, -np.inf)


@pytest.mark.parametrize(("name", "scores"), list(cases()), ids=[name for name, _ in cases()])
@pytest.mark.parametrize("count", [1, 7, 39])
def test_against_a_sort(name, scores, count):
    order = np.argsort(-scores, axis=-1, kind="stable")
    asked = np.zeros(scores.shape, bool)
    np.put_along_axis(asked, order[..., :count], True, axis=-1)
    asked &= scores > -np.inf
    np.testing.assert_array_equal(largest(jnp.asarray(scores), count), asked)
    rows = np.where(asked, np.arange(20)[:, None], 20).min(-2)
    first = jax.jit(first_requests, static_argnums=1)(jnp.asarray(scores), count, jnp.asarray(scores))
    np.testing.assert_array_equal(first, rows)


def test_ties_are_all_granted():
    scores = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(largest(scores, 2), [[False, True, True, True, False]])
    np.testing.assert_array_equal(first_requests(scores, 2, scores), [1, 0, 0, 0, 1])
