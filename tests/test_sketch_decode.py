"""Selection, attention through a bank and merge in one launch: kernel and XLA twin against float64 numpy and a bank kept by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import routed_decode_attention as attention
from pallas_kernels import sketch_decode as decode
from pallas_kernels import sketch_routing as routing
from pallas_kernels.routed_decode_attention.reference import reference_attention

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]
KV_HEADS, HEADS, HEAD_DIM, GROUP, PAGES = 2, 3, 64, 8, 200


def settings(run):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    config = {"config": attention.Config(selected_tile_pages=2, window_splits=2), "scan_config": routing.Config(select_pages=16)}
    return {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret"}, config


def asked_for(wanted, heads):
    """Scores under which each wanted page has the same share of nearly all the mass."""
    scores = np.full((KV_HEADS, PAGES, 8), -50.0, np.float32)
    for k, pages in enumerate(wanted):
        scores[k, pages, :heads] = 0
    totals = np.array([max(len(pages), 1) for pages in wanted], np.float32)
    partials = np.stack([np.zeros((KV_HEADS, 8)), np.repeat(totals[:, None], 8, axis=1)], axis=1)[:, None].astype(np.float32)
    return routing.Scores(jnp.asarray(scores), jnp.asarray(partials))


def the_bank_by_hand(held, visible, recency, now, parts):
    """slot -> page after a token, and how many pages were found: what attend_selected's docstring says, one part at a time."""
    after, hits = held.copy(), 0
    for part in range(parts):
        slots = range(part * len(held) // parts, (part + 1) * len(held) // parts)
        listed = [page for page in visible if page % parts == part]
        missing = [page for page in listed if page not in held[list(slots)]]
        hits += len(listed) - len(missing)
        free = [slot for slot in slots if held[slot] < 0 or recency[held[slot]] < now - 1]
        oldest = sorted(free, key=lambda slot: -99 if held[slot] < 0 else recency[held[slot]])[: len(missing)]
        for page, slot in zip(missing, sorted(oldest), strict=False):
            after[slot] = page
    return after, hits


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("slots", [None, 5, 40, 96])
def test_twelve_tokens_of_drifting_requests(run, slots):
    """Outputs exact, stamps those of the pages asked for, the bank's tables as kept by hand and its pages the store's (on a GPU in pinned
    host memory)."""
    how, config = settings(run)
    rng = np.random.default_rng(5)
    history = rng.standard_normal((KV_HEADS, PAGES, 2, GROUP, HEAD_DIM)).astype(np.float32)
    store = jnp.asarray(history)
    if run == "native" and slots is not None:
        store = jax.device_put(store, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    window = jnp.asarray(rng.standard_normal((KV_HEADS, 3, 2, GROUP, HEAD_DIM)), jnp.float32)
    valid = np.array([GROUP, 0, 3], np.int32)
    stamps, bank, held = jnp.full((KV_HEADS, PAGES), -2, jnp.int32), None, None
    if slots is not None:
        tables = jnp.full((KV_HEADS, PAGES), -1, jnp.int32), jnp.full((KV_HEADS, slots), -1, jnp.int32)
        bank, held = attention.Bank(jnp.zeros((KV_HEADS, slots, 2, GROUP, HEAD_DIM)), *tables), np.full((KV_HEADS, slots), -1)
    parts, _ = routing.list_shape(PAGES, PAGES)

    @jax.jit
    def token(query, scores, windows, stamps, middle, store, bank):
        scanned = decode.Scanned(scores, windows, jnp.zeros(KV_HEADS, jnp.int32))
        rules = {"pages_per_chunk": 2, "threshold": 1e-4, "capacity": PAGES, "scale": 0.125}
        return decode.attend_selected(query, scanned, stamps, middle, store, bank=bank, **rules, **how, **config)

    expected_stamps, evictions, total = np.full((KV_HEADS, PAGES), -2), 0, 0
    for now in range(60, 72):
        query = jnp.asarray(rng.standard_normal((KV_HEADS, HEADS, HEAD_DIM)), jnp.float32)
        first = 4 * (now - 60)
        wanted = [np.sort(rng.permutation(np.arange(first, first + 60))[: rng.integers(0, 30)]) for _ in range(KV_HEADS)]
        windows = attention.window_attention(query, window, jnp.asarray(valid), scale=0.125, config=config["config"], **how)
        middle = routing.middle_of(jnp.int32(now), jnp.int32(now), 0, 1)
        out = token(query, asked_for(wanted, HEADS), windows, stamps, middle, store, bank)
        stamps, bank = out.stamps, out.bank
        visible = []
        for k in range(KV_HEADS):
            seen = [page for page in range(PAGES) if page < 2 * (now - 1) and expected_stamps[k, page] >= now - 1]
            expected_stamps[k, wanted[k]] = now
            visible.append(sorted({*seen, *wanted[k].tolist()}))
        np.testing.assert_array_equal(stamps, expected_stamps)
        np.testing.assert_array_equal(out.counts[..., 0].sum(1), [len(pages) for pages in visible])
        expected = reference_attention(query, window, valid, history, visible, None, 0.125)
        np.testing.assert_allclose(out.out, expected, atol=1e-5)
        for k in range(KV_HEADS if slots is not None else 0):
            after, hits = the_bank_by_hand(held[k], visible[k], expected_stamps[k], now, parts)
            evictions += int(((held[k] >= 0) & (after != held[k])).sum())
            held[k], total = after, total + hits
            np.testing.assert_array_equal(bank.slot_page[k], after)
            assert int(out.hits[k].sum()) == hits
            page_slot = np.full(PAGES, -1)
            page_slot[after[after >= 0]] = np.nonzero(after >= 0)[0]
            np.testing.assert_array_equal(bank.page_slot[k], page_slot)
            np.testing.assert_array_equal(bank.pages[k, after >= 0], history[k, after[after >= 0]])
    assert slots is None or (evictions and (total or slots < 40))


@pytest.mark.parametrize("run", RUNS[1:])
def test_who_merges_sees_what_all_programs_wrote(run):
    """Many launches in one program, each with its own queries and in the buffers of the one before: the same as merging in a launch of its
    own, where the launches' order says what is seen. A program that merged too early would find another query's partial results."""
    how, _ = settings(run)
    kv_heads, heads, head_dim, pages = 4, 16, 128, 512  # heads enough that they are merged in two turns
    launches = 400 if run == "native" else 2
    keys = jax.random.split(jax.random.key(0), 3)
    store = jax.random.normal(keys[0], (kv_heads, pages, 2, 16, head_dim))
    queries = jax.random.normal(keys[1], (launches, kv_heads, heads, head_dim))
    scores = jnp.where(jax.random.uniform(keys[2], (launches, kv_heads, pages, 1)) < 0.15, 0.0, -50.0) * jnp.ones(heads)
    totals = jnp.zeros((kv_heads, 1, 2, heads)).at[:, :, 1].set(80)
    stamps, middle = jnp.full((kv_heads, pages), -2, jnp.int32), routing.middle_of(jnp.int32(200), jnp.int32(200), 0, 1)

    def one(given, config):
        query, score = given
        windows = attention.window_attention(query, store[:, :3], jnp.full(3, 16, jnp.int32), scale=0.1, config=config, **how)
        scanned = decode.Scanned(routing.Scores(score, totals), windows, jnp.zeros(kv_heads, jnp.int32))
        rules = {"pages_per_chunk": 4, "threshold": 1e-4, "capacity": pages, "scale": 0.1}
        return decode.attend_selected(query, scanned, stamps, middle, store, config=config, **rules, **how).out

    configs = [attention.Config(window_splits=2, merge_in_launch=inside) for inside in (True, False)]
    inside, after = (jax.jit(lambda *given, config=config: jax.lax.map(partial(one, config=config), given)) for config in configs)
    found, expected = np.asarray(inside(queries, scores)), np.asarray(after(queries, scores))
    assert np.abs(expected).mean() > 0.02  # one of 32 partial results being another's would change about a hundredth of that
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found, inside(queries, scores))
