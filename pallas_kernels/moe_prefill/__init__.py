"""The chosen experts of many tokens: tokens grouped by expert inside jit, each expert's weights multiplied by its own tokens only."""

from pallas_kernels.moe_prefill.config import Config, Grouped, measured
from pallas_kernels.moe_prefill.kernel import expert_mlp, sort_by_expert, tiles, unsupported

__all__ = ["Config", "Grouped", "expert_mlp", "measured", "sort_by_expert", "tiles", "unsupported"]
