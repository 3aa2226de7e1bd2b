"""x @ (values * scales).T in numpy float64."""

from __future__ import annotations

import numpy as np


def dequantize(values, scales=None, block: int = 128) -> np.ndarray:
    """[..., out, in] float64."""
    wide = np.asarray(values).astype(np.float64)
    if scales is None:
        return wide
    out = np.empty_like(wide)
    for i in range(wide.shape[-2]):
        for j in range(0, wide.shape[-1], block):
            out[..., i, j : j + block] = wide[..., i, j : j + block] * np.asarray(scales, np.float64)[..., i // block, j // block, None]
    return out


def matvec(x, values, scales=None) -> np.ndarray:
    """[T, out] float64."""
    return np.asarray(x).astype(np.float64) @ dequantize(values, scales).T
