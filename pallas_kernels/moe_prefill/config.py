"""Tunables of the grouped matmuls, and the measured choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pallas_kernels.fp8 import BLOCK, CONVERSIONS, Conversion

# weights: value * scale rounded to bfloat16 before the product (what dequantising first gives). partial: exact values go into the product, the scale
# multiplies the float32 sum of each 128-wide block of the input dimension.
Scaling = Literal["weights", "partial"]


@dataclass(frozen=True)
class Grouped:
    """One program computes `rows` tokens of one expert by `columns` outputs, `depth` of the input dimension at a time.

    weights_first: the weight tile is the left operand (in registers after dequantising; SM90's tensor cores take only the right one from shared memory).
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    scaling: Scaling = "weights"
    weights_first: bool = True
    conversion: Conversion = "cast"

    def __post_init__(self) -> None:
        for name, low, high in (("rows", 16, 256), ("columns", 16, BLOCK), ("depth", 16, BLOCK), ("warps", 1, 16)):
            value = getattr(self, name)
            if not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from {low} to {high}")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages={self.stages} must be from 1 to 8")
        if self.scaling not in ("weights", "partial"):
            raise ValueError(f"scaling={self.scaling!r} must be 'weights' or 'partial'")
        if self.conversion not in CONVERSIONS:
            raise ValueError(f"conversion={self.conversion!r} must be one of {CONVERSIONS}")


@dataclass(frozen=True)
class Config:
    """gate_up and down share `rows`: one table of tiles serves both.

    tokens_per_pass bounds the temporaries: a pass holds tokens * experts_per_token rows of F and of D in bfloat16 (16,384 tokens of Qwen3-30B-A3B:
    0.2 + 0.5 GB). activations: "bfloat16" multiplies dequantised weights (w8a16), "float8" quantises activations per row and 128 inputs (w8a8).
    """

    gate_up: Grouped = field(default_factory=lambda: Grouped(columns=64))
    down: Grouped = field(default_factory=Grouped)
    tokens_per_pass: int = 16384
    activations: Literal["bfloat16", "float8"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.gate_up.rows != self.down.rows:
            raise ValueError(f"gate_up.rows={self.gate_up.rows} and down.rows={self.down.rows} must be equal")
        if self.tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass={self.tokens_per_pass} must be at least 1")
        if self.activations not in ("bfloat16", "float8"):
            raise ValueError(f"activations={self.activations!r} must be 'bfloat16' or 'float8'")
        if self.activations == "float8" and not self.gate_up.depth == self.down.depth == BLOCK:
            raise ValueError(f"float8 activations need depth={BLOCK}: one activation scale per step")
