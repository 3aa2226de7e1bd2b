"""q/k norm and rotation of a few tokens against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.normalise import Norm
from pallas_kernels.rotate_heads import kernel, reference, rotate_heads

MODES = [pytest.param(True, id="interpret"), pytest.param(False, id="native", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 4, 2, 32), (3, 3, 1, 12)])
@pytest.mark.parametrize("norms", [True, False])
def test_heads(tokens, heads, kv_heads, head_dim, norms, interpret):
    rng = np.random.default_rng(heads)
    joined = rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    angle = rng.uniform(-9, 9, (tokens, head_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weights = rng.uniform(0.5, 2, (2, head_dim)).astype(np.float32) if norms else (None, None)
    expected = reference.rotate_heads(joined, cos, sin, *weights, 1e-6, heads, kv_heads)
    q_norm, k_norm = (None if w is None else Norm(jnp.asarray(w), 1e-6) for w in weights)
    arrays = [jnp.asarray(x) for x in (joined, cos, sin)]
    found = [kernel.rotate_heads(*arrays, q_norm, k_norm, heads, kv_heads, jnp.float32, interpret=interpret)]
    found.append(rotate_heads(*arrays, heads=heads, kv_heads=kv_heads, q_norm=q_norm, k_norm=k_norm, implementation="xla"))
    for parts in found:
        for part, right in zip(parts, expected, strict=True):
            np.testing.assert_allclose(part, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_heads_are_rounded_once(dtype, interpret):
    """From float32 products with 16-bit norm weights: what float64 numpy gives, rounded in the end."""
    rng = np.random.default_rng(2)
    joined = rng.standard_normal((2, 8 * 32)).astype(np.float32)
    angle = rng.uniform(-9, 9, (2, 16))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    weights = rng.uniform(0.5, 2, (2, 32)).astype(dtype)
    expected = reference.rotate_heads(joined, cos, sin, *weights, 1e-6, 4, 2)
    arrays, (q_norm, k_norm) = [jnp.asarray(x) for x in (joined, cos, sin)], (Norm(jnp.asarray(w), 1e-6) for w in weights)
    found = [kernel.rotate_heads(*arrays, q_norm, k_norm, 4, 2, jnp.dtype(dtype), interpret=interpret)]
    found.append(rotate_heads(*arrays, heads=4, kv_heads=2, q_norm=q_norm, k_norm=k_norm, dtype=jnp.dtype(dtype), implementation="xla"))
    for parts in found:
        for part, right in zip(parts, expected, strict=True):
            assert part.dtype == dtype
            np.testing.assert_allclose(np.asarray(part, np.float64), right, rtol=0.51 * jnp.finfo(dtype).eps, atol=1e-5)
