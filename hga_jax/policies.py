"""The selection policies as data: what is remembered of closed chunks, what queries request of it, and what is granted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import custom_batching, lax
from jaxtyping import Array, Float, Int

from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.routing import Granted, grant_each, grant_remembered, request_by_threshold, request_top
from hga_jax.sketches import KeySketches, built_in_rotation, key_sketches, told_coordinates
from hga_jax.summaries import KeySums, key_sums
from pallas_kernels.dispatch import Implementation
from pallas_kernels.limits import power_of_two
from pallas_kernels.sketch_prefill_routing import Rule, Screen, route
from pallas_kernels.sketch_prefill_routing.keys import page_keys
from pallas_kernels.sketch_prefill_routing.pairs import choose_pairs, pair_keys
from pallas_kernels.sketch_prefill_routing.sketches import sketch_pages
from pallas_kernels.votes import never

SCORES_AT_ONCE = 64 * 2**20  # chunk scores held at once by `list_top`, in elements


class PageLists(NamedTuple):
    """What each of B neighbouring chunks of queries sees of the routed middle; R lists a kv head, as in routing.Selection.

    ids: pages, none twice in a list. since: the first row of the chunk that sees the page. counts: slots of a list in use.
    stamps, refused, unopened: as in routing.Granted.
    """

    ids: Int[Array, "K B R M"]
    since: Int[Array, "K B R M"]
    counts: Int[Array, "K B R"]
    stamps: Int[Array, "K P"] | None
    refused: Int[Array, ""]
    unopened: Float[Array, ""]


class Policy(NamedTuple):
    """summarise: (post-RoPE keys [K, whole chunks, H], those of the sinks [K, sinks, H]) -> summaries, any pytree that summaries.write
    understands.
    summarise_pages: (summaries, pages of a device history, first chunk, end, most chunks) -> summaries with those of the chunks from first
    to end made anew, as a kernel for NVIDIA GPUs; None: there is none.
    request: (query [K, B, G, Q, H] of B neighbouring chunks, live [B, Q], positions [B, Q], summaries, log of the window scores' summed
    exponentials [K, B, G, Q]) -> what those queries ask for, any pytree; needs nothing of what was requested before.
    grant: (requests, b, chunk of block b, stamps) -> routing.Granted: the pages open to block b; called block by block.
    list_pages: (query [T, N, H], pages of a device history, summaries, stamps, first position, live queries, implementation, energy of
    the sequence's first queries or None) -> PageLists: request and grant for all blocks at once.
    remembers: whether requests outlive their block; then `grant` takes and returns a stamp a page. never: that of one not requested yet.
    """

    summarise: Callable[[Float[Array, "K S H"], Float[Array, "K sinks H"]], Any]
    summarise_pages: Callable[..., Any] | None
    request: Callable[..., Any]
    grant: Callable[..., Granted]
    list_pages: Callable[..., PageLists]
    remembers: bool
    never: int = -2

    def new_stamps(self, kv_heads: int, pages: int) -> Int[Array, "K P"] | None:
        """Stamps of pages never requested."""
        return jnp.full((kv_heads, pages), self.never, jnp.int32) if self.remembers else None


def policy_for(
    config: HGAConfig, rope: RopeConfig | None, head_dim: int, scale: float, rotation: Array | np.ndarray | None = None
) -> Policy:
    """The functions of config.policy, their settings filled in. Raises ValueError when the policy needs a rope and none is given, or
    config.scan_pairs or sketch_pairs is more than there are."""
    if config.policy == "paper":
        if config.summary == "mixed_rope" and rope is None:
            raise ValueError("summary='mixed_rope' needs rope=RopeConfig(theta=...): give the keys' rotation or choose summary='mean'")
        return Policy(
            lambda keys, _: key_sums(keys, config, rope),
            None,
            partial(request_top, config=config),
            grant_each,
            partial(list_top, config=config),
            remembers=False,
        )
    if config.scan_pairs != "auto" and config.scan_pairs > head_dim // 2:
        raise ValueError(f"scan_pairs={config.scan_pairs}: keys of {head_dim} coordinates have {head_dim // 2} rotary pairs")
    pairs = config.sketched_pairs(head_dim)
    if pairs > head_dim // 2:
        raise ValueError(f"sketch_pairs={config.sketch_pairs}: keys of {head_dim} coordinates have {head_dim // 2} rotary pairs")
    told = partial(told_coordinates, chunk_size=config.chunk_size, pairs=pairs)
    fits_kernels = power_of_two(config.chunk_size) and power_of_two(config.group_size) and config.chunk_size >= 16
    rotation = jnp.asarray(built_in_rotation(head_dim) if rotation is None else rotation, jnp.float32)
    return Policy(
        lambda keys, sinks: key_sketches(keys, told(sinks), config.chunk_size, rotation),
        partial(sketch_new_pages, told=told, sink_pages=config.sink_pages, rotation=rotation) if fits_kernels else None,
        partial(request_by_threshold, config=config, rotation=rotation, scale=scale),
        partial(grant_remembered, config=config),
        partial(list_by_threshold, config=config, rotation=rotation, scale=scale),
        remembers=True,
        never=never(config.counts_votes),
    )


def list_top(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    sums: KeySums,
    stamps: None,
    start: Int[Array, ""],
    count: Int[Array, ""],
    implementation: Implementation,
    energy: None = None,
    *,
    config: HGAConfig,
) -> PageLists:
    """The paper policy's selections of all blocks of queries: plain XLA, as many blocks at once as there is room for their scores."""
    (length, heads, width), (kv_heads, held), size = query.shape, pages.shape[:2], config.chunk_size
    most = -(-(length - 1) // size) + 1
    room = jnp.zeros((most * size, heads, width), query.dtype)
    placed = lax.dynamic_update_slice_in_dim(room, query, start % size, 0)
    blocks = placed.reshape(most, size, kv_heads, heads // kv_heads, width).transpose(2, 0, 3, 1, 4)
    position = start // size * size + jnp.arange(most * size).reshape(most, size)
    live = (position >= start) & (position < start + count)
    at_once = min(most, max(SCORES_AT_ONCE // (heads * size * held // config.groups_per_chunk), 2))
    found = request_top(blocks, live, position, sums, None, config=config, at_once=at_once)
    counts = jnp.where(live.any(1), found.used, 0)
    counts = jnp.broadcast_to(counts[None, :, None], (kv_heads, most, found.pages.shape[2]))
    return PageLists(found.pages.swapaxes(0, 1), found.since.swapaxes(0, 1), counts, stamps, jnp.int32(0), jnp.float32(0))


def sketch_new_pages(
    sketches: KeySketches,
    pages: Float[Array, "K P 2 g H"],
    first_chunk: Int[Array, ""],
    end_chunk: Int[Array, ""],
    most: int,
    *,
    told: Callable[[Float[Array, "K sinks H"]], Float[Array, "K H"]],
    sink_pages: int,
    rotation: Float[Array, "H H"],
) -> KeySketches:
    """sketches.key_sketches of at most `most` chunks of a history, written into their place."""

    @custom_batching.sequential_vmap
    def run(pages: Array, *arrays: Array) -> tuple:
        sinks = pages[:, :sink_pages, 0]
        coordinates = told(sinks.reshape(len(sinks), -1, sinks.shape[-1]))
        return sketch_pages(pages, *arrays[:3], coordinates, rotation, *arrays[3:], most)

    return KeySketches(*run(pages, sketches.means, sketches.codes, sketches.scales, first_chunk, end_chunk))


def list_by_threshold(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    sketches: KeySketches,
    stamps: Int[Array, "K P"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    implementation: Implementation,
    energy: Float[Array, "K half"] | None = None,
    *,
    config: HGAConfig,
    rotation: Float[Array, "H H"],
    scale: float,
) -> PageLists:
    """The sketch policy's requests and grants of all blocks of queries, screened, or scanned in some rotary pairs, where config says so."""
    ratio = query.shape[1] // pages.shape[0]
    windows = config.sink_chunks, config.local_chunks
    voting = {"votes": config.votes_for(ratio), "vote_share": config.vote_share, "vote_stride": config.vote_stride}
    rule = Rule(config.chunk_size, config.group_size, *windows, scale, **voting)
    screen = None
    if config.screening == "on":
        screen = Screen(
            stride=config.screen_stride,
            request_stride=config.request_stride,
            spread=config.screen_spread,
            margin=config.screen_margin,
            threshold=config.screen_threshold,
            capacity=2 * config.page_capacity,
        )

    @custom_batching.sequential_vmap  # kernels take one sequence
    def run(query: Array, pages: Array, sketches: KeySketches, stamps: Array, start: Array, count: Array, energy: Array | None) -> tuple:
        settings = {"rule": rule, "capacity": config.page_capacity, "implementation": implementation}
        threshold = config.threshold_for(ratio)

        def by_sketches() -> tuple:
            closed = (start + count) // config.chunk_size
            keys = page_keys(
                sketches.means, sketches.codes, sketches.scales, rotation, config.group_size, closed, implementation=implementation
            )  # fmt: skip
            return tuple(route(query, pages, keys, stamps, start, count, threshold=threshold, screen=screen, **settings))

        def by_pairs() -> tuple:
            room = pages.shape[1] * config.group_size
            pairs = config.pairs_for(room, pages.shape[-1])
            chosen = choose_pairs(energy, pages, config.unrouted // config.group_size, pairs, ratio, scale)
            less = threshold * config.pairs_threshold_for(pairs, pages.shape[-1])
            some = settings | {"rule": replace(rule, stride=config.scan_stride_for(room))}
            return tuple(route(query, pages, pair_keys(pages, chosen), stamps, start, count, threshold=less, **some))

        return by_sketches() if energy is None else lax.cond(jnp.any(energy > 0), by_pairs, by_sketches)

    arrays = lax.stop_gradient((query, pages, sketches, stamps, start, count, energy))  # which pages are open has no gradient
    ids, since, counts, *rest = run(*arrays)
    return PageLists(ids[:, :, None], since[:, :, None], counts[:, :, None], *rest)
