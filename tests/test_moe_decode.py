"""The decode kernels (matvec, expert MLP) against float64 numpy: odd sizes, partial scale blocks, FP8 and bfloat16 weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.quantized import matmul
from pallas_kernels import fp8_matvec, moe_decode
from pallas_kernels.fp8_matvec import reference as matvec_reference
from pallas_kernels.moe_decode import reference
from pallas_kernels.normalise import Norm

MODES = [pytest.param(True, id="interpret"), pytest.param(False, id="native", marks=pytest.mark.gpu)]


def block_scaled(rng, *shape):
    """Random e4m3 values over the whole range of the type, and scales that differ by a factor of four from block to block."""
    values = jnp.asarray(rng.standard_normal(shape) * 60).astype(jnp.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return values, jnp.asarray(rng.uniform(0.5, 2, blocks) / 60 / shape[-1] ** 0.5, jnp.float32)


def relative(out, expected):
    out = np.asarray(out).astype(np.float64)
    assert np.isfinite(out).all()
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 256, 256), (1, 200, 304), (3, 130, 48), (8, 37, 529)])
@pytest.mark.parametrize("plain", [None, "bfloat16", "float16"])
def test_matvec(tokens, outputs, inputs, plain, interpret):
    rng = np.random.default_rng(outputs)
    x = jnp.asarray(rng.standard_normal((tokens, inputs)), plain or jnp.bfloat16)
    values, scales = block_scaled(rng, outputs, inputs)
    if plain:
        values, scales = values.astype(plain), None
    expected = matvec_reference.matvec(x, values, scales)
    configs = [fp8_matvec.Config(rows=8, columns=256)]
    if not plain:
        bits = fp8_matvec.Config(rows=16, columns=512, in_flight=1, conversion="bits")
        configs += [bits, fp8_matvec.Config(rows=4, columns=128)]
    for config in configs:
        out = fp8_matvec.matvec(x, values, scales, out_dtype=jnp.float32, config=config, interpret=interpret)
        assert relative(out, expected) < 1e-6  # products are exact in float32: what is left is the order of float32 additions


def normalised(x, norm):
    wide = np.asarray(x).astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + norm.eps) * np.asarray(norm.weight, np.float64)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fp8", [True, False])
def test_several_matvecs_in_one_launch(tokens, fp8, interpret):
    """With the normalisation before and the residual after."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((tokens, 176)), jnp.float32)
    weights = [block_scaled(rng, outputs, 176) if fp8 else (jnp.asarray(rng.standard_normal((outputs, 176)), jnp.float32), None)
               for outputs in (136, 37, 8)]  # fmt: skip
    norm, residual = (
        Norm(jnp.asarray(rng.uniform(0.5, 2, 176), jnp.float32), 1e-6),
        jnp.asarray(rng.standard_normal((tokens, 181)), jnp.float32),
    )
    config = fp8_matvec.Config(rows=8, columns=128)
    expected = np.concatenate([matvec_reference.matvec(x, *weight) for weight in weights], axis=1)
    assert relative(fp8_matvec.matvecs(x, weights, config=config, interpret=interpret), expected) < 1e-6
    out = fp8_matvec.matvecs(x, weights, residual=residual, config=config, interpret=interpret)
    assert relative(out, expected + np.asarray(residual)) < 1e-6
    expected = np.concatenate([matvec_reference.matvec(normalised(x, norm), *weight) for weight in weights], axis=1)
    out = fp8_matvec.matvecs(x, weights, norm=norm, residual=residual, config=config, interpret=interpret)
    assert relative(out, expected + np.asarray(residual)) < 1e-6


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "size", "width"), [(1, 5, 2, 128, 256), (4, 7, 3, 72, 200), (2, 4, 1, 150, 80), (1, 8, 8, 96, 64)]
)
@pytest.mark.parametrize("fp8", [True, False])
def test_expert_mlp(tokens, experts, choices, size, width, fp8, interpret):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32)
    ids = jnp.asarray(np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, choices)), jnp.float32)
    values, scales = zip(
        block_scaled(rng, experts, size, width),
        block_scaled(rng, experts, size, width),
        block_scaled(rng, experts, width, size),
        strict=True,
    )
    if not fp8:
        values = tuple((v.astype(jnp.float32) / 60 / v.shape[-1] ** 0.5).astype(jnp.bfloat16) for v in values)
        scales = (None,) * 3
    wide = [matvec_reference.dequantize(v, s) for v, s in zip(values, scales, strict=True)]
    expected = reference.expert_mlp(x, np.asarray(ids), np.asarray(weights), *wide)
    bits = {"conversion": "bits"}
    for config in (
        moe_decode.Config(fp8_matvec.Config(rows=16, columns=256), fp8_matvec.Config(rows=8, columns=128)),
        moe_decode.Config(fp8_matvec.Config(rows=32, columns=64, **bits), fp8_matvec.Config(rows=16, columns=256, **bits)),
    ):
        out = moe_decode.expert_mlp(x, ids, weights, values, scales, config=config, interpret=interpret)
        assert relative(out, expected) < 2e-6  # float32 throughout
    norm = Norm(jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32), 1e-6)
    expected = reference.expert_mlp(normalised(x, norm), np.asarray(ids), np.asarray(weights), *wide) + np.asarray(x, np.float64)
    out = moe_decode.expert_mlp(x, ids, weights, values, scales, norm=norm, residual=x, config=config, interpret=interpret)
    assert relative(out, expected) < 2e-6


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 6e-3), ("float16", 8e-4)])
def test_float32_between_layers_and_sixteen_bits_inside(dtype, most, interpret):
    """What is normalised has the norm's format, two roundings; the residual and the result are not rounded."""
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.standard_normal((2, 176)) * 1000, jnp.float32)  # in 16 bits nothing would be left of what is added
    norm = Norm(jnp.asarray(rng.uniform(0.5, 2, 176), dtype), 1e-6)
    weight, experts = block_scaled(rng, 176, 176), [block_scaled(rng, 4, *shape) for shape in ((96, 176), (96, 176), (176, 96))]
    ids, shares = jnp.asarray([[3, 0], [1, 2]], jnp.int32), jnp.asarray(rng.uniform(0.1, 1, (2, 2)), jnp.float32)
    values, scales = zip(*experts, strict=True)
    wide = [matvec_reference.dequantize(*expert) for expert in experts]
    for out, expected in (
        (
            fp8_matvec.matvecs(x, [weight], norm=norm, residual=x, config=fp8_matvec.Config(rows=8, columns=128), interpret=interpret),
            matvec_reference.matvec(normalised(x, norm), *weight),
        ),
        (
            moe_decode.expert_mlp(x, ids, shares, values, scales, norm=norm, residual=x, interpret=interpret),
            reference.expert_mlp(normalised(x, norm), np.asarray(ids), np.asarray(shares), *wide),
        ),
    ):
        assert out.dtype == jnp.float32
        assert relative(np.asarray(out, np.float64) - np.asarray(x, np.float64), expected) < most


@pytest.mark.parametrize("interpret", MODES)
def test_what_float16_cannot_hold_is_its_largest_number(interpret):
    x, weight = jnp.full((1, 128), 60000, jnp.float16), jnp.asarray([[1], [-1], [1 / 128]], jnp.float16) * jnp.ones((3, 128), jnp.float16)
    expected = np.asarray([[65504, -65504, 60000]])
    out = fp8_matvec.matvec(x, weight, config=fp8_matvec.Config(rows=4, columns=128), interpret=interpret)
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)
    np.testing.assert_array_equal(np.asarray(matmul(x, weight, implementation="xla"), np.float64), expected)


@pytest.mark.gpu
def test_experts_in_host_memory_are_read_in_place():
    """The same bytes from the other memory give the same sums, bit for bit."""
    rng = np.random.default_rng(11)
    x, ids = jnp.asarray(rng.standard_normal((1, 512)), jnp.bfloat16), jnp.asarray([[3, 0, 5]], jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (1, 3)), jnp.float32)
    values, scales = zip(*(block_scaled(rng, 6, *shape) for shape in ((256, 512), (256, 512), (512, 256))), strict=True)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    run = jax.jit(moe_decode.expert_mlp)
    here, there = (run(x, ids, weights, *arrays) for arrays in ((values, scales), jax.device_put((values, scales), host)))
    np.testing.assert_array_equal(np.asarray(there, np.float32), np.asarray(here, np.float32))


def test_conversions_agree_on_every_value():
    from pallas_kernels.fp8 import to_float32

    codes = jnp.arange(256, dtype=jnp.uint8)
    values = jax.lax.bitcast_convert_type(codes[(codes & 0x7F) != 0x7F], jnp.float8_e4m3fn)  # all but the two NaN
    expected = np.asarray(values).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(to_float32(values, "cast")), expected)
    np.testing.assert_array_equal(np.asarray(to_float32(values, "bits")), expected)


def test_unsupported_arguments_say_why():
    x, values = jnp.zeros((9, 128), jnp.bfloat16), jnp.zeros((128, 128), jnp.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="1 to 8 rows"):
        fp8_matvec.matvec(x, values, jnp.ones((1, 1)))
    with pytest.raises(NotImplementedError, match="without scales"):
        fp8_matvec.matvec(x[:1], values)
    with pytest.raises(NotImplementedError, match="not one per 128x128 block"):
        fp8_matvec.matvec(x[:1], values, jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="rows=3 must be a power of two"):
        fp8_matvec.Config(rows=3)
