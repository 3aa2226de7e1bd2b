"""From one token's joined q, k, v products to heads: q/k norm where the family has it, and rotation."""

from pallas_kernels.rotate_heads.api import rotate_heads
from pallas_kernels.rotate_heads.xla import turn

__all__ = ["rotate_heads", "turn"]
