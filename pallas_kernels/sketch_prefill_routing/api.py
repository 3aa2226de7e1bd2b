"""Page lists of all blocks of a prompt under the sketch policy; `implementation` picks the kernels or plain XLA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.sketch_prefill_routing import kernel, lists, scan, xla
from pallas_kernels.sketch_prefill_routing.config import Config, Rule, Screen
from pallas_kernels.sketch_prefill_routing.keys import PageKeys
from pallas_kernels.sketch_prefill_routing.pairs import PairKeys, pair_queries
from pallas_kernels.votes import NEVER, stamp_of, votes_in

COUNTED = 4  # every how manyth query is asked for `unopened`, a figure for reports: for all of them it took 1.7 ms of 64K tokens


class PageLists(NamedTuple):
    """What each of B neighbouring chunks of queries sees of the routed middle.

    ids: pages, ascending. since: the first row of the chunk that sees the page (0: requested in the chunk before). counts: slots in use;
    the others hold anything. stamps: the last chunk in which a page was requested, or what pallas_kernels.votes says. refused: requests
    for which a list had no room.
    unopened: estimated mass of the pages that are not open, summed over live queries, averaged over heads; from some of the queries.
    """

    ids: Int[Array, "K B M"]
    since: Int[Array, "K B M"]
    counts: Int[Array, "K B"]
    stamps: Int[Array, "K P"]
    refused: Int[Array, ""]
    unopened: Float[Array, ""]


@dataclass(frozen=True)
class _Steps:
    """One implementation of each step."""

    scan: Any
    votes: Any
    probe_mass: Any
    refine: Any
    listed_mass: Any
    page_lists: Any


def _steps(implementation: str, config: Config, interpret: bool) -> _Steps:
    if implementation == "xla":
        return _Steps(xla.scan, xla.votes, xla.probe_mass, xla.refine, xla.listed_mass, xla.page_lists)
    if implementation != "pallas":
        raise ValueError(f"{implementation=}: choose pallas or xla")
    functions = (scan.scan, scan.votes, kernel.probe_mass, kernel.refine, kernel.listed_mass, lists.page_lists)
    return _Steps(*(partial(function, config=config, interpret=interpret) for function in functions))


def route(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    keys: PageKeys | PairKeys,
    stamps: Int[Array, "K P"],
    first_position: Int[Array, ""],
    count: Int[Array, ""],
    *,
    rule: Rule,
    threshold: float,
    capacity: int,
    screen: Screen | None = None,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> PageLists:
    """Route the first `count` queries, at positions first_position, first_position + 1, ...

    query: post-RoPE. pages: the exact history, which holds all keys up to the last live query's. keys: from keys.page_keys or,
    without a screen, from pairs.pair_keys.
    A probing row asks for every page whose share of its estimated attention mass reaches `threshold`; all heads of the kv head see it from
    that row on to the end of the next chunk. With rule.votes, to the end of its own, and given enough votes of every rule.vote_stride-th
    query there, throughout the next.
    Requests beyond `capacity` pages a list are refused, in order of (row, page id).

    screen None: every rule.stride-th query probes every page by its sketched keys. Otherwise every screen.stride-th query screens them by
    their means and spreads: pages that reach threshold * screen.margin of the mass of its windows are candidates from that query on to the
    end of the next chunk (of this call). Every screen.request_stride-th query asks for candidates it knows, by their sketched keys, against
    the mass of its own windows and, by means and spreads, of those candidates.
    Nothing depends on a later query. The rule is this project's (hga_jax/eval/README.md); what screening costs: config.Screen.
    """
    steps = _steps(implementation, config or Config(), interpret)
    bounds = jnp.stack([first_position, count]).astype(jnp.int32)
    capacity = min(capacity, stamps.shape[1])
    few, votes = (), None
    if isinstance(keys, PairKeys):
        few = pair_queries(query, keys, rule.scale), keys.means
    if screen is None:
        if rule.votes and rule.vote_stride % rule.stride:
            raise ValueError(f"vote_stride={rule.vote_stride} must be a multiple of stride={rule.stride}: only probes can vote")
        vectors, spreads = keys.tokens, None
        window, mass, first = steps.scan(query, bounds, pages, keys.tokens, *few, threshold=threshold, rule=rule)
        if rule.votes:
            voters = replace(rule, stride=rule.vote_stride)
            voting = some_rows(mass, rule, rule.vote_stride)
            votes = steps.votes(query, bounds, keys.tokens, voting, *few, threshold=threshold * rule.vote_share, rule=voters)
    else:
        rule = replace(rule, stride=screen.stride, spread=screen.spread)
        vectors, spreads = keys.means, keys.spreads
        window, mass, wide = steps.probe_mass(query, bounds, pages, vectors, spreads, threshold=threshold * screen.margin, rule=rule)
        never = jnp.full_like(stamps, -2)
        *candidates, counts = steps.page_lists(wide, never, bounds, capacity=min(screen.capacity, stamps.shape[1]), rule=rule)
        asking = replace(rule, stride=screen.request_stride)
        first = steps.refine(query, bounds, pages, keys, *candidates, counts[..., 0], threshold=threshold * screen.threshold, rule=asking)
    lists_of = _lists if votes is None else partial(_lists_by_votes, votes)
    ids, since, counts, stamps = lists_of(first, stamps, bounds, steps, capacity=capacity, rule=rule)
    if COUNTED % rule.stride == 0 and rule.chunk_size % COUNTED == 0:
        window, mass, rule = some_rows(window, rule, COUNTED), some_rows(mass, rule, COUNTED), replace(rule, stride=COUNTED)
    opened = steps.listed_mass(query, bounds, vectors, spreads, mass, ids, since, counts[..., 0], *few, rule=rule)
    unopened = jnp.maximum(1 - jnp.exp(window - mass) - opened, 0)
    unopened = jnp.where(_live(bounds, unopened.shape[1:], query.shape[1] // len(pages), rule), unopened, 0).sum()
    return PageLists(ids, since, counts[..., 0], stamps, counts[..., 1].sum(), unopened * (rule.stride / query.shape[1]))


def some_rows(mass: Float[Array, "K B r"], rule: Rule, stride: int) -> Float[Array, "K B some"]:
    """Those of every stride-th position in place of every rule.stride-th."""
    by_query = mass.reshape(*mass.shape[:2], rule.probes, -1)
    return by_query[:, :, :: stride // rule.stride].reshape(*mass.shape[:2], -1)


def _lists(first, stamps, bounds, steps: _Steps, *, capacity: int, rule: Rule) -> tuple[Array, Array, Array, Array]:
    """Blocks do not depend on each other unless one refuses requests: those are forgotten, and the next block does not see them."""
    ids, since, counts = steps.page_lists(first, stamps, bounds, capacity=capacity, rule=rule)

    def apart() -> tuple[Array, Array, Array, Array]:
        block = jnp.arange(first.shape[1])
        own = bounds[0] // rule.chunk_size + block
        asked = xla.first_asked(first, block, bounds, rule) < rule.chunk_size
        return ids, since, counts, jnp.maximum(stamps, jnp.where(asked, own[:, None], -2).max(1))

    def in_order() -> tuple[Array, Array, Array, Array]:
        return xla.lists_in_order(first, stamps, bounds, capacity=capacity, rule=rule)

    return lax.cond(jnp.any(counts[..., 1] > 0), in_order, apart)


def _lists_by_votes(votes, first, stamps, bounds, steps: _Steps, *, capacity: int, rule: Rule) -> tuple[Array, Array, Array, Array]:
    """Votes do not depend on what was refused: no block waits for another."""
    ids, since, counts = steps.page_lists(first, stamps, bounds, capacity=capacity, rule=rule, votes=votes)
    kv_heads, blocks = first.shape[:2]
    own = (bounds[0] // rule.chunk_size + jnp.arange(blocks))[:, None]
    cast, kept = xla.votes_cast(votes, bounds, rule), xla.kept_open(votes, stamps, bounds, rule)
    asked = xla.first_asked(first, jnp.arange(blocks), bounds, rule) < rule.chunk_size

    def listed() -> Array:
        slot = jnp.where(jnp.arange(capacity) < counts[..., :1], ids, stamps.shape[1])
        return jnp.zeros_like(asked).at[jnp.arange(kv_heads)[:, None, None], jnp.arange(blocks)[:, None], slot].set(True, mode="drop")

    opened = kept | lax.cond(jnp.any(counts[..., 1] > 0), listed, lambda: asked)
    after = stamp_of(own, opened, cast + votes_in(stamps[:, None], own, rule.votes), rule.votes)
    return ids, since, counts, jnp.maximum(stamps, jnp.where((cast > 0) | opened & ~kept, after, NEVER).max(1))


def _live(bounds: Int[Array, " 2"], shape: tuple[int, int], ratio: int, rule: Rule) -> Array:
    """Which rows [B, r] are live queries."""
    chunk = bounds[0] // rule.chunk_size + jnp.arange(shape[0])[:, None]
    index = chunk * rule.chunk_size + jnp.arange(shape[1]) // ratio * rule.stride - bounds[0]
    return (index >= 0) & (index < bounds[1])
