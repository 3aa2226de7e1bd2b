"""The grouped expert MLP against float64 numpy: odd sizes, experts without tokens, all tokens on one expert, passes, both scalings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import moe_prefill
from pallas_kernels.fp8_matvec.reference import dequantize
from pallas_kernels.moe_prefill import Config, Grouped, reference

MODES = [pytest.param(True, id="interpret"), pytest.param(False, id="native", marks=pytest.mark.gpu)]
SMALL = Grouped(rows=16, columns=32, depth=32, warps=4, stages=2)


def block_scaled(rng, *shape):
    values = jnp.asarray(rng.standard_normal(shape) * 60).astype(jnp.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return values, jnp.asarray(rng.uniform(0.5, 2, blocks) / 60 / shape[-1] ** 0.5, jnp.float32)


def problem(tokens, experts, choices, size, width, *, fp8=True, busy=None):
    """Inputs and the expected output; `busy`: the only experts any token chooses."""
    rng = np.random.default_rng(size + tokens)
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    allowed = np.arange(experts) if busy is None else np.asarray(busy)
    ids = jnp.asarray(np.stack([rng.permutation(allowed)[:choices] for _ in range(tokens)]), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, choices)), jnp.float32)
    pairs = [block_scaled(rng, experts, *shape) for shape in ((size, width), (size, width), (width, size))]
    values, scales = zip(*pairs, strict=True)
    if not fp8:
        values, scales = tuple((v.astype(jnp.float32) / 60 / v.shape[-1] ** 0.5).astype(jnp.bfloat16) for v in values), (None,) * 3
    wide = [dequantize(v, s) for v, s in zip(values, scales, strict=True)]
    return (x, ids, weights, values, scales), reference.expert_mlp(x, ids, weights, *wide)


def relative(out, expected):
    out = np.asarray(out).astype(np.float64)
    assert np.isfinite(out).all()
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        pytest.param((40, 5, 2, 64, 128), {}, id="even"),
        pytest.param((37, 6, 3, 72, 200), {}, id="odd"),
        pytest.param((33, 8, 2, 144, 48), {"busy": [1, 6]}, id="experts without tokens"),
        pytest.param((29, 4, 1, 40, 160), {"busy": [3]}, id="all on the last expert"),
        pytest.param((1, 4, 2, 32, 32), {}, id="one token"),
        pytest.param((37, 6, 3, 72, 200), {"fp8": False}, id="bfloat16 weights"),
    ],
)
def test_expert_mlp(shape, kwargs, interpret):
    arguments, expected = problem(*shape, **kwargs)
    out = moe_prefill.expert_mlp(*arguments, config=Config(SMALL, SMALL), interpret=interpret)
    assert relative(out, expected) < 8e-3  # bfloat16 weights, hidden vector, expert outputs and result: four roundings of 2**-9


@pytest.mark.parametrize("interpret", MODES)
@pytest.mark.parametrize(
    "variant",
    [
        {"scaling": "partial"},
        {"weights_first": False},
        {"conversion": "bits"},
        {"operand": "float16"},
        {"operand": "float16", "scaling": "partial", "conversion": "bits"},
    ],
)
def test_variants(variant, interpret):
    arguments, expected = problem(37, 6, 3, 72, 200)
    grouped = Grouped(**{"rows": 16, "columns": 32, "depth": 32, "warps": 4, "stages": 2, **variant})
    assert relative(moe_prefill.expert_mlp(*arguments, config=Config(grouped, grouped), interpret=interpret), expected) < 8e-3


@pytest.mark.parametrize("interpret", MODES)
def test_float16_rounds_an_eighth(interpret):
    """Activations, dequantised weights, hidden vector and expert outputs in float16, the sum over experts in float32."""
    (x, *rest), _ = problem(37, 6, 3, 72, 200)
    x = (x + jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), x.dtype) / 512).astype(jnp.float16)
    ids, weights, values, scales = rest
    expected = reference.expert_mlp(x, ids, weights, *(dequantize(v, s) for v, s in zip(values, scales, strict=True)))
    grouped = Grouped(rows=16, columns=32, depth=32, warps=4, stages=2, operand="float16")
    out = moe_prefill.expert_mlp(x, *rest, out_dtype=jnp.float32, config=Config(grouped, grouped), interpret=interpret)
    assert out.dtype == jnp.float32
    assert relative(out, expected) < 1e-3


@pytest.mark.parametrize("interpret", MODES)
def test_several_passes_give_the_same_rows(interpret):
    arguments, _ = problem(37, 6, 3, 72, 200)
    whole = moe_prefill.expert_mlp(*arguments, config=Config(SMALL, SMALL), interpret=interpret)
    parts = moe_prefill.expert_mlp(*arguments, config=Config(SMALL, SMALL, tokens_per_pass=16), interpret=interpret)
    np.testing.assert_array_equal(np.asarray(whole, np.float32), np.asarray(parts, np.float32))


def test_every_pair_is_in_one_tile_of_its_expert():
    rng = np.random.default_rng(0)
    for experts, tokens, choices, rows in ((8, 50, 3, 16), (4, 7, 1, 16), (16, 3, 2, 16)):
        ids = np.stack([rng.permutation(experts // 2)[:choices] for _ in range(tokens)])  # half the experts get nothing
        order, first = moe_prefill.sort_by_expert(jnp.asarray(ids), experts)
        order, expert, start, live = map(np.asarray, (order, *moe_prefill.tiles(first, ids.size, rows)))
        seen = []
        for e, first, count in zip(expert, start, live, strict=True):
            pairs = order[first : first + count]
            assert (ids.reshape(-1)[pairs] == e).all()
            seen.extend(pairs)
        assert sorted(seen) == list(range(ids.size))


def test_wrong_settings_say_why():
    with pytest.raises(ValueError, match="columns=96 must be a power of two"):
        Grouped(columns=96)
    with pytest.raises(ValueError, match="must be equal"):
        Config(Grouped(operand="float16"), Grouped(operand="bfloat16"))
    x, ids, weights, values, scales = problem(4, 4, 2, 32, 32)[0]
    with pytest.raises(NotImplementedError, match="with scales"):
        moe_prefill.expert_mlp(x, ids, weights, tuple(v.astype(jnp.bfloat16) for v in values), scales)
