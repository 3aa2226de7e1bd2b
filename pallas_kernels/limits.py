"""Sizes that kernels cannot pass: their element offsets are int32."""

from __future__ import annotations

import math

MAX_ELEMENTS = 2**31


def check_offsets(**arrays) -> None:
    """Refuse arrays whose element offsets do not fit in int32, by name."""
    for name, array in arrays.items():
        if math.prod(array.shape) >= MAX_ELEMENTS:
            raise ValueError(
                f"{name} of shape {tuple(array.shape)}: {math.prod(array.shape)} elements, kernels take fewer than {MAX_ELEMENTS} (int32): "
                "use one array per layer, or shard the kv heads"
            )


def power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
