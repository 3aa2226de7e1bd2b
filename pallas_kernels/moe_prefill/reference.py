"""The expert MLP for many tokens in numpy float64, expert by expert."""

from __future__ import annotations

import numpy as np


def expert_mlp(x, ids, weights, gate, up, down) -> np.ndarray:
    """[T, D] float64; gate, up [E, F, D] and down [E, D, F] already dequantised."""
    x, ids, weights = np.asarray(x).astype(np.float64), np.asarray(ids), np.asarray(weights).astype(np.float64)
    out = np.zeros_like(x)
    for expert in range(gate.shape[0]):
        tokens, choices = np.nonzero(ids == expert)
        opened = x[tokens] @ gate[expert].T
        hidden = opened / (1 + np.exp(-opened)) * (x[tokens] @ up[expert].T)
        np.add.at(out, tokens, weights[tokens, choices, None] * (hidden @ down[expert].T))
    return out
