"""The expert choice in numpy float64."""

from __future__ import annotations

import numpy as np


def moe_routing(scores, choices: int, renormalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) [T, k]: the highest scores first, of equal ones the lower expert first."""
    scores = np.asarray(scores).astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :choices]
    share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    weights = np.take_along_axis(share, ids, 1)
    return ids, weights / weights.sum(1, keepdims=True) if renormalise else weights
