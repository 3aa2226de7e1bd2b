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
from hga_jax.sketches import codes_of, key_sketches

GOLDEN = Path(__file__).parent / "golden" / "hga"
PAPER = ("gqa_sinks_local", "mha_no_windows", "full_coverage", "whole_chunk_groups", "short_prompt", "decode_no_windows")
SKETCH = ("sketch_gqa", "sketch_small_pages")
TOLERANCE = 1e-4  # the goldens' own: float32 sums in another order


def load(name, policy):
    data = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(data["meta"]))
    fields = ("chunk_size", "group_size", "sink_chunks", "local_chunks", "top_chunks", "top_groups", "threshold")
    config = HGAConfig(policy=policy, votes=0, sketch_pairs=0, **{field: meta[field] for field in fields if field in meta})
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


@pytest.mark.parametrize("name", SKETCH)
def test_sketch_codes(name):
    data, _, config, _ = load(name, "sketch")
    tokens = len(data["head0_codes"])
    keys = jnp.asarray(data["k"][:tokens, :1]).swapaxes(0, 1)
    sketches = key_sketches(keys, jnp.ones((1, keys.shape[2])), config.chunk_size, jnp.asarray(data["rotation"]))
    np.testing.assert_array_equal(codes_of(sketches.codes, data["k"].shape[2])[0].T, data["head0_codes"])
    np.testing.assert_allclose(sketches.scales[0], data["head0_scales"], rtol=1e-5)
    np.testing.assert_allclose(sketches.means[0], data["head0_means"], atol=1e-5)


@pytest.mark.parametrize("name", SKETCH)
def test_sketch_attention(name):
    data, _, config, _ = load(name, "sketch")
    run = jax.jit(lambda q, k, v, rotation: hga_attention(q, k, v, config=config, rotation=rotation, return_stats=True))
    out, stats = run(*(data[x][None] for x in "qkv"), data["rotation"])
    np.testing.assert_array_equal(stats.visible_keys[0], data["visible_keys"])
    np.testing.assert_allclose(out[0], data["out"], atol=TOLERANCE)


@pytest.mark.parametrize("name", SKETCH)
def test_sketch_own_requests(name):
    """A stateless single query remembers nothing: what it sees beside its windows is what it requests itself."""
    data, meta, config, _ = load(name, "sketch")
    tokens, heads, kv_heads = len(data["q"]), meta["heads"], meta["kv_heads"]

    run = jax.jit(
        lambda q, k, v: hga_attention(q, k, v, config=config, rotation=data["rotation"], query_start=k.shape[1] - 1, return_stats=True)
    )
    for t in (tokens - 1, meta["prefill"]):
        _, stats = run(data["q"][None, t : t + 1], data["k"][None, : t + 1], data["v"][None, : t + 1])
        chunk = t // config.chunk_size
        windows = t + 1 - (chunk - config.local_chunks - config.sink_chunks) * config.chunk_size
        pages = (np.asarray(stats.visible_keys[0, 0]) - windows) / config.group_size
        np.testing.assert_array_equal(pages.reshape(kv_heads, -1)[:, 0], data["own_requests"][t])
        np.testing.assert_array_equal(pages, np.repeat(data["own_requests"][t], heads // kv_heads))


@pytest.mark.parametrize("name", SKETCH)
def test_sketch_oracle(name):
    data, _, config, _ = load(name, "sketch")
    result = reference_attention(*(data[x] for x in "qkv"), config=config, rotation=data["rotation"])
    np.testing.assert_array_equal(result.visible_keys, data["visible_keys"])
    np.testing.assert_array_equal(result.requested.sum(-1), data["own_requests"])
    np.testing.assert_allclose(result.out, data["out"], atol=1e-6)  # stored as float32
