"""The same in plain XLA, from the operations' own twins."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.routed_decode_attention import Bank
from pallas_kernels.routed_decode_attention.xla import attend, live_places, merge, pages_through_bank, place_pages
from pallas_kernels.sketch_routing.xla import page_list, select


def attend_selected(query, scores, windows, stamps, middle, store, bank, scale, rules):
    """See api.Attended."""
    parts = rules["parts"]
    before, pages = stamps, jnp.arange(stamps.shape[1])
    stamps, fresh, fresh_count, _, _, counts, unopened = select(*scores, windows.stats, stamps, middle, **rules)
    live = live_places(fresh, fresh_count, parts)
    taken = jax.vmap(lambda ids, live: jnp.zeros_like(pages).at[jnp.where(live, ids, len(pages))].set(1, mode="drop"))(fresh, live) > 0
    seen = (before >= middle[2] - 1) & (pages < middle[1] * rules["pages_per_chunk"])
    ids, count = page_list(seen | taken, parts, rules["room"])
    live, hits = live_places(ids, count, parts), None
    if bank is None:
        found = jax.vmap(lambda pages, ids: pages[ids])(store, jnp.where(live, ids, 0))
    else:
        rows = ids.reshape(len(ids), parts, -1)
        page_slot, slot_page, source, hits = jax.vmap(place_pages, (0, 0, 0, 0, 0, None))(
            rows, count, bank.page_slot, bank.slot_page, stamps, middle[2] - 1
        )
        found, kept = pages_through_bank(ids, source.reshape(ids.shape), live, store, bank.pages)
        bank = Bank(kept, page_slot, slot_page)
    out = merge([windows, attend(query, found, live, None, scale)], query.dtype)
    return out, stamps, counts, unopened, bank, hits
