"""The books of a bank: which pages it keeps, in which slots.

A bank's slots are dealt out to the parts of the page lists (page p is of part p % parts), evenly and for good: a page is only ever kept in
a slot of its own part. So the program that selects and reads a part's pages keeps their books too, and none waits for another.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def slots_of_part(part, parts: int, slots: int):
    """First and end of the bank's slots that pages of one part may have."""
    return part * slots // parts, (part + 1) * slots // parts


def place_pages(
    k,  # kv head
    part,  # of its pages and slots
    begin,  # the list of this part's pages: its first place in ids
    listed,  # and how many pages it has
    room: int,  # pages it may have
    needed,  # pages at least this recent stay (votes.oldest_open)
    ids_ref,  # [K, parts * room] i32 device
    recency_ref,  # [K, P] i32 device: when each page was last requested, the stamps
    hits_ref,  # [K, parts] i32 device, out: pages found in the bank
    source_ref,  # [K, parts * room] i32 device, out: slot of a page in the bank; -1 for one that is only read; -2 - slot for one put there
    victims_ref,  # [K, parts * room] i32 device, for notes
    page_slot_ref,  # [K, P] i32 device, in place: -1 where the page has no slot
    slot_page_ref,  # [K, slots] i32 device, in place: -1 where the slot is empty
    wait,  # until all threads' writes are seen by all
):
    """Find the listed pages in the bank, and slots of this part for the missing ones: empty ones, then those of the pages requested longest
    ago. Where slots run short, the last missing pages are only read."""
    parts, slots = hits_ref.shape[1], slot_page_ref.shape[1]
    rank = jnp.arange(pl.next_power_of_2(room))
    place = jnp.where(rank < room, begin + rank, ids_ref.shape[1])
    live = rank < listed
    page = plgpu.load(ids_ref.at[k, place], mask=live, other=0)
    slot = plgpu.load(page_slot_ref.at[k, page], mask=live, other=-1)
    missed = (live & (slot < 0)).astype(jnp.int32)
    misses = jnp.sum(missed)
    hits_ref[k, part] = listed - misses

    @pl.when(misses == 0)
    def _():
        plgpu.store(source_ref.at[k, place], slot, mask=live)

    @pl.when(misses > 0)
    def _():
        first, last = slots_of_part(part, parts, slots)
        index = jnp.arange(pl.next_power_of_2(-(-slots // parts)))
        mine = index < last - first
        held = plgpu.load(slot_page_ref.at[k, first + index], mask=mine, other=-1)
        recency = plgpu.load(recency_ref.at[k, jnp.maximum(held, 0)], mask=held >= 0, other=-(2**30))
        free = mine & (recency < needed)
        recency = jnp.where(free, recency, 2**30)
        wanted = jnp.minimum(misses, jnp.sum(free.astype(jnp.int32)))

        # The smallest age bound with enough slots at or below it: empty slots and the oldest pages go first.
        def narrow(bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            enough = jnp.sum((recency <= middle).astype(jnp.int32)) >= wanted
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        oldest = jnp.maximum(jnp.min(recency), -4)
        bound, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (oldest - 1, jnp.maximum(needed, oldest)))
        older, equal = (recency < bound).astype(jnp.int32), (recency == bound).astype(jnp.int32)
        spare = wanted - jnp.sum(older)
        chosen = older + equal * (jnp.cumsum(equal, axis=0) <= spare).astype(jnp.int32)
        turn = jnp.cumsum(chosen, axis=0) - 1
        put = (chosen > 0) & (turn < wanted)
        plgpu.store(victims_ref.at[k, jnp.where(put, begin + turn, ids_ref.shape[1])], first + index, mask=put)
        evicted = put & (held >= 0)
        plgpu.store(page_slot_ref.at[k, jnp.where(evicted, held, page_slot_ref.shape[1])], jnp.full_like(held, -1), mask=evicted)
        wait()
        turn = jnp.cumsum(missed, axis=0) - 1
        got = (missed > 0) & (turn < wanted)
        target = plgpu.load(victims_ref.at[k, jnp.where(got, begin + turn, 0)], mask=got, other=0)
        plgpu.store(page_slot_ref.at[k, jnp.where(got, page, page_slot_ref.shape[1])], target, mask=got)
        plgpu.store(slot_page_ref.at[k, jnp.where(got, target, slots)], page, mask=got)
        plgpu.store(source_ref.at[k, place], jnp.where(got, -2 - target, slot), mask=live)
