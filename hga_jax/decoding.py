"""One decoded token of one layer through the decode operations: windows, routing, pages from whichever tier, exact merge.

The same rule as blocks.py for a block of one query, in a handful of launches. The token's K/V go into their page while the windows are
read; closing a chunk (its summary, its pages to the host) is put off to `close_chunk`, once in a chunk and never inside a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.backend import Stats
from hga_jax.blocks import LayerState
from hga_jax.cache import HostHistory
from hga_jax.cache.window import WindowPlaces, place_of, window_places
from hga_jax.config import HGAConfig
from hga_jax.policies import Policy
from hga_jax.sketches import built_in_rotation
from hga_jax.summaries import write
from pallas_kernels import paper_routing, sketch_routing
from pallas_kernels.limits import power_of_two
from pallas_kernels.routed_decode_attention import Config as AttentionConfig
from pallas_kernels.routed_decode_attention import FreshToken, Partial, merge, page_attention, window_attention
from pallas_kernels.sketch_decode import Scanned, attend_selected, scan_beside_windows
from pallas_kernels.sketch_routing import PageList

MOST_HEADS = 31  # query heads a kv head: the paper policy's page masks are int32


@dataclass(frozen=True)
class How:
    """Which implementation of the decode operations runs; interpret: the kernels in Pallas' interpreter, for tests."""

    implementation: str
    interpret: bool = False

    def plain(self) -> dict[str, Any]:
        """Arguments of operations without tunables."""
        return {"implementation": self.implementation, "interpret": self.interpret}

    def attention(self) -> dict[str, Any]:
        """Arguments of the operations of routed_decode_attention."""
        return self.plain() | ({"config": AttentionConfig(splits=2, window_splits=2, beside_splits=2)} if self.interpret else {})

    def sketch(self) -> dict[str, Any]:
        """Arguments of the operations of sketch_routing."""
        return self.plain() | ({"config": sketch_routing.Config(unpack="arithmetic", scan_programs=2)} if self.interpret else {})

    def together(self) -> dict[str, Any]:
        """Arguments of the operations of sketch_decode."""
        return self.attention() | {"scan_config": self.sketch().get("config")}


def cannot_decode(config: HGAConfig, heads: int, kv_heads: int, capacity: int, head_dim: int) -> str | None:
    """Why the kernels cannot decode this shape; None when they can."""
    if not (power_of_two(config.group_size) and power_of_two(config.chunk_size)):
        return f"group_size={config.group_size} and chunk_size={config.chunk_size} are not powers of two"
    if head_dim % 4:
        return f"head_dim={head_dim} is not a multiple of 4"
    if config.policy == "paper" and heads // kv_heads > MOST_HEADS:
        return f"{heads // kv_heads} query heads share a kv head; the paper policy's page masks hold {MOST_HEADS}"
    if 2 * kv_heads * capacity * head_dim >= 2**31:
        return f"{capacity} tokens x {kv_heads} kv heads x {head_dim} pass 2^31 elements a layer"
    return None


def early_pages(state: LayerState, position: Int[Array, ""], config: HGAConfig, how: How) -> PageList | None:
    """The list that a loop over tokens carries from one to the next: pages fetched before routing. None where nothing is."""
    return carried_pages(state, position, config, how) if state.stamps is not None and _comes_early(state) else None


def carried_pages(state: LayerState, position: Int[Array, ""], config: HGAConfig, how: How) -> PageList:
    """The pages open to the token at `position` whatever it asks for."""
    own_chunk = position // config.chunk_size
    rules = {"capacity": _capacity(state, config), "votes": int(config.counts_votes)}
    return sketch_routing.carried_pages(state.stamps, own_chunk, **rules, **how.sketch())


def _capacity(state: LayerState, config: HGAConfig) -> int:
    return min(config.page_capacity, state.stamps.shape[1])


def decode_token(
    query: Float[Array, "N H"],
    key: Float[Array, "K H"],
    value: Float[Array, "K H"],
    state: LayerState,
    position: Int[Array, ""],
    config: HGAConfig,
    scale: float,
    how: How,
) -> tuple[Float[Array, "N H"], LayerState, Stats]:
    """Append the token at `position` and attend from it. `close_chunk` must have been called when the chunk before was full."""
    query, shape = query.reshape(key.shape[0], -1, key.shape[1]), query.shape
    attend = _attend_requested if config.policy == "paper" else _attend_remembered
    out, state, tally = attend(query, FreshToken(key, value, _place(position, config)), state, position, config, scale, how)
    return out.reshape(shape), state, _stats(tally, window_places(position, config), position, config)


def _place(position: Int[Array, ""], config: HGAConfig) -> Int[Array, " 2"]:
    """Of the newest token: its page's place in the windows, its row in the page."""
    return jnp.stack([window_places(position, config).open_place, position % config.group_size])


def _windows_of(state: LayerState, position: Int[Array, ""], config: HGAConfig) -> dict[str, Any]:
    """Sinks, local window and own chunk of a token, as window_attention wants them."""
    places, history = window_places(position, config), state.history
    if isinstance(history, HostHistory):
        return {"window": history.window, "valid": places.valid, "pages": None}
    return {"window": history.pages, "valid": places.valid, "pages": places.pages}


def _with_windows(state: LayerState, window: Float[Array, "K W 2 g H"]) -> LayerState:
    """With the array that `_windows_of` named changed: the newest token is in it."""
    history = state.history
    return replace(state, history=replace(history, **{"window" if isinstance(history, HostHistory) else "pages": window}))


class Tally(NamedTuple):
    """What a token did, for the statistics. counts: pages visible and requests refused, by kv head and perhaps part. seen: visible pages of
    an average head. unopened: sums to the unopened mass of each head. hits: pages found in the bank where there is one, by part."""

    counts: Int[Array, "*parts 2"]
    seen: Float[Array, ""]
    unopened: Float[Array, "K parts G"] | None = None
    hits: Int[Array, "K parts"] | None = None


def _attend_requested(
    query: Float[Array, "K G H"], fresh: FreshToken, state: LayerState, position: Array, config: HGAConfig, scale: float, how: How
) -> tuple[Float[Array, "K G H"], LayerState, Tally]:
    """Paper policy: each head's own pages, nothing remembered."""
    settings = how.attention() | {"scale": scale}
    windows = window_attention(query, **_windows_of(state, position, config), fresh=fresh, **settings)
    state = _with_windows(state, windows.window)
    found = _route_paper(query, state, position, config, how)
    routed = page_attention(query, found.ids, found.counts, state.history.pages, heads=found.heads, **settings)
    out = merge([windows.partial, routed], query.dtype, **how.attention()).out
    return out, replace(state, marks=found.marks), _paper_tally(found, query)


def _route_paper(query: Float[Array, "K G H"], state: LayerState, position: Array, config: HGAConfig, how: How) -> Any:
    pages = state.history.capacity // config.group_size
    return paper_routing.paper_routing(
        query, state.summaries.chunks, state.summaries.groups, state.marks, position // config.chunk_size,
        sink_chunks=config.sink_chunks, local_chunks=config.local_chunks, top_chunks=config.top_chunks, top_groups=config.top_groups,
        capacity=min(query.shape[1] * (config.top_groups // 2), pages), **how.plain(),
    )  # fmt: skip


def _paper_tally(found: Any, query: Float[Array, "K G H"]) -> Tally:
    live = jnp.arange(found.heads.shape[1]) < found.counts[:, :1]
    seen = jnp.where(live, lax.population_count(found.heads), 0).sum() / (query.shape[0] * query.shape[1])
    return Tally(found.counts, seen)


def _attend_remembered(
    query: Float[Array, "K G H"], fresh: FreshToken, state: LayerState, position: Array, config: HGAConfig, scale: float, how: How
) -> tuple[Float[Array, "K G H"], LayerState, Tally]:
    """Sketch policy: pages that stay open from earlier requests, and those that this token opens."""
    if _comes_early(state):
        return _attend_early(query, fresh, state, position, config, scale, how)
    middle = _middle(position, config)
    scanned, state = _scan(query, fresh, state, position, middle, config, scale, how)
    bank = getattr(state.history, "bank", None)
    settings = _selection(query, state, config) | how.together() | {"scale": scale}
    found = attend_selected(query, scanned, state.stamps, middle, state.history.pages, bank=bank, **settings)
    if bank is not None:
        state = replace(state, history=replace(state.history, bank=found.bank))
    tally = Tally(found.counts, found.counts[..., 0].sum() / query.shape[0], found.unopened, found.hits)
    return found.out, replace(state, stamps=found.stamps), tally


def _comes_early(state: LayerState) -> bool:
    """Whether pages that are open anyway are fetched before routing: where every page comes over PCIe, while the sketches are scanned."""
    return isinstance(state.history, HostHistory) and state.history.bank is None


def _attend_early(
    query: Float[Array, "K G H"], fresh: FreshToken, state: LayerState, position: Array, config: HGAConfig, scale: float, how: How
) -> tuple[Float[Array, "K G H"], LayerState, Tally]:
    """Windows and sketches, and the pages that are open anyway, do not wait for each other: the compiler may run them side by side (see
    programs.decode_tokens)."""
    settings, store = how.attention() | {"scale": scale}, state.history.pages
    before = state.carried or carried_pages(state, position, config, how)
    carried = page_attention(query, *before, store, parts=before.count.shape[1], **settings)
    windows, state, found = _route_sketch(query, fresh, state, position, config, scale, how)
    opened = page_attention(query, *found.fresh, store, parts=before.count.shape[1], **settings)
    handed = tuple(zip(found.carried, before, strict=True))
    merged = merge([windows, carried, opened], query.dtype, hand_over=handed, **how.attention())
    after = PageList(*merged.targets) if state.carried is not None else None
    tally = Tally(found.counts, found.counts[..., 0].sum() / query.shape[0], found.unopened)
    return merged.out, replace(state, carried=after), tally


def _middle(position: Int[Array, ""], config: HGAConfig) -> Int[Array, " 5"]:
    now, after = position // config.chunk_size, (position + 1) // config.chunk_size
    voting = position % config.vote_stride == 0
    return sketch_routing.middle_of(now, after, config.sink_chunks, config.local_chunks, voting)


def _selection(query: Float[Array, "K G H"], state: LayerState, config: HGAConfig) -> dict[str, Any]:
    threshold = config.threshold_for(query.shape[1])
    voting = {"votes": config.votes_for(query.shape[1]), "vote_share": config.vote_share}
    return {"pages_per_chunk": config.groups_per_chunk, "threshold": threshold, "capacity": _capacity(state, config)} | voting


def _scan(
    query: Float[Array, "K G H"],
    fresh: FreshToken,
    state: LayerState,
    position: Array,
    middle: Int[Array, " 5"],
    config: HGAConfig,
    scale: float,
    how: How,
) -> tuple[Scanned, LayerState]:
    """Estimated scores of all pages, and the windows attended to, the newest token in them."""
    summaries = state.summaries
    prepared = sketch_routing.prepare(query, jnp.asarray(built_in_rotation(query.shape[2])), summaries.means, middle, **how.plain())
    scanned = scan_beside_windows(
        query, prepared, summaries.codes, summaries.scales, middle, **_windows_of(state, position, config), fresh=fresh, scale=scale,
        **how.together(),
    )  # fmt: skip
    return scanned, _with_windows(state, scanned.windows.window)


def _route_sketch(
    query: Float[Array, "K G H"], fresh: FreshToken, state: LayerState, position: Array, config: HGAConfig, scale: float, how: How
) -> tuple[Partial, LayerState, sketch_routing.Pages]:
    """The windows attended to, the newest token in them, and the pages that it asks for: (partial result, state with both, pages)."""
    middle = _middle(position, config)
    scanned, state = _scan(query, fresh, state, position, middle, config, scale, how)
    windows = scanned.windows.partial
    found = sketch_routing.select(scanned.scores, windows.stats, state.stamps, middle, **_selection(query, state, config), **how.sketch())
    return windows, replace(state, stamps=found.stamps), found


def _stats(tally: Tally, places: WindowPlaces, position: Int[Array, ""], config: HGAConfig) -> Stats:
    kv_heads = tally.counts.shape[0]
    listed, refused = tally.counts[..., 0].sum(), tally.counts[..., 1].sum()
    held, windows = position + 1, places.valid.sum()
    attended = (windows + config.group_size * tally.seen) / held
    fetched = windows + config.group_size * listed / kv_heads
    unopened = jnp.float32(0) if tally.unopened is None else tally.unopened.sum() / (kv_heads * tally.unopened.shape[2])
    found = (jnp.float32(0), jnp.float32(0)) if tally.hits is None else (tally.hits.sum(), listed)
    numbers = (1, attended, 1, fetched, fetched / held, refused, unopened, *found)
    return Stats(*(jnp.asarray(x, jnp.float32) for x in numbers))


def close_chunk(state: LayerState, held: Int[Array, ""], config: HGAConfig, policy: Policy, how: How) -> LayerState:
    """Write the summary of the chunk of the newest token, and its pages to the host tier; provisional while the chunk is open.

    held: tokens held. To be called when a chunk is full; more often does no harm.
    """
    history, per_chunk = state.history, config.groups_per_chunk
    chunk = jnp.maximum(held - 1, 0) // config.chunk_size
    if isinstance(history, HostHistory):
        place = place_of(chunk * per_chunk, config)
        held_pages = history.window
        history = history.with_window_written(place, chunk * per_chunk, per_chunk, how.plain())
    else:
        held_pages, place = history.pages, chunk * per_chunk
    keys, sinks = lax.dynamic_slice_in_dim(held_pages, place, per_chunk, axis=1), held_pages[:, : config.sink_pages]
    keys, sinks = (x[:, :, 0].reshape(len(x), -1, x.shape[-1]) for x in (keys, sinks))
    summaries = write(state.summaries, policy.summarise(keys, sinks), chunk, 1)
    return replace(state, history=history, summaries=summaries)


class Awaited(NamedTuple):
    """A token between `open_token` and `finish_token`: what it asks for, and what was computed meanwhile.

    lists: the pages, in one or two page lists. heads: as in page_attention, for the only list; None: every head sees every page.
    """

    query: Float[Array, "K G H"]
    windows: Partial
    lists: tuple[PageList, ...]
    heads: Int[Array, "K M"] | None
    tally: Tally


def open_token(
    query: Float[Array, "N H"],
    key: Float[Array, "K H"],
    value: Float[Array, "K H"],
    state: LayerState,
    position: Int[Array, ""],
    config: HGAConfig,
    scale: float,
    how: How,
) -> tuple[Awaited, LayerState]:
    """The first half of `decode_token`, for a history whose pages somebody has to bring first."""
    query, fresh = query.reshape(key.shape[0], -1, key.shape[1]), FreshToken(key, value, _place(position, config))
    if config.policy == "paper":
        windows = window_attention(query, **_windows_of(state, position, config), fresh=fresh, scale=scale, **how.attention())
        found = _route_paper(query, state, position, config, how)
        listed = PageList(found.ids, found.counts[:, :1])
        awaited = Awaited(query, windows.partial, (listed,), found.heads, _paper_tally(found, query))
        return awaited, replace(_with_windows(state, windows.window), marks=found.marks)
    before = carried_pages(state, position, config, how)
    windows, state, found = _route_sketch(query, fresh, state, position, config, scale, how)
    tally = Tally(found.counts, found.counts[..., 0].sum() / query.shape[0], found.unopened)
    return Awaited(query, windows, (before, found.fresh), None, tally), state


def finish_token(
    awaited: Awaited,
    pages: Float[Array, "K M 2 g H"],
    count: Int[Array, "K 1"],
    position: Int[Array, ""],
    config: HGAConfig,
    scale: float,
    how: How,
) -> tuple[Float[Array, "N H"], Stats]:
    """The second half: `pages` are those of the lists, one list after the other, the first `count` of each kv head."""
    query = awaited.query
    ids = jnp.broadcast_to(jnp.arange(pages.shape[1], dtype=jnp.int32), pages.shape[:2])
    heads = None if awaited.heads is None else awaited.heads[:, : pages.shape[1]]
    routed = page_attention(query, ids, count, pages, scale=scale, heads=heads, **how.attention())
    out = merge([awaited.windows, routed], query.dtype, **how.attention()).out
    return out.reshape(-1, query.shape[2]), _stats(awaited.tally, window_places(position, config), position, config)
