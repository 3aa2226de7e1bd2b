"""Sketch routing: kernels and XLA twin decide what float64 numpy decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sketch_routing import (
    Config,
    append_sketch,
    carried_pages,
    list_shape,
    middle_of,
    pack_codes,
    prepare,
    sketch_chunks,
    sketch_routing,
    unpack_codes,
)
from pallas_kernels.sketch_routing.reference import reference_routing
from pallas_kernels.votes import is_open, stamp_of

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]


def settings(run, **config):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    if run == "xla":
        return {"implementation": "xla"}
    config = Config(unpack="arithmetic" if run == "interpret" else "asm", **({"scan_programs": 4} | config))
    return {"implementation": "pallas", "interpret": run == "interpret", "config": config}


def problem(kv_heads, heads, head_dim, chunks, chunk, group, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((kv_heads, chunks * chunk, head_dim)) + 0.5 * rng.standard_normal((kv_heads, 1, head_dim))
    rotation = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0].astype(np.float32)
    query = np.asarray(jnp.asarray(2 * rng.standard_normal((kv_heads, heads, head_dim)), dtype))
    means, codes, scales = sketch_chunks(jnp.asarray(keys, jnp.float32), jnp.asarray(rotation), chunk)
    means, scales = means.astype(dtype), scales.astype(dtype)
    window_scores = rng.standard_normal((kv_heads, heads, 3 * group))
    peaks = window_scores.reshape(kv_heads, heads, 3, group).max(-1)
    sums = np.exp(window_scores.reshape(kv_heads, heads, 3, group) - peaks[..., None]).sum(-1)
    window = jnp.asarray(np.stack([peaks, sums], axis=2).transpose(0, 3, 2, 1), jnp.float32)  # [K, splits, 2, G]
    stamps = rng.integers(-2, chunks - 1, (kv_heads, chunks * chunk // group)).astype(np.int32)
    return query, rotation, means, codes, scales, jnp.asarray(stamps), window, window_scores


def pages_of(lists, k):
    """The pages in the lists of a kv head, ascending; each must be in the list of its remainder, in ascending order."""
    parts = np.asarray(lists.ids[k]).reshape(lists.count.shape[1], -1)
    found = [part[:count].tolist() for part, count in zip(parts, np.asarray(lists.count[k]), strict=True)]
    assert all(part == sorted(part) and all(page % len(parts) == i for page in part) for i, part in enumerate(found))
    return sorted(page for part in found for page in part)


def check(run, query, rotation, means, codes, scales, stamps, window, window_scores, *, own, closes=0, config=None, votes=0, **rules):
    """stamps: with votes, the three numbers of the reference."""
    data_stamps = np.asarray(stamps)
    voting = {"votes": votes, "vote_share": rules.pop("vote_share", 1.0), "voting": rules.pop("voting", True)}

    def still_open(stamps, chunk):
        return np.asarray(is_open(stamp_of(*stamps, votes), chunk, votes)) if votes else stamps >= chunk - 1

    rotated = (query.astype(np.float64) @ rotation).astype(np.float32)
    how = settings(run, **(config or {}))

    @jax.jit
    def route(query, rotation, stamps, *arrays):
        before = carried_pages(stamps, jnp.int32(own), capacity=rules["capacity"], votes=votes, **how)
        now = jnp.int32(own), jnp.int32(own + closes)
        return before, sketch_routing(query, rotation, *arrays[:3], stamps, arrays[3], *now, **rules, **voting, **how)

    before, out = route(query, rotation, stamp_of(*stamps, votes) if votes else stamps, means, codes, scales, window)
    parts, room = list_shape(data_stamps.shape[-1], rules["capacity"])
    exact = {name: value for name, value in rules.items() if name != "capacity"} | {"parts": parts, "room": room}
    stamps, listed, refused, masses = reference_routing(
        query, rotated, means, np.asarray(unpack_codes(codes)), scales, stamps, window_scores, own, **exact, **voting
    )
    # The reference is float64: a mass this close to the threshold may fall on either side, so the cases avoid it.
    for share in (1.0, voting["vote_share"]):
        assert not (np.abs(masses / (rules["threshold"] * share) - 1) < 1e-4).any(), "pick another seed"
    seen, after = still_open(data_stamps, own), still_open(stamps, own + closes)
    for k in range(len(listed)):
        old, fresh, carried = (pages_of(x, k) for x in (before, out.fresh, out.carried))
        assert old == np.flatnonzero(seen[k]).tolist()
        assert sorted(old + fresh) == listed[k]
        staying = [page for page in np.flatnonzero(after[k]) if votes or page in listed[k]]  # votes may keep more than there is room for
        assert carried == sorted(page for part in range(parts) for page in [p for p in staying if p % parts == part][:room])
        opened = np.isin(np.arange(data_stamps.shape[-1]), listed[k])
        np.testing.assert_allclose(out.unopened[k].sum(0), masses[k][:, ~opened].sum(-1), atol=1e-5)
        assert int(out.counts[k, :, 0].sum()) == len(listed[k])
    np.testing.assert_array_equal(out.stamps, stamp_of(*stamps, votes) if votes else stamps)
    np.testing.assert_array_equal(out.counts[..., 1].sum(1), refused)
    return listed


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (4, 128), (7, 64), (8, 128), (3, 80), (2, 96), (16, 64)])
def test_same_pages_as_reference(run, heads, head_dim):
    data = problem(2, heads, head_dim, chunks=13, chunk=16, group=4, seed=heads)
    stamps = jnp.where(jnp.arange(52) // 4 < 2, -2, jnp.where(jnp.arange(52) // 4 >= 10, -2, data[5]))
    data = (*data[:5], stamps, *data[6:])
    rules = {"sink_chunks": 2, "local_chunks": 2, "group_size": 4, "threshold": 0.02, "capacity": 64, "scale": head_dim**-0.5}
    listed = check(
        run,
        *data,
        own=12,
        config={"block_chunks": 2, "select_pages": 16 if heads % 2 else 64},
        closes=heads % 2,
        **rules,
    )
    assert all(0 < len(pages) <= 32 for pages in listed)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("closes", "voting"), [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize("capacity", [64, 8])
def test_votes_keep_pages_open(run, closes, voting, capacity):
    """Votes of this chunk and of the one before, pages open and not; with the chunk's last token (closes) the votes decide. Tokens that
    have no vote ask for pages all the same."""
    data = problem(2, 7, 64, chunks=13, chunk=16, group=4, seed=11)
    rng = np.random.default_rng(0)
    touched, opened, cast = (rng.integers(*ends, (2, 52)).astype(np.int32) for ends in ((9, 13), (0, 2), (1, 6)))
    outside = (np.arange(52) < 8) | (np.arange(52) >= 36)
    if capacity == 8:
        outside |= (np.arange(52) < 14) | (np.arange(52) >= 30)  # one page a list: what is open finds room, some requests do not
    stamps = np.stack([np.where(outside, -2, touched), np.where(outside, 0, opened), np.where(outside, 0, cast)])
    rules = {"sink_chunks": 2, "local_chunks": 2, "group_size": 4, "threshold": 0.03, "capacity": capacity, "scale": 0.125}
    rules |= {"votes": 4, "vote_share": 0.3, "voting": voting}
    listed = check(run, *data[:5], stamps, *data[6:], own=12, closes=closes, config={"select_pages": 2}, **rules)
    assert all(0 < len(pages) < 32 for pages in listed)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_chunks_of_64_and_groups_of_16(run, dtype):
    data = problem(2, 4, 64, chunks=21, chunk=64, group=16, dtype=dtype, seed=3)
    rules = {"sink_chunks": 1, "local_chunks": 3, "group_size": 16, "threshold": 0.03, "capacity": 128, "scale": 0.125}
    data = (*data[:5], jnp.full_like(data[5], -2), *data[6:])
    check(run, *data, own=20, **rules)


@pytest.mark.parametrize("run", RUNS)
def test_full_lists_refuse_new_requests_in_page_order(run):
    """Room for one page in each of 32 lists and two that want it, p and p + 32: the lower one gets it unless the other was there before."""
    data = problem(2, 3, 64, chunks=25, chunk=16, group=4, seed=1)
    stamps = jnp.where(jnp.isin(jnp.arange(100), jnp.array([25, 42])), 19, -2) * jnp.ones((2, 1), jnp.int32)
    rules = {"sink_chunks": 2, "local_chunks": 2, "group_size": 4, "threshold": 1e-12, "capacity": 16, "scale": 0.125}
    listed = check(run, *data[:5], stamps, *data[6:], own=20, config={"select_pages": 2}, **rules)
    assert listed == [sorted({*range(8, 40), 25, 42} - {10})] * 2


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("own", "threshold"), [(0, 0.01), (4, 0.01), (12, 0.999)])
def test_nothing_to_open(run, own, threshold):
    data = problem(1, 2, 64, chunks=13, chunk=16, group=4, seed=2)
    rules = {"sink_chunks": 2, "local_chunks": 2, "group_size": 4, "threshold": threshold, "capacity": 8, "scale": 0.125}
    assert check(run, *data[:5], jnp.full_like(data[5], -2), *data[6:], own=own, **rules) == [[]]


@pytest.mark.parametrize("run", RUNS)
def test_a_tiny_threshold_opens_everything(run):
    data = problem(1, 2, 64, chunks=13, chunk=16, group=4, seed=2)
    rules = {"sink_chunks": 2, "local_chunks": 2, "group_size": 4, "threshold": 1e-12, "capacity": 52, "scale": 0.125}
    assert check(run, *data[:5], jnp.full_like(data[5], -2), *data[6:], own=12, **rules) == [list(range(8, 40))]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_scan_is_given_exact_halves_and_chunk_scores(run, dtype):
    how, rng = settings(run), np.random.default_rng(2)
    rotation = np.linalg.qr(rng.standard_normal((80, 80)))[0].astype(np.float32)
    query, means = jnp.asarray(rng.standard_normal((2, 3, 80)), dtype), jnp.asarray(rng.standard_normal((2, 70, 80)), dtype)
    middle = middle_of(jnp.int32(69), jnp.int32(69), 2, 3)
    plain = {"implementation": how["implementation"], "interpret": how.get("interpret", False)}
    prepared = prepare(query, jnp.asarray(rotation), means, middle, **plain)
    exact = np.asarray(query, np.float64)
    high, low = np.split(np.asarray(prepared.rotated, np.float64), 2, axis=1)
    np.testing.assert_allclose((high + low)[:, :3], exact @ rotation, atol=8 * 2.0**-19)
    assert not high[:, 3:].any()
    assert not low[:, 3:].any()
    expected = np.asarray(means, np.float64) @ exact.swapaxes(1, 2)
    np.testing.assert_allclose(prepared.chunk_scores[:, 2:66, :3], expected[:, 2:66], atol=2e-5)


def test_packing_is_what_the_docstring_says_and_inverts():
    codes = np.random.default_rng(0).integers(0, 4, (3, 80))
    packed = np.asarray(pack_codes(jnp.asarray(codes)))
    assert packed.shape == (3, 20)
    for j in range(4):
        np.testing.assert_array_equal(packed >> 2 * j & 3, codes[:, 20 * j : 20 * j + 20])
    np.testing.assert_array_equal(unpack_codes(jnp.asarray(packed)), codes)


def test_appended_chunk_equals_sketching_all_at_once():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((2, 48, 64)), jnp.float32)
    rotation = jnp.asarray(np.linalg.qr(rng.standard_normal((64, 64)))[0], jnp.float32)
    whole = sketch_chunks(keys, rotation, 16)
    state = tuple(jnp.zeros_like(x) for x in whole)
    for chunk in (2, 0, 1):
        state = append_sketch(*state, keys[:, chunk * 16 : chunk * 16 + 16], rotation, jnp.int32(chunk))
    for built, expected in zip(state, whole, strict=True):
        np.testing.assert_allclose(built, expected, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="codes of shape"):
        jax.eval_shape(
            lambda codes, means: sketch_routing(
                jnp.zeros((4, 2, 128)), jnp.eye(128), means, codes, jnp.zeros((4, 2**24)), jnp.zeros((4, 2**20), jnp.int32),
                jnp.zeros((4, 1, 2, 2)), jnp.int32(5), jnp.int32(5), sink_chunks=1, local_chunks=1, group_size=16, threshold=0.1,
                capacity=8, scale=1.0, implementation="pallas", interpret=True,
            ),
            jax.ShapeDtypeStruct((4, 2**24, 32), jnp.uint8), jax.ShapeDtypeStruct((4, 2**18, 128), jnp.bfloat16),
        )  # fmt: skip
    with pytest.raises(ValueError, match="block_chunks=3"):
        Config(block_chunks=3)
