"""Which implementation matmul and expert_mlp take: named, or chosen; on a CPU always XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.moe import expert_mlp
from hga_jax.quantized import BlockScaled, dequantize, matmul

X = jnp.linspace(-1, 1, 2 * 160, dtype=jnp.bfloat16).reshape(2, 160)


def fp8(*shape, block=(128, 128)):
    values = jax.random.normal(jax.random.key(0), shape).astype(jnp.float8_e4m3fn)
    return BlockScaled(values, jnp.full((*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=True))), 0.05), block)


def experts():
    return fp8(4, 96, 160), fp8(4, 96, 160), fp8(4, 160, 96)


def test_a_cpu_uses_xla_and_says_so_when_the_kernel_is_named():
    if jax.default_backend() == "gpu":
        pytest.skip("about machines without a GPU")
    weight = fp8(200, 160)
    np.testing.assert_array_equal(
        np.asarray(matmul(X, weight), np.float32), np.asarray(matmul(X, weight, implementation="xla"), np.float32)
    )
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU"):
        matmul(X, weight, implementation="pallas")
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU"):
        expert_mlp(X, jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), *experts(), implementation="pallas")


def test_a_kernel_named_for_what_it_cannot_take_says_why():
    with pytest.raises(NotImplementedError, match=r"blocks of \(64, 64\)"):
        matmul(X, fp8(200, 160, block=(64, 64)), implementation="pallas")
    with pytest.raises(NotImplementedError, match="weights are int8"):
        matmul(X, jnp.zeros((200, 160), jnp.int8), implementation="pallas")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_kernels_agree_with_xla(tokens, dtype):
    x = jax.random.normal(jax.random.key(tokens), (tokens, 160), dtype)
    ids = jnp.stack([jnp.arange(tokens) % 4, (jnp.arange(tokens) + 1) % 4], 1)
    weights = jnp.full((tokens, 2), 0.5)
    kernel, xla = (expert_mlp(x, ids, weights, *experts(), implementation=name).astype(jnp.float32) for name in ("pallas", "xla"))
    assert jnp.linalg.norm(kernel - xla) < 2e-2 * jnp.linalg.norm(xla)  # XLA rounds gate, up and hidden to bfloat16
    weight = fp8(200, 160)
    expected = x[:8].astype(jnp.float32) @ dequantize(weight, jnp.float32).T
    assert jnp.linalg.norm(matmul(x[:8], weight, implementation="pallas") - expected) < 5e-3 * jnp.linalg.norm(expected)
