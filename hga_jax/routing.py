"""Which pages a block of queries opens, and from which of its rows on each is seen: pure functions of queries and summaries."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hga_jax.config import HGAConfig
from hga_jax.pytree import register
from hga_jax.summaries import KeySums


@register
@dataclass(frozen=True)
class Selection:
    """Pages opened for one block of Q query rows. R lists a kv head: G when each query head has its own, 1 when all share one.

    pages: page ids. since: the first row of the block that sees the page; Q or more: nobody, an empty slot.
    used: only the first `used` slots of any list can be in use.
    """

    pages: Int[Array, "K R n"]
    since: Int[Array, "K R n"]
    used: Int[Array, ""]


def largest(scores: Float[Array, "*rows n"], count: int) -> Bool[Array, "*rows n"]:
    """Which entries are at least as large as the `count`-th largest of their row; entries of -inf never are.

    The threshold is found bit by bit on the floats' ordered integer images: exact, and many times faster than a sort on CPU.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def refine(i: Array, bound: Array) -> Array:
        higher = jnp.where(i == 0, 0, bound + (jnp.int32(1) << (31 - i)))  # the sign bit first, then the rest downwards
        enough = jnp.sum(ordered >= higher, axis=-1, keepdims=True) >= count
        return jnp.where(enough, higher, bound)

    bound = lax.fori_loop(0, 32, refine, jnp.full((*scores.shape[:-1], 1), jnp.iinfo(jnp.int32).min))
    return (ordered >= bound) & (scores > -jnp.inf)


def _requests(scores: Float[Array, "*B Q n"], count: int, rows: Int[Array, "Q 1"]) -> tuple[Float[Array, "*B n"], Int[Array, "*B n"]]:
    """Each row asks for its `count` best: (best score among the rows that asked or -inf, first row that asked or Q)."""
    asked = largest(scores, count)
    shared = jnp.max(jnp.where(asked, scores, -jnp.inf), axis=-2)
    return shared, jnp.min(jnp.where(asked, rows, rows.shape[0]), axis=-2)


def route_top(
    query: Float[Array, "K G Q H"], live: Bool[Array, " Q"], own_chunk: Int[Array, ""], summaries: KeySums, config: HGAConfig
) -> Selection:
    """The paper's rule: every query asks for its best chunks, then its best groups among those it sees; the block shares two cuts.

    Rows that are not live ask for nothing. One row alone is the paper's decode rule. Source: arXiv 2606.30709.
    """
    kv_heads, ratio, length, _ = query.shape
    chunks, pages = summaries.chunks.shape[1], config.groups_per_chunk
    query = query.astype(jnp.float32)
    rows = jnp.arange(length)[:, None]
    chunk = jnp.arange(chunks)
    middle_end = own_chunk - config.local_chunks
    middle = (chunk >= config.sink_chunks) & (chunk < middle_end)

    scores = jnp.einsum("kgqh,kmh->kgqm", query, summaries.chunks.astype(jnp.float32))
    scores = jnp.where(middle & live[:, None], scores, -jnp.inf)
    shared, first = _requests(scores, config.top_chunks, rows)
    best, selected = lax.top_k(shared, min(config.top_chunks, chunks))  # [K, G, n]
    since = jnp.where(best > -jnp.inf, jnp.take_along_axis(first, selected, axis=-1), length)
    if config.local_chunks == 0:
        # The chunk before the own one is forced in, in place of the lowest shared score: the last slot, which top_k leaves empty or lowest.
        forced, exists = own_chunk - 1, own_chunk - 1 >= config.sink_chunks
        slot = jnp.arange(selected.shape[-1])
        there = (selected == forced) & (since < length)
        take = there | ((slot == slot[-1]) & ~there.any(-1, keepdims=True))
        selected = jnp.where(exists & take, forced, selected)
        since = jnp.where(exists & take, 0, since)

    candidates = (selected[..., None] * pages + jnp.arange(pages)).reshape(kv_heads, ratio, -1)
    group_sums = jax.vmap(lambda sums, ids: sums[ids])(summaries.groups, candidates).astype(jnp.float32)
    seen = (jnp.repeat(since, pages, axis=-1)[..., None, :] <= rows) & live[:, None]
    scores = jnp.where(seen, jnp.einsum("kgqh,kgnh->kgqn", query, group_sums), -jnp.inf)
    shared, since = _requests(scores, config.top_groups // 2, rows)
    if candidates.shape[-1] > config.top_groups:
        best, slots = lax.top_k(shared, config.top_groups)
        candidates = jnp.take_along_axis(candidates, slots, axis=-1)
        since = jnp.where(best > -jnp.inf, jnp.take_along_axis(since, slots, axis=-1), length)
    used = jnp.where(middle_end > config.sink_chunks, candidates.shape[-1], 0)
    return Selection(candidates, since, used)
