"""The expert MLP, one token and one expert at a time, in numpy float64."""

from __future__ import annotations

import numpy as np


def expert_mlp(x, ids, weights, gate, up, down, round_hidden=lambda hidden: hidden) -> np.ndarray:
    """[T, D] float64; gate, up [E, F, D] and down [E, D, F] already dequantised. `round_hidden` models a kernel that stores the hidden
    vector."""
    x = np.asarray(x).astype(np.float64)
    out = np.zeros_like(x)
    for token, vector in enumerate(x):
        for expert, weight in zip(ids[token], np.asarray(weights[token]).astype(np.float64), strict=True):
            opened = gate[expert] @ vector
            hidden = round_hidden(opened / (1 + np.exp(-opened)) * (up[expert] @ vector))
            out[token] += weight * (down[expert] @ hidden)
    return out
