"""Prefill routing: kernels and XLA decide what float64 numpy decides, and nothing depends on a later query."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hga_jax.sketches import key_sketches, told_coordinates
from pallas_kernels.sketch_prefill_routing import Config, Rule, Screen, Tile, route
from pallas_kernels.sketch_prefill_routing.keys import PageKeys, page_statistics, sketched_keys
from pallas_kernels.sketch_prefill_routing.pairs import Pairs, choose_pairs, pair_keys, query_energy
from pallas_kernels.sketch_prefill_routing.reference import reference_route
from pallas_kernels.sketch_prefill_routing.scan import how_many
from pallas_kernels.sketch_prefill_routing.sketches import sketch_pages, unsketch
from pallas_kernels.sketch_routing import sketch_chunks
from pallas_kernels.votes import stamp_of

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]
SMALL = Config(rows=16, means=Tile(16, 4, 1), tokens=Tile(32, 4, 1), list_pages=16)
CHUNK, GROUP = 16, 4


def settings(run):
    if run == "xla":
        return {"implementation": "xla"}
    return {"implementation": "pallas", "interpret": run == "interpret", "config": SMALL if run == "interpret" else Config()}


def problem(tokens, queries, heads=4, kv_heads=2, head_dim=16, seed=0, dtype=np.float32):
    """Keys in clusters, so that some pages matter far more than others."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((6, head_dim))
    topic = rng.integers(0, 6, tokens // GROUP)
    keys = np.repeat(topics[topic], GROUP, axis=0)[None] + 0.6 * rng.standard_normal((kv_heads, tokens, head_dim))
    query = 2 * topics[rng.integers(0, 6, (queries, heads))] + rng.standard_normal((queries, heads, head_dim))
    rotation = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0].astype(np.float32)
    keys, query = (np.asarray(jnp.asarray(x, dtype)) for x in (keys, query))
    sketches = sketch_chunks(jnp.asarray(keys, jnp.float32), jnp.asarray(rotation), CHUNK)
    sketched = sketched_keys(*(jnp.asarray(x, x.dtype if x.dtype == jnp.uint8 else dtype) for x in sketches), jnp.asarray(rotation), GROUP)
    pages = jnp.stack([jnp.asarray(keys), jnp.zeros(keys.shape, dtype)]).reshape(2, kv_heads, -1, GROUP, head_dim).transpose(1, 2, 0, 3, 4)
    return query, keys, sketched, pages


def rule_of(head_dim=16):
    return Rule(CHUNK, GROUP, sink_chunks=1, local_chunks=1, scale=head_dim**-0.5)


def listed(lists, kv_heads, first, count):
    """visible[k][t]: the pages that the query at position t sees."""
    ids, since, counts = (np.asarray(x) for x in (lists.ids, lists.since, lists.counts))
    visible = [{} for _ in range(kv_heads)]
    for k in range(kv_heads):
        for t in range(first, first + count):
            block = t // CHUNK - first // CHUNK
            used = slice(0, counts[k, block])
            assert np.all(np.diff(ids[k, block, used]) > 0)
            visible[k][t] = set(ids[k, block, used][since[k, block, used] <= t % CHUNK].tolist())
    return visible


@functools.cache
def program(run, head_dim, screen, capacity, threshold, votes):
    rule = dataclasses.replace(rule_of(head_dim), **votes._asdict())
    rules = {"rule": rule, "threshold": threshold, "capacity": capacity, "screen": screen}
    return jax.jit(lambda q, p, s, st, f, c: route(q, p, PageKeys(s, *page_statistics(s)), st, f, c, **rules, **settings(run)))


class Votes(NamedTuple):
    votes: int = 0
    vote_share: float = 1.0
    vote_stride: int = 1
    stride: int = 1


REQUESTS = Votes()  # any request keeps a page


def run_route(run, data, first, count, stamps, screen=None, capacity=64, threshold=0.03, votes=REQUESTS):
    query, _, sketched, pages = data
    call = program(run, query.shape[2], screen, capacity, threshold, votes)
    return call(jnp.asarray(query), pages, sketched, jnp.asarray(stamps), jnp.int32(first), jnp.int32(count))


def check(run, data, first, count, stamps, screen=None, capacity=64, threshold=0.03, votes=REQUESTS):
    """stamps: with votes, the three numbers of the reference."""
    query, keys, sketched, _ = data
    packed = stamp_of(*stamps, votes.votes) if votes.votes else stamps
    lists = run_route(run, data, first, count, packed, screen, capacity, threshold, votes)
    numbers = {"scale": query.shape[2] ** -0.5, "threshold": threshold, "capacity": capacity}
    shape = {"chunk_size": CHUNK, "group_size": GROUP, "sink_chunks": 1, "local_chunks": 1}
    by_token = np.asarray(sketched, np.float64).swapaxes(1, 2).reshape(keys.shape)
    pruned = screen and dataclasses.asdict(screen)
    expected, after, refused, unopened, closest = reference_route(
        query, keys, by_token, stamps, first, count, **shape, **numbers, screen=pruned, **votes._asdict()
    )
    assert closest > 1e-5, "pick another seed: float32 may decide otherwise"
    assert listed(lists, len(keys), first, count) == expected
    np.testing.assert_array_equal(lists.stamps, stamp_of(*after, votes.votes) if votes.votes else after)
    assert int(lists.refused) == refused
    np.testing.assert_allclose(lists.unopened, unopened, rtol=1e-4, atol=1e-4)
    return expected, refused


def never(data):
    return np.full((len(data[1]), data[1].shape[1] // GROUP), -2, np.int32)


SCREEN = Screen(stride=4, request_stride=2, spread=1.5, margin=0.3, threshold=0.8)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("screen", [None, SCREEN])
def test_whole_prompt_from_the_start(run, screen):
    data = problem(112, 102)
    expected, _ = check(run, data, 0, 99, never(data), screen)  # count < T
    assert 0 < np.mean([len(pages) for pages in expected[0].values()]) < 14


@pytest.mark.parametrize("run", RUNS[1:])
def test_call_that_starts_inside_a_chunk_with_requests_remembered_and_too_little_room(run):
    """Chunk 5 is the first of this call: the request in chunk 3 is forgotten. Others are refused in order, candidates too."""
    data = problem(144, 56, heads=3, kv_heads=1, head_dim=24, seed=1)
    stamps = never(data)
    stamps[0, [5, 7, 9]] = [4, 3, 5]
    screen = Screen(stride=2, request_stride=1, spread=1.0, margin=0.5, capacity=7)
    _, refused = check(run, data, 5 * CHUNK + 3, 56, stamps, screen, capacity=6)
    assert refused > 0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("capacity", "stride"), [(64, 1), (5, 1), (64, 4)])
def test_votes_keep_pages_open(run, capacity, stride):
    """A call that starts inside a chunk. Chunk 4's votes keep page 5, not page 7; 6 and 9 have votes of the own chunk, 6 is open there."""
    data = problem(144, 70, heads=6, kv_heads=2, seed=5)
    touched, opened, cast = (np.full((2, 36), fill, np.int32) for fill in (-2, 0, 0))
    touched[:, [5, 6, 7, 9]], opened[:, [5, 6, 7, 9]], cast[:, [5, 6, 7, 9]] = [4, 5, 4, 5], [0, 1, 1, 0], [4, 1, 3, 3]
    stamps, votes = np.stack([touched, opened, cast]), Votes(4, 0.4, stride)
    expected, refused = check(run, data, 5 * CHUNK + 3, 61, stamps, None, capacity, 0.06, votes)
    first = 5 * CHUNK + 3
    assert all({5, 6} <= pages[first] for pages in expected)
    assert any(not {7, 9} <= pages[first] for pages in expected)
    assert (refused > 0) == (capacity == 5)


@pytest.mark.parametrize("run", RUNS[1:])
@pytest.mark.parametrize("candidates", [1, 64])
def test_candidates_with_and_without_room(run, candidates):
    """Rows that find more pages to score again than there is room for score all of them again: the same requests."""
    query, keys, sketched, pages = data = problem(112, 102, seed=4)
    few = dataclasses.replace(settings(run)["config"], candidates=candidates)
    rules = {"rule": rule_of(), "threshold": 0.03, "capacity": 64, **settings(run), "config": few}
    stamps = never(data)
    by_page = PageKeys(sketched, *page_statistics(sketched))
    call = jax.jit(functools.partial(route, **rules))
    lists = call(jnp.asarray(query), pages, by_page, jnp.asarray(stamps), jnp.int32(0), jnp.int32(102))
    by_token = np.asarray(sketched, np.float64).swapaxes(1, 2).reshape(keys.shape)
    expected, *_, closest = reference_route(
        query, keys, by_token, stamps, 0, 102, chunk_size=CHUNK, group_size=GROUP, sink_chunks=1, local_chunks=1, scale=0.25,
        threshold=0.03, capacity=64,
    )  # fmt: skip
    assert closest > 1e-5, "pick another seed: float32 may decide otherwise"
    assert listed(lists, 2, 0, 102) == expected


@pytest.mark.parametrize("screen", [None, SCREEN])
def test_no_query_sees_what_only_a_later_one_asked_for(screen):
    """Other queries from position 61 on leave what all before them see unchanged."""
    data = problem(112, 102, seed=3)
    before = listed(run_route("xla", data, 0, 102, never(data), screen), 2, 0, 61)
    query = data[0].copy()
    query[61:] = np.random.default_rng(9).standard_normal(query[61:].shape) * 3
    after = listed(run_route("xla", (query, *data[1:]), 0, 102, never(data), screen), 2, 0, 61)
    assert before == after


def by_pairs(keys, dims):
    """In float64: each key as its page's mean, but for the given coordinates."""
    pages = keys.reshape(len(keys), -1, GROUP, keys.shape[2]).astype(np.float64)
    means = np.broadcast_to(pages.mean(2, keepdims=True), pages.shape)
    keep = np.zeros((len(keys), 1, 1, keys.shape[2]), bool)
    for k, chosen in enumerate(np.asarray(dims)):
        keep[k, ..., chosen] = True
    return np.where(keep, pages, means).reshape(keys.shape)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("first", "heads", "kv_heads", "head_dim", "pairs", "votes"),
    [
        (0, 4, 2, 16, 2, Votes()),
        (5 * CHUNK + 3, 3, 1, 24, 5, Votes()),
        (7, 4, 2, 16, 3, Votes(3, 0.4)),
        (7, 4, 2, 16, 3, Votes(2, 0.4, 2)),
        (3, 4, 2, 16, 3, Votes(stride=4)),
        (3, 4, 2, 16, 3, Votes(1, 0.4, 4, 2)),
        (0, 4, 2, 16, 3, Votes(1, 0.4, 8, 4)),
    ],
)
def test_scan_by_rotary_pairs(run, first, heads, kv_heads, head_dim, pairs, votes):
    """A page counts as its mean key and, in the chosen pairs alone, its tokens' deviations from that."""
    query, keys, _, pages = data = problem(144, 144 - first, heads, kv_heads, head_dim, seed=2)
    dims = np.random.default_rng(0).permuted(np.tile(np.arange(head_dim // 2), (kv_heads, 1)), axis=1)[:, :pairs]
    dims = np.concatenate([dims, dims + head_dim // 2], axis=1)
    count, stamps = 140 - first, never(data)
    if votes.votes:
        stamps = np.stack([stamps, 0 * stamps, 0 * stamps])
    rule = dataclasses.replace(rule_of(head_dim), **votes._asdict())
    rules = {"rule": rule, "threshold": 0.03, "capacity": 64, **settings(run)}
    call = jax.jit(lambda q, p, d, *rest: route(q, p, pair_keys(p, Pairs(d, jnp.full(kv_heads, 0.5))), *rest, **rules))
    packed = stamp_of(*stamps, votes.votes) if votes.votes else stamps
    lists = call(jnp.asarray(query), pages, jnp.asarray(dims), jnp.asarray(packed), jnp.int32(first), jnp.int32(count))
    expected, after, _, unopened, closest = reference_route(
        query, keys, by_pairs(keys, dims), stamps, first, count, chunk_size=CHUNK, group_size=GROUP, sink_chunks=1, local_chunks=1,
        scale=head_dim**-0.5, threshold=0.03, capacity=64, **votes._asdict(),
    )  # fmt: skip
    assert closest > 1e-5, "pick another seed: float32 may decide otherwise"
    assert listed(lists, kv_heads, first, count) == expected
    assert 0 < np.mean([len(seen) for seen in expected[0].values()]) < 20
    np.testing.assert_array_equal(lists.stamps, stamp_of(*after, votes.votes) if votes.votes else after)
    np.testing.assert_allclose(lists.unopened, unopened, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kept", ["float8_e4m3fn", "float16"])
@pytest.mark.parametrize("large", [1.0, 40.0])
def test_pairs_in_eight_bits(run, kept, large):
    """Queries and deviations are rounded to e4m3 and their products added up in float16: nearly the pages that float64 opens for rounded
    numbers, and few others than for those that are not, whatever the sizes of queries and keys.
    """
    query, keys, _, pages = data = problem(288, 288, seed=6, dtype=jnp.bfloat16)
    query, dims = (query / large).astype(query.dtype), np.array([[0, 3, 8, 11], [2, 5, 10, 13]])
    pages, keys = pages.at[:, :, 0].multiply(large), keys * np.asarray(large, keys.dtype)
    rules = {"rule": rule_of(), "threshold": 0.03, "capacity": 72, **settings(run)}
    pairs = Pairs(jnp.asarray(dims), jnp.full(2, 2.0 ** np.round(np.log2(large))))
    call = jax.jit(lambda q, p, d, *rest: route(q, p, pair_keys(p, d, jnp.dtype(kept)), *rest, **rules))
    lists = call(jnp.asarray(query), pages, pairs, jnp.asarray(never(data)), jnp.int32(0), jnp.int32(288))
    assert pair_keys(pages, pairs, jnp.dtype(kept)).tokens.dtype == kept

    def opened(lists):
        return {(k, t, page) for k, rows in enumerate(lists) for t, some in rows.items() for page in some}

    def expected(query, sketched):
        rest = {"chunk_size": CHUNK, "group_size": GROUP, "sink_chunks": 1, "local_chunks": 1, "scale": 0.25}
        exact = np.concatenate([np.asarray(keys, np.float64), np.zeros((*keys.shape[:2], query.shape[2] - keys.shape[2]))], axis=2)
        return opened(reference_route(query, exact, sketched, never(data), 0, 288, **rest, threshold=0.03, capacity=72)[0])

    # The rounded products stand beside those with the means, in coordinates of their own.
    unit, wide_query, by_page = 0.25 * np.log2(np.e), np.asarray(query, np.float64), np.asarray(keys, np.float64).reshape(2, -1, GROUP, 16)
    means = np.asarray(by_page.mean(2, keepdims=True).astype(np.float32).astype(keys.dtype), np.float64)
    few = np.stack([wide_query[:, n, dims[n // 2]] for n in range(4)], axis=1) * unit * np.asarray(pairs.factors)[0]
    deviations = np.stack([(by_page - means)[k][..., dims[k]] for k in range(2)]) / np.asarray(pairs.factors)[0]
    few, deviations = (x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for x in (few, deviations))
    rounded = expected(
        np.concatenate([wide_query, few / unit], axis=2),
        np.concatenate([np.broadcast_to(means, by_page.shape), deviations], axis=3).reshape(2, 288, -1),
    )
    found, unrounded = opened(listed(lists, 2, 0, 288)), expected(wide_query, by_pairs(keys, dims))
    assert len(unrounded) > 1000
    assert len(found ^ rounded) <= 0.02 * len(rounded), (len(found - rounded), len(rounded - found), len(rounded))
    assert len(found ^ unrounded) <= 0.1 * len(unrounded), (len(found - unrounded), len(unrounded - found), len(unrounded))


def test_pairs_are_chosen_by_the_energies_of_the_first_queries_and_keys():
    """Calls that begin and end anywhere add up to the same energies; what lies behind the first positions counts for nothing."""
    rng = np.random.default_rng(5)
    query, keys = rng.standard_normal((100, 6, 16)), rng.standard_normal((2, 100, 16))
    query, keys = query * rng.uniform(0.1, 3, 16), keys * rng.uniform(0.1, 3, (2, 1, 16)) + 20
    query[64:], keys[:, 64:] = 1e3 * rng.standard_normal((36, 6, 16)), 1e3 * rng.standard_normal((2, 36, 16))
    squares = (query[:64].reshape(64, 2, 3, 2, 8) ** 2).sum((0, 2, 3))
    calls = ((0, 20, 20), (20, 30, 64), (50, 50, 50))  # first position, live, rows
    energy = sum(
        query_energy(jnp.asarray(np.resize(query[a:], (n, 6, 16)), jnp.float32), 2, jnp.int32(a), jnp.int32(c), 64) for a, c, n in calls
    )
    np.testing.assert_allclose(energy, squares, rtol=1e-5)
    pages = keys.reshape(2, 25, GROUP, 16)
    off = pages - pages.mean(2, keepdims=True)
    products = squares * (off[:, :16].reshape(2, 16, GROUP, 2, 8) ** 2).sum((1, 2, 3))
    best = np.sort(np.argsort(-products, axis=1)[:, :3], axis=1)
    pairs = choose_pairs(energy, jnp.asarray(np.stack([pages, pages], axis=2), jnp.float32), 16, 3, 3, 0.25)
    np.testing.assert_array_equal(pairs.dims, np.concatenate([best, best + 8], axis=1))
    # With the factors queries and deviations are of one size there, but for what powers of two leave.
    for k, dims in enumerate(np.asarray(pairs.dims)):
        asked = np.sqrt(np.mean((query[:64, 3 * k : 3 * k + 3, dims] * 0.25 * np.log2(np.e)) ** 2)) * pairs.factors[k]
        held = np.sqrt(np.mean(off[k, :16][..., dims] ** 2)) / pairs.factors[k]
        assert 0.5 <= asked / held <= 2


@pytest.mark.parametrize(("rows", "pages"), [(128, 64), (16, 32), (256, 64), (64, 16)])
def test_pages_that_some_row_asks_for(rows, pages):
    """From nobody to all rows."""
    asking = np.random.default_rng(0).random((rows, pages)) < 2 / rows
    asking[:, [1, pages - 1]], asking[:, 8] = True, False
    np.testing.assert_array_equal(how_many(jnp.asarray(asking)), asking.sum(0))
    assert 0.2 < asking.any(0).mean() < 1


def test_sketched_keys_are_what_the_sketches_say():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 64, 24)).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((24, 24)))[0].astype(np.float32)
    means, codes, scales = sketch_chunks(jnp.asarray(keys), jnp.asarray(rotation), CHUNK)
    made = np.asarray(sketched_keys(means, codes, scales, jnp.asarray(rotation), GROUP)).swapaxes(1, 2).reshape(keys.shape)
    levels = np.array([-1.5104, -0.4528, 0.4528, 1.5104])
    fields = np.concatenate([np.asarray(codes) >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    wanted = np.repeat(means, CHUNK, axis=1) + np.asarray(scales)[..., None] * (levels[fields] @ rotation.T.astype(np.float64))
    np.testing.assert_allclose(made, wanted, atol=1e-5)
    assert np.mean((made - keys) ** 2) < 0.15 * np.mean(keys**2)  # a 2-bit quantiser of a Gaussian leaves 0.1175
    mean, spread = page_statistics(jnp.asarray(made.reshape(2, -1, GROUP, 24).swapaxes(1, 2)))
    parts = made.reshape(2, -1, GROUP, 24)
    np.testing.assert_allclose(mean[:, 0], parts.mean(2), atol=1e-5)
    np.testing.assert_allclose(spread, np.sqrt(parts.var(2).mean(-1)), rtol=1e-4)


NATIVE = pytest.mark.gpu


@pytest.mark.parametrize(
    ("interpret", "head_dim", "dtype"),
    [(True, 24, np.float32), pytest.param(False, 24, np.float32, marks=NATIVE), pytest.param(False, 80, jnp.bfloat16, marks=NATIVE)],
)
def test_sketch_kernels(interpret, head_dim, dtype):
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((2, 96, head_dim)) + 1, dtype)
    rotation = jnp.asarray(np.linalg.qr(rng.standard_normal((head_dim, head_dim)))[0], jnp.float32)
    pages = jnp.stack([keys, keys * 0], axis=1).reshape(2, 2, -1, GROUP, head_dim).swapaxes(1, 2)
    told = told_coordinates(keys[:, : 2 * CHUNK], CHUNK, head_dim // 4)
    expected = key_sketches(keys, told, CHUNK, rotation)
    means, codes, scales = expected.means, expected.codes, expected.scales
    blank = tuple(jnp.full_like(x, 3) for x in (means, codes, scales))
    made = sketch_pages(pages, *blank, told, rotation, jnp.int32(1), jnp.int32(5), 6, interpret=interpret)
    for new, expected in zip(made, (means, codes, scales), strict=True):
        per_chunk = expected.shape[1] // 6
        touched = slice(per_chunk, 5 * per_chunk)
        np.testing.assert_array_equal(new[:, :per_chunk], 3)
        np.testing.assert_array_equal(new[:, 5 * per_chunk :], 3)
        if expected.dtype == jnp.uint8:  # a coordinate on a threshold may fall on either side
            assert np.mean(np.asarray(new[:, touched]) != np.asarray(expected[:, touched])) < (0 if dtype == np.float32 else 0.02) + 1e-9
        else:
            wide = (np.asarray(x[:, touched], np.float32) for x in (new, expected))
            np.testing.assert_allclose(*wide, rtol=1e-5 if dtype == np.float32 else 2e-2, atol=1e-5)
    sketched = sketched_keys(means, codes, scales, rotation, GROUP)
    expected = (sketched, *page_statistics(sketched))
    for new, old in zip(unsketch(means, codes, scales, rotation, GROUP, jnp.int32(6), interpret=interpret), expected, strict=True):
        wide = (np.asarray(x, np.float32) for x in (new, old))
        np.testing.assert_allclose(*wide, rtol=1e-5 if dtype == np.float32 else 2e-2, atol=1e-5 if dtype == np.float32 else 3e-2)
