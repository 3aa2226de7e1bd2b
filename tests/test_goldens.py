"""The fast path and the float64 oracle against outputs of the paper authors' PyTorch code, and of an independent sketch-policy program."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.attention import HGAAttention, hga_attention
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.reference import reference_attention

GOLDEN = Path(__file__).parent / "golden" / "hga"
PAPER = ("gqa_sinks_local", "mha_no_windows", "full_coverage", "whole_chunk_groups", "short_prompt", "decode_no_windows")
TOLERANCE = 1e-4  # the goldens' own: float32 sums in another order


def load(name, policy):
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    fields = ("chunk_size", "group_size", "sink_chunks", "local_chunks", "top_chunks", "top_groups", "threshold")
    config = HGAConfig(policy=policy, **{field: meta[field] for field in fields if field in meta})
    return {key: data[key] for key in data.files}, meta, config, RopeConfig(meta["rope_theta"])


@pytest.mark.parametrize("name", PAPER)
def test_paper_prefill(name):
    data, meta, config, rope = load(name, "paper")
    q, k, v = (jnp.asarray(data[x][None, : meta["seq"]]) for x in "qkv")
    out, stats = jax.jit(lambda q, k, v: hga_attention(q, k, v, config=config, rope=rope, return_stats=True))(q, k, v)
    np.testing.assert_array_equal(stats.visible_keys[0], data["prefill_visible_keys"])
    np.testing.assert_allclose(out[0], data["prefill_out"], atol=TOLERANCE)


@pytest.mark.parametrize("name", PAPER)
def test_paper_prefill_then_decode_through_the_state(name):
    data, meta, config, rope = load(name, "paper")
    seq, steps = meta["seq"], meta["decode"]
    backend = HGAAttention(config, rope)
    state = backend.init_state(seq + steps, *data["k"].shape[1:], jnp.float32)
    padded = (np.pad(data[x][:seq], ((0, 13), (0, 0), (0, 0)), constant_values=7.0) for x in "qkv")
    out, state, _ = jax.jit(backend.prefill)(*padded, state, jnp.int32(seq))
    np.testing.assert_allclose(out[:seq], data["prefill_out"], atol=TOLERANCE)
    assert not np.any(out[seq:])
    step = jax.jit(backend.decode)
    for i in range(steps):
        out, state, _ = step(*(data[x][seq + i] for x in "qkv"), state)
        np.testing.assert_allclose(out, data["decode_out"][i], atol=TOLERANCE)


@pytest.mark.parametrize("name", PAPER)
def test_paper_oracle(name):
    data, meta, config, rope = load(name, "paper")
    seq = meta["seq"]
    result = reference_attention(*(data[x][:seq] for x in "qkv"), config=config, rope=rope)
    np.testing.assert_array_equal(result.visible_keys, data["prefill_visible_keys"])
    np.testing.assert_allclose(result.out, data["prefill_out"], atol=TOLERANCE)
    for i in range(0, meta["decode"], 9):
        end = seq + i + 1
        result = reference_attention(
            data["q"][end - 1 : end], data["k"][:end], data["v"][:end], config=config, rope=rope, query_start=end - 1
        )
        np.testing.assert_allclose(result.out[0], data["decode_out"][i], atol=TOLERANCE)
