"""The heads in numpy float64."""

from __future__ import annotations

import numpy as np


def rotate_heads(joined, cos, sin, q_weight, k_weight, eps: float, heads: int, kv_heads: int) -> tuple[np.ndarray, ...]:
    """(q, k, v) [T, N or K, H]; q_weight, k_weight [H] of the norms, or None."""
    tokens, width = joined.shape[0], joined.shape[1] // (heads + 2 * kv_heads)
    out = np.asarray(joined).astype(np.float64).reshape(tokens, -1, width)
    for first, last, weight in ((0, heads, q_weight), (heads, heads + kv_heads, k_weight)):
        for t in range(tokens):
            for n in range(first, last):
                row = out[t, n]
                if weight is not None:
                    row = row / np.sqrt(np.mean(row**2) + eps) * np.asarray(weight, np.float64)
                pairs = (row[: width // 2] + 1j * row[width // 2 :]) * (np.asarray(cos)[t] + 1j * np.asarray(sin)[t])
                out[t, n] = np.concatenate([pairs.real, pairs.imag])
    return out[:, :heads], out[:, heads : heads + kv_heads], out[:, heads + kv_heads :]
