"""The chosen experts of 1 to 4 tokens, read straight from the stacked expert weights by id: two launches a layer."""

from pallas_kernels.moe_decode.config import Config, measured
from pallas_kernels.moe_decode.kernel import MAX_TOKENS, expert_mlp, unsupported

__all__ = ["MAX_TOKENS", "Config", "expert_mlp", "measured", "unsupported"]
