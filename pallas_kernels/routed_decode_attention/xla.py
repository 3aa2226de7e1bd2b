"""The same operations in plain XLA: any device, any sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _partial(query, keys, values, visible, scale):
    """query [K, G, H], keys and values [K, T, H], visible [K, G, T] -> acc [K, 1, G, H], stats [K, 1, 2, G]."""
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    scores = jnp.einsum("kgh,kth->kgt", scaled, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = scores.max(-1)
    weights = jnp.exp(scores - jnp.where(peak > -jnp.inf, peak, 0)[..., None])
    acc = jnp.einsum("kgt,kth->kgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return acc[:, None], jnp.stack([peak, weights.sum(-1)], axis=1)[:, None]


def _tokens(pages):
    """[K, n, 2, g, H] -> keys and values [K, n*g, H]."""
    kv_heads, n, _, group_size, head_dim = pages.shape
    return (pages[:, :, part].reshape(kv_heads, n * group_size, head_dim) for part in (0, 1))


def window_attention(query, window, valid, pages, fresh, *, scale):
    if fresh is not None:
        key, value, place = fresh
        page = place[0] if pages is None else pages[place[0]]
        token = jnp.stack([key, value], axis=1)[:, None, :, None].astype(window.dtype)  # [K, 1, 2, 1, H]
        window = jax.lax.dynamic_update_slice(window, token, (0, page, 0, place[1], 0))
    group_size = window.shape[3]
    live = (jnp.arange(group_size) < valid[:, None]).reshape(-1)
    there = window if pages is None else window[:, jnp.clip(pages, 0, window.shape[1] - 1)]
    keys, values = _tokens(jnp.where(live.reshape(1, -1, 1, group_size, 1), there, 0))  # rows never written may hold anything
    return *_partial(query, keys, values, jnp.broadcast_to(live, (*query.shape[:2], live.shape[0])), scale), window


def copy_pages(target, source, where, most):
    most = min(most, source.shape[1], target.shape[1])
    row = jnp.arange(most)
    first = jnp.clip(where[0], 0, source.shape[1] - most), jnp.clip(where[1], 0, target.shape[1] - most)
    old = jax.lax.dynamic_slice_in_dim(target, first[1], most, axis=1)
    new = jax.lax.dynamic_slice_in_dim(source, first[0], most, axis=1).astype(target.dtype)
    # A stretch that would pass an end was moved inside: row r of `old` is page r - shift of the copy, which lies in another row of `new`.
    copied = row - (where[1] - first[1])
    new = new[:, jnp.clip(copied + where[0] - first[0], 0, most - 1)]
    fresh = ((copied >= 0) & (copied < where[2]))[:, None, None, None]
    return jax.lax.dynamic_update_slice_in_dim(target, jnp.where(fresh, new, old), first[1], axis=1)


def live_places(ids, counts, parts):
    """Which entries of the lists are valid."""
    room = ids.shape[1] // parts
    return (jnp.arange(room) < counts[:, :parts, None]).reshape(ids.shape)


def place_pages(ids, count, page_slot, slot_page, recency, needed):
    """Where each listed page of one kv head is: ids [parts, room], count [parts], the tables of the bank. Returns (page_slot, slot_page,
    source [parts, room]: slot of a page in the bank, -1 for one that is only read, -2 - slot for one to be put there; hits [parts])."""
    parts, room = ids.shape
    slots = slot_page.shape[0]
    live = jnp.arange(room) < count[:, None]
    slot = jnp.where(live, page_slot[ids], -1)
    missed = live & (slot < 0)
    each = -(-slots // parts)
    first, last = (part * slots // parts for part in (jnp.arange(parts), jnp.arange(1, parts + 1)))
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


def page_attention(query, ids, counts, store, heads, parts, *, scale):
    live = live_places(ids, counts, parts)
    pages = jax.vmap(lambda pages, ids: pages[ids])(store, jnp.where(live, ids, 0))
    return attend(query, pages, live, heads, scale)


def attend(query, pages, live, heads, scale):
    """acc and stats over the live ones of the pages [K, M, 2, g, H]."""
    keys, values = _tokens(pages)
    visible = jnp.broadcast_to(live[:, None], (*query.shape[:2], live.shape[1]))
    if heads is not None:
        visible = visible & ((heads[:, None] >> jnp.arange(query.shape[1])[:, None]) & 1 > 0)
    return _partial(query, keys, values, jnp.repeat(visible, pages.shape[3], axis=-1), scale)


def merge(parts, dtype):
    peaks = jnp.concatenate([stats[:, :, 0] for _, stats in parts], axis=1)  # [K, splits, G]
    totals = jnp.concatenate([stats[:, :, 1] for _, stats in parts], axis=1)
    acc = jnp.concatenate([acc for acc, _ in parts], axis=1)
    peak = peaks.max(1, keepdims=True)
    weight = jnp.exp(peaks - jnp.where(peak > -jnp.inf, peak, 0))
    total = (totals * weight).sum(1)
    return ((acc * weight[..., None]).sum(1) / jnp.where(total > 0, total, 1)[..., None]).astype(dtype)
