"""Attention over a set of tokens per query head, in float64 numpy."""

from __future__ import annotations

import numpy as np


def reference_attention(query, window, valid, store, listed, heads, scale):
    """query [K, G, H]; window [K, W, 2, g, H] with valid[w] tokens; store [K, P, 2, g, H]; listed: page ids of each kv head;
    heads: for each kv head a dict page -> set of query heads that see it, or None. Heads that see nothing get zeros."""
    query, window, store = (np.asarray(x, np.float64) for x in (query, window, store))
    kv_heads, ratio, head_dim = query.shape
    out = np.zeros((kv_heads, ratio, head_dim))
    for k in range(kv_heads):
        for n in range(ratio):
            keys, values = [], []
            for w in range(window.shape[1]):
                keys += list(window[k, w, 0, : valid[w]])
                values += list(window[k, w, 1, : valid[w]])
            for page in listed[k]:
                if heads is None or n in heads[k][page]:
                    keys += list(store[k, page, 0])
                    values += list(store[k, page, 1])
            if keys:
                scores = np.array(keys) @ query[k, n] * scale
                weights = np.exp(scores - scores.max())
                out[k, n] = weights @ np.array(values) / weights.sum()
    return out
