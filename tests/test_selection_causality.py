"""What a query sees must not depend on what comes after it: the sketch policy holds to that everywhere, the paper's up to its chunk."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.attention import HGAAttention, hga_attention
from hga_jax.config import HGAConfig, RopeConfig

ROPE = RopeConfig(10000.0)
SKETCH = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=1, policy="sketch", threshold=0.15, votes=0)
PAIRS = replace(SKETCH, scan_pairs=3, threshold=0.1)
VOTES = replace(SKETCH, votes=2, vote_share=0.5, vote_stride=2)
TOLD = replace(VOTES, sketch_pairs=5)
FOURTHS = replace(VOTES, scan_pairs=3, scan_stride=4, vote_stride=4, threshold=0.1)
PAPER = replace(SKETCH, policy="paper", top_chunks=2, top_groups=6)
TOKENS = 150


def tensors(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(1.5 * jax.random.normal(key, (TOKENS, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))


def runner(config):
    @jax.jit
    def run(q, k, v):
        out, stats = hga_attention(q[None], k[None], v[None], config=config, rope=ROPE, return_stats=True)
        return out[0], stats.visible_keys[0]

    return run


def changed_after(t, arrays):
    """The same tokens up to and including t, others behind it."""
    after = jnp.arange(TOKENS)[:, None, None] > t
    return tuple(jnp.where(after, other, array) for array, other in zip(arrays, tensors(seed=7), strict=True))


@pytest.mark.parametrize(
    "config",
    [SKETCH, replace(SKETCH, page_capacity=4), PAIRS, VOTES, TOLD, FOURTHS],
    ids=["room", "full", "pairs", "votes", "told", "fourths"],
)
def test_sketch_never_looks_ahead(config):
    run, arrays = runner(config), tensors()
    out, visible = run(*arrays)
    hidden = 1 + np.arange(TOKENS)[:, None] - visible
    assert 0.05 < hidden.mean() / (TOKENS / 2) < 0.8  # the selection is not trivial
    for t in (0, 15, 16, 40, 63, 64, 70, 95, 100, 111, 112, 130, 148):
        other_out, other_visible = run(*changed_after(t, arrays))
        np.testing.assert_array_equal(other_visible[: t + 1], visible[: t + 1])
        # Pages that later rows open lie between those of earlier rows in one sum: the order of additions changes, nothing else.
        np.testing.assert_allclose(other_out[: t + 1], out[: t + 1], atol=4e-6)


def test_paper_looks_ahead_inside_the_last_chunk_only():
    run, arrays = runner(PAPER), tensors()
    out, visible = run(*arrays)
    displaced = 0
    for t in (63, 64, 70, 95, 100, 111, 112, 130, 140):
        other_out, other_visible = run(*changed_after(t, arrays))
        chunk = (t + 1) // 16 * 16
        np.testing.assert_array_equal(other_visible[:chunk], visible[:chunk])
        np.testing.assert_array_equal(other_out[:chunk], out[:chunk])
        displaced += int((other_visible[chunk : t + 1] != visible[chunk : t + 1]).sum())
    assert displaced > 0  # what the paper's shared cut does: later queries take pages from earlier ones of their chunk


@pytest.mark.parametrize("config", [SKETCH, replace(SKETCH, page_capacity=4), VOTES, TOLD], ids=["room", "full", "votes", "told"])
def test_sketch_prefill_then_decode_is_prefill(config):
    """Any split into prefill calls and decode steps opens the same pages, and so remembers the same requests."""
    arrays = tensors()
    backend = HGAAttention(config)
    prefill, decode = jax.jit(backend.prefill), jax.jit(backend.decode)
    empty = backend.init_state(TOKENS, 2, 16, jnp.float32)
    expected, visible = runner(config)(*arrays)
    _, whole, totals = prefill(*arrays, empty, jnp.int32(TOKENS))
    for split in ((90,), (16, 96), (7, 8, 50, 55, 100), (111,)):
        state, attended, refused, outs = empty, 0.0, 0.0, []
        for start, end in zip((0, *split[:-1]), split, strict=True):
            out, state, stats = prefill(*(jnp.roll(x, -start, axis=0) for x in arrays), state, jnp.int32(end - start))
            outs.append(out[: end - start])
            attended, refused = attended + stats.attended, refused + stats.refused
        for t in range(split[-1], TOKENS):
            out, state, stats = decode(*(x[t] for x in arrays), state)
            outs.append(out[None])
            assert round(float(stats.attended) * (t + 1) * 4) == visible[t].sum()
            attended, refused = attended + stats.attended, refused + stats.refused
        np.testing.assert_array_equal(state.stamps, whole.stamps)
        np.testing.assert_allclose(jnp.concatenate(outs), expected, atol=5e-6)
        np.testing.assert_allclose(attended, totals.attended, rtol=1e-5)
    assert prefill._cache_size() == decode._cache_size() == 1


def test_prefill_by_pairs_in_any_calls():
    """Any split opens the same pages: the pairs are those of the first tokens. Stored histories know no queries: sketches then."""
    arrays, backend = tensors(), HGAAttention(PAIRS)
    prefill, empty = jax.jit(backend.prefill), backend.init_state(TOKENS, 2, 16, jnp.float32)
    expected, visible = runner(PAIRS)(*arrays)
    by_sketches, others = runner(replace(PAIRS, scan_pairs=0))(*arrays)
    assert np.any(visible != others)
    for split in ((90, 150), (7, 8, 50, 55, 100, 150)):
        state, outs = empty, []
        for start, end in zip((0, *split[:-1]), split, strict=True):
            out, state, _ = prefill(*(jnp.roll(x, -start, axis=0) for x in arrays), state, jnp.int32(end - start))
            outs.append(out[: end - start])
        np.testing.assert_allclose(jnp.concatenate(outs), expected, atol=5e-6)
    _, state, _ = prefill(*arrays, empty, jnp.int32(64))
    state = replace(state, energy=jnp.zeros_like(state.energy))
    out, _, _ = prefill(*(jnp.roll(x, -64, axis=0) for x in arrays), state, jnp.int32(86))
    np.testing.assert_allclose(out[16:86], by_sketches[80:], atol=5e-6)


def test_who_scans_pairs():
    """Every fourth query opens pages; the others see those and their own windows. How many do by default depends on the room."""
    _, visible = runner(FOURTHS)(*tensors())
    position = np.arange(TOKENS)
    opened = visible - (position + 1 - np.maximum(position // 16 - 2, 0) * 16)[:, None]
    more = np.diff(opened, axis=0)[(position[1:] % 16) > 0]
    probes = position[1:][(position[1:] % 16) > 0] % 4 == 0
    assert (more[~probes] == 0).all()
    assert (more[probes] > 0).any()
    assert [PAIRS.scan_stride_for(room) for room in (20_000, 32_768, 32_769)] == [2, 2, 4]
    assert replace(VOTES, vote_stride=1).scan_stride_for(65_536) == 1  # who votes scans
    with pytest.raises(ValueError, match="vote_stride=2 must be a multiple of scan_stride=4"):
        replace(VOTES, scan_stride=4)
    with pytest.raises(ValueError, match="scan_stride=3 must divide chunk_size=16"):
        replace(PAIRS, scan_stride=3)


def test_sketch_remembers_for_one_more_chunk():
    """A page that one query wants is seen until the next chunk ends, and no longer."""
    q, k, v = (np.zeros((TOKENS, 1, 16), np.float32) for _ in range(3))
    k[20:24, 0, 0] = 8.0  # page 5, in chunk 1
    q[70, 0, 0] = 8.0  # in chunk 4 one query looks for it; all other scores are equal
    config = replace(SKETCH, threshold=0.5)
    _, stats = hga_attention(*(jnp.asarray(x[None]) for x in (q, k, v)), config=config, return_stats=True)
    visible = np.asarray(stats.visible_keys[0, :, 0])
    position = np.arange(TOKENS)
    windows = position + 1 - np.maximum(position // 16 - 2, 0) * 16
    np.testing.assert_array_equal(visible - windows, np.where((position >= 70) & (position < 96), 4, 0))
