"""Tunables of the matvec kernel, and the measured choices."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.fp8 import BLOCK, CONVERSIONS, Conversion


@dataclass(frozen=True)
class Config:
    """One program multiplies `rows` rows of W, `columns` columns at a time, `in_flight` such pieces loaded before the first is used."""

    rows: int = 2
    columns: int = 2048
    in_flight: int = 2
    warps: int = 4
    conversion: Conversion = "cast"

    def __post_init__(self) -> None:
        for name, low, high in (("rows", 1, BLOCK), ("columns", 16, 8192), ("warps", 1, 16)):
            value = getattr(self, name)
            if not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from {low} to {high}")
        if self.in_flight < 1:
            raise ValueError(f"in_flight={self.in_flight} must be at least 1")
        if self.conversion not in CONVERSIONS:
            raise ValueError(f"conversion={self.conversion!r} must be one of {CONVERSIONS}")


def measured(tokens: int = 1, conversion: Conversion = "cast") -> Config:
    """Fastest of a sweep on an H100 (JAX 0.11.2, reads 3117 GB/s) over Qwen3-30B-A3B's projections; dividing the input dimension
    among programs never paid.

    One token, FP8: [5120, 2048] 6.6 us (floor 3.4), [2048, 4096] 5.6 (2.7), [512, 2048] 2.4 (0.3: an empty launch is 2.3).
    q, k and v in one launch, [4096 + 512 + 512, 2048]: 6.2. XLA's own: [2048, 4096] 4.8; bfloat16 router [128, 2048] 2.1 (here 1.5).
    bfloat16 head [151936, 2048]: 212 us (floor 200), 94 % of the read rate. Four tokens take 9 to 10 us on the first two.
    """
    if tokens == 1:
        return Config(rows=2, columns=4096, warps=4, conversion=conversion)
    return Config(rows=8, columns=1024, warps=4, conversion=conversion)
