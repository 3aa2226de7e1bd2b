"""The same routing in plain XLA, block by block: any device, any sizes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sketch_prefill_routing.config import Rule
from pallas_kernels.sketch_prefill_routing.keys import PageKeys
from pallas_kernels.votes import is_open


def _rows(query: Float[Array, "T N H"], bounds: Int[Array, " 2"], block: Int[Array, ""], kv_heads: int, rule: Rule):
    """The probing rows of a block: queries [K, r, H], positions, offsets in the chunk and whether they are live, [r] each."""
    ratio = query.shape[1] // kv_heads
    row = jnp.arange(rule.probes * ratio)
    offset = row // ratio * rule.stride
    position = (bounds[0] // rule.chunk_size + block) * rule.chunk_size + offset
    index = position - bounds[0]
    live = (index >= 0) & (index < bounds[1])
    by_head = query.reshape(query.shape[0], kv_heads, ratio, -1)
    rows = by_head[jnp.where(live, index, 0), :, row % ratio].swapaxes(0, 1)  # [K, r, H]
    return jnp.where(live[:, None], rows, 0), position, offset, live


def _products(rows: Float[Array, "K r H"], keys: Float[Array, "K *n H"]) -> Float[Array, "K r *n"]:
    return jnp.einsum("krh,k...h->kr...", rows, keys, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _page_scores(
    rows: Float[Array, "K r H"],
    keys: Float[Array, "K parts n d"],
    spreads: Float[Array, "K n"] | None,
    rule: Rule,
    few: Float[Array, "K r d"] | None = None,
    means: Float[Array, "K n H"] | None = None,
) -> Float[Array, "K r n"]:
    """few: the rows' coordinates that keys have, scaled for powers of two; then means hold the rest."""
    if few is not None:
        wide = few.astype(jnp.float32), keys.astype(jnp.float32)
        return _products(*wide).max(2) * math.log(2) + _products(rows, means) * rule.scale
    best = _products(rows, keys).max(2)
    if spreads is not None:
        norm = jnp.sqrt(jnp.sum(rows.astype(jnp.float32) ** 2, axis=-1))
        best += rule.spread * norm[..., None] * spreads[:, None]
    return best * rule.scale


def middle(bounds: Int[Array, " 2"], block: Int[Array, "*n"], pages: int, rule: Rule) -> Bool[Array, "*n P"]:
    """Which pages lie in the routed middle of a block."""
    own = bounds[0] // rule.chunk_size + block
    chunk = jnp.arange(pages) // rule.pages_per_chunk
    return (chunk >= rule.sink_chunks) & (chunk < jnp.asarray(own - rule.local_chunks)[..., None])


def _window_mass(
    rows: Float[Array, "K r H"], position: Int[Array, " r"], bounds: Int[Array, " 2"], block: Int[Array, ""], pages: Array, rule: Rule
) -> Float[Array, "K r"]:
    """Log of the summed exponentials of the rows' exact scores over sinks, local window and own chunk."""
    kv_heads, count = pages.shape[:2]
    own = bounds[0] // rule.chunk_size + block
    local = jnp.maximum(own - rule.local_chunks, 0)
    chunks = jnp.concatenate([jnp.arange(rule.sink_chunks), local + jnp.arange(rule.local_chunks + 1)])
    used = jnp.where(jnp.arange(len(chunks)) < rule.sink_chunks, chunks < local, chunks <= own)
    page = (chunks[:, None] * rule.pages_per_chunk + jnp.arange(rule.pages_per_chunk)).reshape(-1)
    token = (page[:, None] * rule.group_size + jnp.arange(rule.group_size)).reshape(-1)
    near = pages[:, jnp.clip(page, 0, count - 1), 0].reshape(kv_heads, len(token), -1)
    seen = jnp.repeat(used, rule.chunk_size) & (token <= position[:, None])
    return jax.nn.logsumexp(jnp.where(seen, _products(rows, near) * rule.scale, -jnp.inf), axis=-1)


def _masses(query, bounds, pages, scores_of, rule: Rule) -> tuple[Float[Array, "K B r"], Float[Array, "K B r"]]:
    """Of the windows, and of those and all pages of the routed middle. scores_of: (rows, their block) -> scores of all pages."""
    kv_heads, count = pages.shape[:2]

    def one(block: Int[Array, ""]) -> tuple[Array, Array]:
        rows, position, _, _ = _rows(query, bounds, block, kv_heads, rule)
        window = _window_mass(rows, position, bounds, block, pages, rule)
        scores = jnp.where(middle(bounds, block, count, rule), scores_of(rows, block), -jnp.inf)
        return window, jnp.logaddexp(window, jax.nn.logsumexp(scores, axis=-1))

    window, mass = lax.map(one, jnp.arange(rule.blocks(query.shape[0])))
    return window.swapaxes(0, 1), mass.swapaxes(0, 1)


def scan(query, bounds, pages, keys, few=None, means=None, *, threshold: float, rule: Rule):
    """See scan.scan; everything is written."""
    scores_of = _token_scores(keys, few, means, bounds, rule)
    window, mass = _masses(query, bounds, pages, scores_of, rule)
    return window, mass, _requests(query, bounds, len(keys), scores_of, mass, threshold, rule)


def _token_scores(keys, few, means, bounds, rule: Rule):
    """(rows, their block) -> scores of all pages by their tokens."""
    return lambda rows, block: _page_scores(rows, keys, None, rule, *_few(few, means, bounds, block, rule))


def _few(few, means, bounds, block, rule: Rule) -> tuple[Array, Array] | tuple[None, None]:
    """A block's rows in few coordinates, and the pages' means."""
    return (None, None) if few is None else (_rows(few, bounds, block, len(means), rule)[0], means[:, 0])


def probe_mass(query, bounds, pages, means, spreads, *, threshold: float, rule: Rule):
    """See kernel.probe_mass; everything is written."""

    def scores_of(rows: Array, _: Array) -> Array:
        return _page_scores(rows, means, spreads, rule)

    window, mass = _masses(query, bounds, pages, scores_of, rule)
    return window, mass, _requests(query, bounds, len(means), scores_of, window, threshold, rule)


def votes(query, bounds, keys, mass, few=None, means=None, *, threshold: float, rule: Rule) -> Int[Array, "K B 1 P"]:
    """See scan.votes; everything is written."""
    scores_of = _token_scores(keys, few, means, bounds, rule)

    def one(block: Int[Array, ""]) -> Array:
        return jnp.sum(_reaching(query, bounds, len(keys), scores_of, mass, threshold, rule, block)[0], axis=1)

    return lax.map(one, jnp.arange(mass.shape[1])).swapaxes(0, 1)[:, :, None]


def _requests(query, bounds, kv_heads: int, scores_of, mass, threshold: float, rule: Rule) -> Int[Array, "K B 1 P"]:

    def one(block: Int[Array, ""]) -> Array:
        reached, offset = _reaching(query, bounds, kv_heads, scores_of, mass, threshold, rule, block)
        return jnp.min(jnp.where(reached, offset[:, None], rule.chunk_size), axis=1)

    return lax.map(one, jnp.arange(mass.shape[1])).swapaxes(0, 1)[:, :, None]


def _reaching(
    query, bounds, kv_heads: int, scores_of, mass, threshold: float, rule: Rule, block: Int[Array, ""]
) -> tuple[Bool[Array, "K r P"], Int[Array, " r"]]:
    """Which pages of the routed middle have the threshold's share of the mass of each probing row of a block, and the rows' offsets."""
    rows, _, offset, live = _rows(query, bounds, block, kv_heads, rule)
    scores = scores_of(rows, block)
    scores = jnp.where(middle(bounds, block, scores.shape[2], rule), scores, -jnp.inf)
    return live[:, None] & (scores >= (mass[:, block] + math.log(threshold))[..., None]), offset


def _listed(query, bounds, block, keys, spreads, ids, since, counts, rule: Rule, few=None, means=None):
    """Scores [K, r, M] of a block's listed pages, which rows see them, row offsets, liveness."""
    rows, _, offset, live = _rows(query, bounds, block, keys.shape[0], rule)
    there = jnp.arange(ids.shape[2]) < counts[:, block, None]
    page = jnp.where(there, ids[:, block], 0)
    listed = jax.vmap(lambda keys, page: keys[:, page])(keys, page)
    spread = None if spreads is None else jnp.take_along_axis(spreads, page, axis=1)
    seen = there[:, None] & (since[:, block][:, None] <= offset[:, None])
    few, means = _few(few, means, bounds, block, rule)
    if means is not None:
        means = jax.vmap(lambda means, page: means[page])(means, page)
    return _page_scores(rows, listed, spread, rule, few, means), seen, there, page, offset, live


def refine(query, bounds, pages, keys: PageKeys, ids, since, counts, *, threshold: float, rule: Rule) -> Int[Array, "K B 1 P"]:
    """See kernel.refine."""

    def one(block: Int[Array, ""]) -> Array:
        cheap, seen, *_ = _listed(query, bounds, block, keys.means, keys.spreads, ids, since, counts, rule)
        scores, _, there, page, offset, live = _listed(query, bounds, block, keys.tokens, None, ids, since, counts, rule)
        rows, position, _, _ = _rows(query, bounds, block, len(pages), rule)
        window = _window_mass(rows, position, bounds, block, pages, rule)
        mass = jnp.logaddexp(window, jax.nn.logsumexp(jnp.where(seen, cheap, -jnp.inf), axis=-1))
        asking = seen & live[:, None] & (scores >= (mass + math.log(threshold))[..., None])
        first = jnp.min(jnp.where(asking, offset[:, None], rule.chunk_size), axis=1)
        page = jnp.where(there, page, keys.tokens.shape[2])
        none = jnp.full((keys.tokens.shape[2],), rule.chunk_size)
        return jax.vmap(lambda page, first: none.at[page].set(first, mode="drop"))(page, first)

    return lax.map(one, jnp.arange(counts.shape[1])).swapaxes(0, 1)[:, :, None]


def listed_mass(query, bounds, keys, spreads, mass, ids, since, counts, few=None, means=None, *, rule: Rule) -> Float[Array, "K B r"]:
    """See kernel.listed_mass."""

    def one(block: Int[Array, ""]) -> Array:
        scores, seen, *_ = _listed(query, bounds, block, keys, spreads, ids, since, counts, rule, few, means)
        return jnp.where(seen, jnp.exp(scores - mass[:, block, :, None]), 0).sum(-1)

    return lax.map(one, jnp.arange(mass.shape[1])).swapaxes(0, 1)


def _list(carried: Bool[Array, "K P"], first: Int[Array, "K P"], capacity: int, none: int):
    """(ids, since, [listed, refused], which pages are listed): carried pages first, then by row, then by page id."""
    since = jnp.where(carried, 0, first)
    wanted = since < none
    order = jnp.argsort(jnp.where(carried, -1, first), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    taken = wanted & (rank < capacity)
    slot = jnp.where(taken, jnp.cumsum(taken, axis=-1) - 1, capacity)
    page = jnp.broadcast_to(jnp.arange(first.shape[1]), first.shape)
    put = jax.vmap(lambda slot, value: jnp.zeros((capacity,), jnp.int32).at[slot].set(value, mode="drop"))
    counts = jnp.stack([taken.sum(-1), (wanted & ~taken).sum(-1)], axis=-1).astype(jnp.int32)
    return put(slot, page), put(slot, since), counts, taken


def page_lists(
    first: Int[Array, "K B tiles P"], stamps: Int[Array, "K P"], bounds, *, capacity: int, rule: Rule, votes: Array | None = None
):
    """See lists.page_lists."""
    none = rule.chunk_size
    asked = first_asked(first, jnp.arange(first.shape[1]), bounds, rule)
    kept = None if votes is None else kept_open(votes, stamps, bounds, rule)

    def one(block: Int[Array, ""]) -> tuple[Array, Array, Array]:
        if kept is None:
            before = (block > 0) & (asked[:, jnp.maximum(block - 1, 0)] < none)
            carried = before | (stamps >= bounds[0] // rule.chunk_size + block - 1)
        else:
            carried = kept[:, block]
        live = _block_live(bounds, block, rule)
        return _list(carried & live, jnp.where(live, asked[:, block], none), capacity, none)[:3]

    return tuple(x.swapaxes(0, 1) for x in lax.map(one, jnp.arange(first.shape[1])))


def _block_live(bounds: Int[Array, " 2"], block: Int[Array, "*n"], rule: Rule) -> Bool[Array, "*n"]:
    return ((bounds[0] // rule.chunk_size + block) * rule.chunk_size < bounds[0] + bounds[1]) & (bounds[1] > 0)


def first_asked(first: Int[Array, "K B tiles P"], block: Int[Array, " B"], bounds: Int[Array, " 2"], rule: Rule) -> Int[Array, "K B P"]:
    """The first row of each block that asks for each page, int32; chunk_size outside the routed middle, where kernels write nothing."""
    there = middle(bounds, block, first.shape[3], rule) & _block_live(bounds, block, rule)[:, None]
    return jnp.where(there, first.astype(jnp.int32).min(2), rule.chunk_size)


def votes_cast(votes: Int[Array, "K B tiles P"], bounds: Int[Array, " 2"], rule: Rule) -> Int[Array, "K B P"]:
    """Votes of each block for each page; none outside the routed middle, where kernels write nothing."""
    block = jnp.arange(votes.shape[1])
    there = middle(bounds, block, votes.shape[3], rule) & _block_live(bounds, block, rule)[:, None]
    return jnp.where(there, votes.astype(jnp.int32).sum(2), 0)


def kept_open(votes: Int[Array, "K B tiles P"], stamps: Int[Array, "K P"], bounds: Int[Array, " 2"], rule: Rule) -> Bool[Array, "K B P"]:
    """Which pages are open to each block before it asks."""
    own = bounds[0] // rule.chunk_size + jnp.arange(votes.shape[1])[:, None]
    before = jnp.pad(votes_cast(votes, bounds, rule), ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return is_open(stamps[:, None], own, rule.votes, before)


def lists_in_order(first: Int[Array, "K B tiles P"], stamps: Int[Array, "K P"], bounds, *, capacity: int, rule: Rule):
    """(ids, since, [listed, refused], stamps) with requests that were refused forgotten, which makes each block wait for the one before."""
    none = rule.chunk_size
    kv_heads, blocks = first.shape[:2]

    def one(block: Int[Array, ""], carry: tuple) -> tuple:
        *out, stamps = carry
        own = bounds[0] // rule.chunk_size + block
        asked = first_asked(lax.dynamic_slice_in_dim(first, block, 1, axis=1), block[None], bounds, rule)[:, 0]
        *made, taken = _list((stamps >= own - 1) & _block_live(bounds, block, rule), asked, capacity, none)
        out = [old.at[:, block].set(new) for old, new in zip(out, made, strict=True)]
        return *out, jnp.where((asked < none) & taken, own, stamps)

    # Like the stamps, so that inside shard_map the loop's carry has the type it ends with.
    lists, counts = (jnp.zeros_like(stamps, shape=(kv_heads, blocks, n)) for n in (capacity, 2))
    return lax.fori_loop(0, blocks, one, (lists, lists, counts, stamps))
