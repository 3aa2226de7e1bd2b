"""Dense attention behind a prompt's first call, as GPUs do it: the kernel of routed attention with every page listed, beside float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.backend import DenseAttention, attend_behind


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)], ids=["interpret", "native"])
@pytest.mark.parametrize(("start", "rows", "count", "dtype"), [(70, 90, 83, "float32"), (64, 64, 64, "bfloat16"), (130, 1, 1, "float32")])
def test_attention_behind_a_history(start, rows, count, dtype, interpret):
    """Calls that begin and end inside chunks; rows that are not live give zeros."""
    heads, kv_heads, width, rng = 6, 2, 32, np.random.default_rng(start)
    q, k, v = (jnp.asarray(rng.standard_normal((start + rows, n, width)), dtype) for n in (heads, kv_heads, kv_heads))
    backend = DenseAttention(key_block=64)
    state = backend.init_state(256, kv_heads, width, jnp.dtype(dtype)).append(k, v, jnp.int32(start + count))
    batched = jax.jit(jax.vmap(partial(attend_behind, interpret=interpret)))
    [out] = batched(q[None, start:], state.pages[None], jnp.int32([start]), jnp.int32([count]))

    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q[start : start + count], k, v))
    scores = np.einsum("tnh,snh->nts", wide_q, wide_k.repeat(heads // kv_heads, axis=1)) / np.sqrt(width)
    scores[:, np.arange(start + rows) > start + np.arange(count)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), wide_v.repeat(heads // kv_heads, axis=1))
    np.testing.assert_allclose(np.asarray(out[:count], np.float64), expected, atol=1e-5 if dtype == "float32" else 2e-2)
    assert not np.asarray(out[count:]).any()
