"""One decoded token of one layer through the decode operations: windows, routing, pages from whichever tier, exact merge.

The same rule as blocks.py for a block of one query, in a handful of launches. The token's K/V go into their page while the windows are
read; closing a chunk (its summary, its pages to the host) is put off to `close_chunk`, once in a chunk and never inside a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.backend import Stats
from hga_jax.blocks import LayerState
from hga_jax.cache import DeviceHistory, HostHistory
from hga_jax.cache.window import WindowPlaces, place_of, window_places
from hga_jax.config import HGAConfig
from hga_jax.policies import Policy
from hga_jax.sketches import built_in_rotation
from hga_jax.summaries import write
from pallas_kernels import paper_routing, routed_decode_attention, sketch_routing
from pallas_kernels.limits import power_of_two
from pallas_kernels.routed_decode_attention import FreshToken, Windows

MOST_HEADS = 31  # query heads a kv head: the paper policy's page masks are int32


@dataclass(frozen=True)
class How:
    """Which implementation of the decode operations runs; interpret: the kernels in Pallas' interpreter, for tests."""

    implementation: str
    interpret: bool = False

    def settings(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "interpret": self.interpret}

    def sketch_config(self) -> sketch_routing.Config:
        return sketch_routing.Config(unpack="arithmetic") if self.interpret else sketch_routing.Config()


def unsupported(config: HGAConfig, heads: int, kv_heads: int, capacity: int, head_dim: int) -> str | None:
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
    heads, width = query.shape
    kv_heads = key.shape[0]
    grouped = query.reshape(kv_heads, heads // kv_heads, width)
    places = window_places(position, config)
    own_chunk = position // config.chunk_size
    fresh = FreshToken(key, value, jnp.stack([places.open_place, position % config.group_size]))
    rotation = jnp.asarray(built_in_rotation(width)) if config.policy == "sketch" else None
    windows, history = _attend_windows(grouped, places, fresh, state.history, rotation, scale, how)
    state, pages, seen_by, unopened = _route(grouped, windows, own_chunk, state, config, scale, how)
    bank, plan = getattr(history, "bank", None), None
    if bank is not None:
        recency, needed = state.stamps, own_chunk - 1
        bank, plan = routed_decode_attention.plan_bank(bank, pages.ids, pages.counts, recency, needed, **how.settings())
    routed, bank = routed_decode_attention.page_attention(
        grouped, pages.ids, pages.counts, history.pages, scale=scale, heads=seen_by, bank=bank, plan=plan, **how.settings()
    )
    if bank is not None:
        history = replace(history, bank=bank)
    out = routed_decode_attention.merge([windows.partial, routed], query.dtype, **how.settings())
    hits = None if plan is None else plan.hits
    stats = _stats(pages.counts, seen_by, unopened, hits, places, position, heads // kv_heads, config)
    return out.reshape(heads, width), replace(state, history=history), stats


def _attend_windows(
    query: Float[Array, "K G H"],
    places: WindowPlaces,
    fresh: FreshToken,
    history: DeviceHistory | HostHistory,
    rotation: Float[Array, "H H"] | None,
    scale: float,
    how: How,
) -> tuple[Windows, DeviceHistory | HostHistory]:
    """Sinks, local window and own chunk, the token's own key and value among them and now in the history."""
    settings = how.settings() | {"scale": scale, "rotation": rotation, "fresh": fresh}
    if isinstance(history, HostHistory):
        windows = routed_decode_attention.window_attention(query, history.window, places.valid, **settings)
        return windows, replace(history, window=windows.window)
    windows = routed_decode_attention.window_attention(query, history.pages, places.valid, pages=places.pages, **settings)
    return windows, replace(history, pages=windows.window)


def _route(
    query: Float[Array, "K G H"], windows: Windows, own_chunk: Int[Array, ""], state: LayerState, config: HGAConfig, scale: float, how: How
) -> tuple[LayerState, Any, Int[Array, "K M"] | None, Float[Array, "K G"] | None]:
    """(state with the requests remembered, page lists, which heads see each page or None: all, unopened mass)."""
    pages = state.history.capacity // config.group_size
    bounds = {"sink_chunks": config.sink_chunks, "local_chunks": config.local_chunks}
    if config.policy == "paper":
        most = query.shape[1] * (config.top_groups // 2)
        found = paper_routing.paper_routing(
            query, state.summaries.chunks, state.summaries.groups, state.marks, own_chunk, top_chunks=config.top_chunks,
            top_groups=config.top_groups, capacity=min(most, pages), **bounds, **how.settings(),
        )  # fmt: skip
        return replace(state, marks=found.marks), found, found.heads, None
    found = sketch_routing.sketch_routing(
        windows.columns, state.summaries.means, state.summaries.codes, state.summaries.scales, state.stamps, windows.partial.stats,
        own_chunk, group_size=config.group_size, threshold=config.threshold_for(query.shape[1]),
        capacity=min(config.page_capacity, pages), scale=scale, config=how.sketch_config(), **bounds, **how.settings(),
    )  # fmt: skip
    return replace(state, stamps=found.stamps), found, None, found.unopened


def _stats(
    counts: Int[Array, "K 2"],
    seen_by: Int[Array, "K M"] | None,
    unopened: Float[Array, "K G"] | None,
    hits: Int[Array, " K"] | None,
    places: WindowPlaces,
    position: Int[Array, ""],
    group_heads: int,
    config: HGAConfig,
) -> Stats:
    kv_heads = counts.shape[0]
    held, listed, refused = position + 1, counts[:, 0].sum(), counts[:, 1].sum()
    seen = listed / kv_heads
    if seen_by is not None:
        live = jnp.arange(seen_by.shape[1]) < counts[:, :1]
        seen = jnp.where(live, lax.population_count(seen_by), 0).sum() / (kv_heads * group_heads)
    windows = places.valid.sum()
    attended = (windows + config.group_size * seen) / held
    fetched = windows + config.group_size * listed / kv_heads
    missed = jnp.float32(0) if unopened is None else unopened.mean()
    found = (jnp.float32(0), jnp.float32(0)) if hits is None else (hits.sum(), listed)
    numbers = (1, attended, 1, fetched, fetched / held, refused, missed, *found)
    return Stats(*(jnp.asarray(x, jnp.float32) for x in numbers))


def close_chunk(state: LayerState, held: Int[Array, ""], config: HGAConfig, policy: Policy, how: How) -> LayerState:
    """Write the summary of the chunk of the newest token, and its pages to the host tier; provisional while the chunk is open.

    held: tokens held. To be called when a chunk is full and at the end of a decode program; more often does no harm.
    """
    history, per_chunk = state.history, config.groups_per_chunk
    chunk = jnp.maximum(held - 1, 0) // config.chunk_size
    if isinstance(history, HostHistory):
        place = place_of(chunk * per_chunk, config)
        keys = lax.dynamic_slice_in_dim(history.window, place, per_chunk, axis=1)[:, :, 0]
        history = history.with_window_written(place, chunk * per_chunk, per_chunk, how.settings())
    else:
        keys = lax.dynamic_slice_in_dim(history.pages, chunk * per_chunk, per_chunk, axis=1)[:, :, 0]
    keys = keys.reshape(keys.shape[0], config.chunk_size, keys.shape[-1])
    summaries = write(state.summaries, policy.summarise(keys), chunk, 1)
    return replace(state, history=history, summaries=summaries)
