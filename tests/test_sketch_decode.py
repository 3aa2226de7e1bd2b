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
from pallas_kernels.votes import stamp_of

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]
KV_HEADS, HEADS, HEAD_DIM, GROUP, PAGES = 2, 3, 64, 8, 200


def settings(run):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    config = {"config": attention.Config(selected_tile_pages=2, window_splits=2), "scan_config": routing.Config(select_pages=16)}
    return {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret"}, config


THRESHOLD, VOTE_SHARE = 0.01, 0.1
SCANNED = 30.0  # sum of exp(score) that the scan is said to have found


def scores_of_a_token(rng, first):
    """Of up to half of 60 pages; three tenths of them are requested by a head, more than half get its vote."""
    scores = np.full((KV_HEADS, PAGES, 8), -50.0, np.float32)
    for k in range(KV_HEADS):
        pages = rng.permutation(np.arange(first, first + 60))[: rng.integers(0, 30)]
        scores[k, pages, :HEADS] = rng.uniform(-4, 1, (len(pages), HEADS))
    partials = np.stack([np.zeros((KV_HEADS, 8)), np.full((KV_HEADS, 8), SCANNED)], axis=1)[:, None]
    return scores, routing.Scores(jnp.asarray(scores), jnp.asarray(partials, jnp.float32))


class PagesByHand:
    """What a kv head knows of its pages: the chunk in which each was last requested (votes=0) or got votes, whether it was open there, how
    many votes it got. Says what a token sees by the rule in sketch_routing's docstring."""

    def __init__(self, votes, parts, room):
        self.votes, self.parts, self.room = votes, parts, room
        self.chunk, self.opened, self.cast = np.full(PAGES, -2), np.zeros(PAGES, int), np.zeros(PAGES, int)

    def token(self, now, shares, voting):
        """(listed, open, refused) of a token that gives shares [heads, P] of its mass to the pages."""
        for share in (THRESHOLD, THRESHOLD * VOTE_SHARE):
            assert not (np.abs(shares / share - 1) < 1e-4).any(), "pick another seed"
        wanted, cast = (shares >= THRESHOLD).any(0), voting * (shares >= THRESHOLD * VOTE_SHARE).sum(0)
        kept = (self.chunk == now - 1) & (self.cast >= self.votes)
        seen = kept | (self.chunk == now) & (self.opened > 0) if self.votes else self.chunk >= now - 1
        listed, opened = [], seen.copy()
        for part in range(self.parts):
            mine = np.arange(part, PAGES, self.parts)
            granted = mine[(wanted & ~seen)[mine]][: max(self.room - seen[mine].sum(), 0)]
            opened[granted] = True
            listed += [*mine[seen[mine]][: self.room], *granted]
        refused = (wanted & ~opened).sum()
        if self.votes:
            touched = (cast > 0) | opened & ~seen
            self.cast = np.where(touched, cast + np.where(self.chunk == now, self.cast, 0), self.cast)
            self.opened = np.where(touched, opened, self.opened)
        else:
            touched = wanted & opened
        self.chunk[touched] = now
        return sorted(listed), opened, refused

    def stamps(self):
        return np.asarray(stamp_of(self.chunk, self.opened, self.cast, self.votes)) if self.votes else self.chunk


def the_bank_by_hand(held, listed, known, now):
    """slot -> page after a token, and how many pages were found: what attend_selected's docstring says, one part at a time."""
    after, hits = held.copy(), 0
    for part in range(known.parts):
        slots = range(part * len(held) // known.parts, (part + 1) * len(held) // known.parts)
        mine = [page for page in listed if page % known.parts == part]
        missing = [page for page in mine if page not in held[list(slots)]]
        hits += len(mine) - len(missing)
        free = [slot for slot in slots if held[slot] < 0 or known.chunk[held[slot]] < now - 1]
        recency = {slot: tuple(x[held[slot]] for x in (known.chunk, known.opened, known.cast)) for slot in free if held[slot] >= 0}
        oldest = sorted(free, key=lambda slot: recency.get(slot, (-99,)))[: len(missing)]
        for page, slot in zip(missing, sorted(oldest), strict=False):
            after[slot] = page
    return after, hits


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("slots", [None, 5, 40, 96])
@pytest.mark.parametrize(("votes", "capacity"), [(0, PAGES), (4, PAGES), (4, 16)])
def test_twelve_tokens_of_drifting_requests(run, slots, votes, capacity):
    """Outputs exact, stamps and figures those of the pages by hand, the bank's tables as kept by hand and its pages the store's (on a GPU
    in pinned host memory). Under votes a chunk has three tokens, of which not all vote; with a capacity of 16 a part may list one page."""
    how, config = settings(run)
    rng = np.random.default_rng(5)
    history = rng.standard_normal((KV_HEADS, PAGES, 2, GROUP, HEAD_DIM)).astype(np.float32)
    store = jnp.asarray(history)
    if run == "native" and slots is not None:
        store = jax.device_put(store, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))
    window = rng.standard_normal((KV_HEADS, 3, 2, GROUP, HEAD_DIM)).astype(np.float32)
    valid = np.array([GROUP, 0, 3], np.int32)
    known = [PagesByHand(votes, *routing.list_shape(PAGES, capacity)) for _ in range(KV_HEADS)]
    stamps, bank, held = jnp.asarray(np.stack([one.stamps() for one in known]), jnp.int32), None, None
    if slots is not None:
        tables = jnp.full((KV_HEADS, PAGES), -1, jnp.int32), jnp.full((KV_HEADS, slots), -1, jnp.int32)
        bank, held = attention.Bank(jnp.zeros((KV_HEADS, slots, 2, GROUP, HEAD_DIM)), *tables), np.full((KV_HEADS, slots), -1)

    @jax.jit
    def token(query, scores, stamps, middle, bank):
        windows = attention.window_attention(query, jnp.asarray(window), jnp.asarray(valid), scale=0.125, config=config["config"], **how)
        scanned = decode.Scanned(scores, windows, jnp.zeros(KV_HEADS, jnp.int32))
        rules = {"pages_per_chunk": 2, "threshold": THRESHOLD, "capacity": capacity, "votes": votes, "vote_share": VOTE_SHARE}
        return decode.attend_selected(query, scanned, stamps, middle, store, bank=bank, scale=0.125, **rules, **how, **config)

    chunks = np.repeat(np.arange(90, 94), 3) if votes else np.arange(90, 102)
    evictions, found, refusals, unlisted = 0, 0, 0, 0
    for t, (now, after) in enumerate(zip(chunks, [*chunks[1:], chunks[-1]], strict=True)):
        query = rng.standard_normal((KV_HEADS, HEADS, HEAD_DIM)).astype(np.float32)
        scores, given = scores_of_a_token(rng, 9 * t)
        out = token(jnp.asarray(query), given, stamps, routing.middle_of(jnp.int32(now), jnp.int32(after), 0, 1, t % 6 != 4), bank)
        stamps, bank = out.stamps, out.bank
        keys = np.concatenate([window[:, w, 0, :count] for w, count in enumerate(valid)], axis=1).astype(np.float64)
        masses = SCANNED + np.exp(np.einsum("kgh,kth->kgt", query, keys) * 0.125).sum(-1)
        shares = np.exp(scores[:, :, :HEADS].astype(np.float64)).swapaxes(1, 2) / masses[..., None]
        seen = [one.token(now, shares[k], t % 6 != 4) for k, one in enumerate(known)]
        listed = [pages for pages, _, _ in seen]
        np.testing.assert_array_equal(stamps, np.stack([one.stamps() for one in known]))
        np.testing.assert_array_equal(out.counts.sum(1), [[len(pages), refused] for pages, _, refused in seen])
        for k, (pages, opened, refused) in enumerate(seen):
            np.testing.assert_allclose(out.unopened[k].sum(0), shares[k][:, ~opened].sum(1), atol=1e-6)
            refusals, unlisted = refusals + refused, unlisted + opened.sum() - len(pages)
        np.testing.assert_allclose(out.out, reference_attention(query, window, valid, history, listed, None, 0.125), atol=1e-5)
        for k in range(KV_HEADS if slots is not None else 0):
            kept, hits = the_bank_by_hand(held[k], listed[k], known[k], now)
            evictions += int(((held[k] >= 0) & (kept != held[k])).sum())
            held[k], found = kept, found + hits
            np.testing.assert_array_equal(bank.slot_page[k], kept)
            assert int(out.hits[k].sum()) == hits
            page_slot = np.full(PAGES, -1)
            page_slot[kept[kept >= 0]] = np.nonzero(kept >= 0)[0]
            np.testing.assert_array_equal(bank.page_slot[k], page_slot)
            np.testing.assert_array_equal(bank.pages[k, kept >= 0], history[k, kept[kept >= 0]])
    assert slots is None or (slots == 96 and capacity < PAGES) or evictions
    assert slots is None or slots < 40 or found
    assert (refusals > 0, unlisted > 0) == (capacity < PAGES, capacity < PAGES)


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
