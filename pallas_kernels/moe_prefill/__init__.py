"""The chosen experts of many tokens: tokens grouped by expert inside jit, each expert's weights multiplied by its own tokens only."""

from pallas_kernels.moe_prefill.config import Config, Grouped
from pallas_kernels.moe_prefill.kernel import expert_mlp, group_by_expert, unsupported

__all__ = ["Config", "Grouped", "expert_mlp", "group_by_expert", "unsupported"]
