"""Tunables of the grouped matmuls, and the measured choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.fp8 import BLOCK, CONVERSIONS, Conversion

# weights: value * scale rounded to bfloat16 before the product (what dequantising first gives). partial: exact values go into the product,
# the scale multiplies the float32 sum of each 128-wide block of the input dimension.
Scaling = Literal["weights", "partial"]


@dataclass(frozen=True)
class Grouped:
    """One program computes `rows` tokens of one expert by `columns` outputs, `depth` of the input dimension at a time.

    operand: what FP8 values become for the tensor cores. float16 holds them exactly and converts in a sixth of the instructions;
    activations are then float16 times 2**-6 (saturating at 4e6), whose 11 bits of mantissa exceed bfloat16's 8.
    weights_first: the weight tile is the left operand (in registers after dequantising; SM90's tensor cores take only the right one from
    shared memory).
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    scaling: Scaling = "weights"
    weights_first: bool = False
    operand: Literal["bfloat16", "float16"] = "bfloat16"
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
        if self.operand not in ("bfloat16", "float16"):
            raise ValueError(f"operand={self.operand!r} must be 'bfloat16' or 'float16'")
        if self.conversion not in CONVERSIONS:
            raise ValueError(f"conversion={self.conversion!r} must be one of {CONVERSIONS}")


@dataclass(frozen=True)
class Config:
    """tokens_per_pass bounds the temporaries: a pass holds tokens * experts_per_token rows of F and of D in 16 bits (16,384 tokens of
    Qwen3-30B-A3B: 0.2 + 0.5 GB).

    There is no w8a8 option: Pallas' dot asks Triton for exact accumulation, which keeps FP8 operands off SM90's FP8 tensor cores
    (measured with per-128 activation scales: 207 TFLOP/s where w8a16 had 310).
    """

    gate_up: Grouped
    down: Grouped
    tokens_per_pass: int = 16384

    def __post_init__(self) -> None:
        if self.gate_up.operand != self.down.operand:
            raise ValueError(f"gate_up.operand={self.gate_up.operand!r} and down.operand={self.down.operand!r} must be equal")
        if self.tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass={self.tokens_per_pass} must be at least 1")


def measured(conversion: Conversion = "cast") -> Config:
    """Fastest of about 150 settings on an H100 (JAX 0.11.2) at Qwen3-30B-A3B's shape; 74 and 57 KB of shared memory, inside SM120's 99.

    16,384 tokens: gate_up 2.07 ms (398 TFLOP/s), down 1.16 ms (357), together 50 % of the 768 TFLOP/s of a bfloat16 matmul in the same run
    (floor 1.07 + 0.54 ms). Beside them a pass spends about 0.1 ms on sorting and 0.22 ms on the sum over experts. bfloat16 operands: 373
    and 323 TFLOP/s. Larger tiles read less from L2 but leave one program an SM, and nothing then hides the dequantising: 333 at
    128x(2x128).
    """
    return Config(
        gate_up=Grouped(rows=128, columns=64, depth=64, warps=4, stages=3, operand="float16", conversion=conversion),
        down=Grouped(rows=64, columns=128, depth=64, warps=4, stages=3, operand="float16", conversion=conversion),
    )
