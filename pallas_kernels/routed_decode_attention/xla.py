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


def _live(ids, counts, parts):
    """Which entries of the lists are valid."""
    room = ids.shape[1] // parts
    return (jnp.arange(room) < counts[:, :parts, None]).reshape(ids.shape)


def plan_bank(ids, counts, page_slot, slot_page, recency, needed, parts):
    def one(ids, live, page_slot, slot_page, recency):
        rank = jnp.arange(ids.shape[0])
        slot = jnp.where(live, page_slot[ids], -1)
        missed = live & (slot < 0)
        source = jnp.where(missed, -jnp.cumsum(missed), slot)
        age = jnp.where(slot_page >= 0, recency[jnp.maximum(slot_page, 0)], -(2**30))
        order = jnp.argsort(age, stable=True)
        free = jnp.minimum(missed.sum(), (age < needed[0]).sum())
        place = jnp.arange(slot_page.shape[0])
        evicted = jnp.where(place < free, slot_page[order], -1)
        page_slot = page_slot.at[jnp.where(evicted >= 0, evicted, page_slot.shape[0])].set(-1, mode="drop")
        chosen = jnp.sort(jnp.where(place < free, order, slot_page.shape[0]))  # in slot order, as the kernel gives them
        victims = jnp.where(rank < free, chosen[jnp.minimum(rank, slot_page.shape[0] - 1)], -1)
        return page_slot, source, victims, live.sum() - missed.sum()

    out = jax.vmap(one)(ids, _live(ids, counts, parts), page_slot, slot_page, recency)
    return tuple(x.astype(jnp.int32) for x in out)


def page_attention(query, ids, counts, store, heads, bank, plan, parts, *, scale):
    capacity = ids.shape[1]
    group_size = store.shape[3]
    live = _live(ids, counts, parts)
    pages = jax.vmap(lambda pages, ids: pages[ids])(store, jnp.where(live, ids, 0))
    updated = ()
    if bank is not None:
        (kept, page_slot, slot_page), (source, victims) = bank, plan
        hit = live & (source >= 0)
        from_bank = jax.vmap(lambda pages, slots: pages[slots])(kept, jnp.where(hit, source, 0))
        pages = jnp.where(hit[:, :, None, None, None], from_bank, pages)
        target = jnp.take_along_axis(victims, jnp.where(live & ~hit, -1 - source, 0), axis=1)
        filled = live & ~hit & (target >= 0)
        slot, page = jnp.where(filled, target, kept.shape[1]), jnp.where(filled, ids, store.shape[1])
        kept = jax.vmap(lambda kept, slot, pages: kept.at[slot].set(pages, mode="drop"))(kept, slot, pages)
        page_slot = jax.vmap(lambda table, page, slot: table.at[page].set(slot, mode="drop"))(page_slot, page, target)
        slot_page = jax.vmap(lambda table, slot, page: table.at[slot].set(page, mode="drop"))(slot_page, slot, ids)
        updated = (kept, page_slot, slot_page)
    keys, values = _tokens(pages)
    visible = jnp.broadcast_to(live[:, None], (*query.shape[:2], capacity))
    if heads is not None:
        visible = visible & ((heads[:, None] >> jnp.arange(query.shape[1])[:, None]) & 1 > 0)
    return *_partial(query, keys, values, jnp.repeat(visible, group_size, axis=-1), scale), *updated


def merge(parts, dtype):
    peaks = jnp.concatenate([stats[:, :, 0] for _, stats in parts], axis=1)  # [K, splits, G]
    totals = jnp.concatenate([stats[:, :, 1] for _, stats in parts], axis=1)
    acc = jnp.concatenate([acc for acc, _ in parts], axis=1)
    peak = peaks.max(1, keepdims=True)
    weight = jnp.exp(peaks - jnp.where(peak > -jnp.inf, peak, 0))
    total = (totals * weight).sum(1)
    return ((acc * weight[..., None]).sum(1) / jnp.where(total > 0, total, 1)[..., None]).astype(dtype)
