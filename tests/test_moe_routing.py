"""The expert choice and the embedding lookup against numpy: odd sizes, equal scores, both normalisations, tables on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import host_rows, moe_routing
from pallas_kernels.host_rows import kernel as rows_kernel
from pallas_kernels.host_rows import reference as rows_reference
from pallas_kernels.moe_routing import kernel, reference

MODES = [pytest.param(True, id="interpret"), pytest.param(False, id="native", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 128, 8), (19, 12, 3), (5, 8, 8)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_expert_choice(tokens, experts, choices, renormalise, interpret):
    scores = np.random.default_rng(experts).standard_normal((tokens, experts)).astype(np.float32)
    scores[0, experts // 2 :] = scores[0, experts // 2]  # equal scores: the lower expert first
    ids, weights = reference.moe_routing(scores, choices, renormalise)
    found = [kernel.moe_routing(jnp.asarray(scores), choices, renormalise, interpret=interpret)]
    found.append(moe_routing.moe_routing(jnp.asarray(scores), choices, renormalise=renormalise, implementation="xla"))
    for found_ids, found_weights in found:
        np.testing.assert_array_equal(found_ids, ids)
        np.testing.assert_allclose(found_weights, weights, rtol=2e-6)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 200)])
def test_rows_of_a_host_table(tokens, width, interpret):
    rng = np.random.default_rng(width)
    array = rng.standard_normal((50, width)).astype(np.float32)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    ids = jnp.asarray(rng.integers(0, 50, tokens), jnp.int32)
    expected = rows_reference.host_rows(array, ids)
    table = jax.device_put(array, host)
    out = rows_kernel.host_rows(jnp.asarray(array) if interpret else table, ids, config=host_rows.Config(columns=64), interpret=interpret)
    np.testing.assert_array_equal(out, expected)
    out = jax.jit(host_rows.host_rows)(table, ids)
    np.testing.assert_array_equal(out, expected)
    narrow = array.astype(jnp.bfloat16)
    out = rows_kernel.host_rows(jnp.asarray(narrow) if interpret else jax.device_put(narrow, host), ids, jnp.float32, interpret=interpret)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, narrow.astype(np.float32)[np.asarray(ids)])
    out = jax.jit(host_rows.host_rows)(table, ids)
    assert out.sharding.memory_kind == jnp.zeros(1).sharding.memory_kind


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("count", "width"), [(1, (24,)), (64, (32,)), (150, (5,)), (7, ()), (64, ())])
def test_rows_from_one_memory_to_the_other(count, width, interpret):
    """Native, the target lies in pinned host memory, then the source; what lies around the rows stays."""
    rng = np.random.default_rng(count)
    target, source = (rng.integers(0, 255, (3, n, *width), np.uint8) for n in (200, 160))
    expected = rows_reference.copy_rows(target, source, 41, 9, count)
    where = jnp.array([9, 41], jnp.int32)
    for hosted in (0, 1):
        arrays = [jnp.asarray(target), jnp.asarray(source)]
        if not interpret:
            host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
            arrays[hosted] = jax.device_put(arrays[hosted], host)

        def run(target, source, where, on_host=not interpret and hosted == 0):
            out = rows_kernel.copy_rows(target, source, where, count, interpret=interpret)
            return jax.device_put(out, jax.memory.Space.Host) if on_host else out

        np.testing.assert_array_equal(jax.jit(run, donate_argnums=0)(*arrays, where), expected)
    rows = {"target_row": jnp.int32(41), "source_row": jnp.int32(9), "count": count, "implementation": "xla"}
    np.testing.assert_array_equal(host_rows.copy_rows(jnp.asarray(target), jnp.asarray(source), **rows), expected)
