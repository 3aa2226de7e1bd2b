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
