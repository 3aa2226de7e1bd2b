"""The same in plain XLA, from the operations' own twins."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.routed_decode_attention import Bank
from pallas_kernels.routed_decode_attention.xla import attend, live_places, merge
from pallas_kernels.sketch_decode.bank import slots_of_part
from pallas_kernels.sketch_routing.xla import page_list, select
from pallas_kernels.votes import is_open, oldest_open


def attend_selected(query, scores, windows, stamps, middle, store, bank, scale, rules):
    """See api.Attended."""
    parts = rules["parts"]
    before, pages = stamps, jnp.arange(stamps.shape[1])
    stamps, fresh, fresh_count, _, _, counts, unopened = select(*scores, windows.stats, stamps, middle, **rules)
    live = live_places(fresh, fresh_count, parts)
    taken = jax.vmap(lambda ids, live: jnp.zeros_like(pages).at[jnp.where(live, ids, len(pages))].set(1, mode="drop"))(fresh, live) > 0
    seen = is_open(before, middle[2], rules["votes"]) & (pages < middle[1] * rules["pages_per_chunk"])
    ids, count = page_list(seen | taken, parts, rules["room"])
    live, hits = live_places(ids, count, parts), None
    if bank is None:
        found = jax.vmap(lambda pages, ids: pages[ids])(store, jnp.where(live, ids, 0))
    else:
        rows = ids.reshape(len(ids), parts, -1)
        page_slot, slot_page, source, hits = jax.vmap(place_pages, (0, 0, 0, 0, 0, None))(
            rows, count, bank.page_slot, bank.slot_page, stamps, oldest_open(middle[2], rules["votes"])
        )
        found, kept = pages_through_bank(ids, source.reshape(ids.shape), live, store, bank.pages)
        bank = Bank(kept, page_slot, slot_page)
    out = merge([windows, attend(query, found, live, None, scale)], query.dtype)
    return out, stamps, counts, unopened, bank, hits


def place_pages(ids, count, page_slot, slot_page, recency, needed):
    """`bank.place_pages` for all parts of one kv head: ids [parts, room], count [parts], the tables of the bank, recency [P]. Returns
    (page_slot, slot_page, source [parts, room], hits [parts])."""
    parts, room = ids.shape
    slots = slot_page.shape[0]
    live = jnp.arange(room) < count[:, None]
    slot = jnp.where(live, page_slot[ids], -1)
    missed = live & (slot < 0)
    each = -(-slots // parts)
    first, last = slots_of_part(jnp.arange(parts), parts, slots)
    index = first[:, None] + jnp.arange(each)
    mine = index < last[:, None]
    held = jnp.where(mine, slot_page[jnp.minimum(index, slots - 1)], -1)
    age = jnp.where(held >= 0, recency[jnp.maximum(held, 0)], -(2**30))
    free = mine & (age < needed)
    order = jnp.argsort(jnp.where(free, age, 2**30), axis=1, stable=True)
    wanted = jnp.minimum(missed.sum(1), free.sum(1))
    taken = jnp.zeros_like(free).at[jnp.arange(parts)[:, None], order].set(jnp.arange(each) < wanted[:, None])
    chosen = jnp.sort(jnp.where(taken, index, slots), axis=1)  # in slot order, as the kernel gives them
    turn = jnp.cumsum(missed, axis=1) - 1
    got = missed & (turn < wanted[:, None])
    target = jnp.take_along_axis(chosen, jnp.where(got, turn, 0), axis=1)
    page_slot = page_slot.at[jnp.where(taken & (held >= 0), held, page_slot.shape[0])].set(-1, mode="drop")
    page_slot = page_slot.at[jnp.where(got, ids, page_slot.shape[0])].set(target, mode="drop")
    slot_page = slot_page.at[jnp.where(got, target, slots)].set(ids, mode="drop")
    return page_slot, slot_page, jnp.where(got, -2 - target, slot), count - missed.sum(1)


def pages_through_bank(ids, source, live, store, kept):
    """The listed pages [K, M, 2, g, H] from bank or store, and the bank's pages with those put there."""
    hit, filled = live & (source >= 0), live & (source < -1)
    pages = jax.vmap(lambda pages, ids: pages[ids])(store, jnp.where(live, ids, 0))
    from_bank = jax.vmap(lambda pages, slots: pages[slots])(kept, jnp.where(hit, source, 0))
    pages = jnp.where(hit[:, :, None, None, None], from_bank, pages)
    slot = jnp.where(filled, -2 - source, kept.shape[1])
    return pages, jax.vmap(lambda kept, slot, pages: kept.at[slot].set(pages, mode="drop"))(kept, slot, pages)
