"""y = x @ W.T for a few rows of x, W stored as block-scaled e4m3 or plain: decode projections and the output head."""

from pallas_kernels.fp8_matvec.config import Config, measured
from pallas_kernels.fp8_matvec.kernel import MAX_ROWS, matvec, matvecs, unsupported

__all__ = ["MAX_ROWS", "Config", "matvec", "matvecs", "measured", "unsupported"]
