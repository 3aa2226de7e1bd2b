"""Long context on one GPU, in JAX: Hierarchical Global Attention for stock GQA/RoPE checkpoints (arXiv 2606.30709).

>>> model = hga_jax.load_model()                      # SmolLM2-135M-Instruct, fetched once
>>> model.generate("Name three rivers.").text
>>> hga_jax.hga_attention(query, key, value, config=hga_jax.HGAConfig(), rope=hga_jax.RopeConfig(theta=1e6))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hga_jax.adapters import AttentionCache, FlaxAttention, dot_product_attention
    from hga_jax.attention import HGAAttention, hga_attention, opened_pages
    from hga_jax.backend import AttentionBackend, DenseAttention
    from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
    from hga_jax.generation import GenerateResult
    from hga_jax.language_model import LanguageModel
    from hga_jax.loading import load_model

# Loaded when first used, so that the command line answers wrong options before JAX is imported.
_HOMES = {
    "AttentionBackend": "backend",
    "AttentionCache": "adapters",
    "DenseAttention": "backend",
    "FlaxAttention": "adapters",
    "GenerateResult": "generation",
    "HGAAttention": "attention",
    "HGAConfig": "config",
    "LanguageModel": "language_model",
    "ModelConfig": "config",
    "RopeConfig": "config",
    "dot_product_attention": "adapters",
    "hga_attention": "attention",
    "load_model": "loading",
    "opened_pages": "attention",
}
__all__ = [
    "AttentionBackend",
    "AttentionCache",
    "DenseAttention",
    "FlaxAttention",
    "GenerateResult",
    "HGAAttention",
    "HGAConfig",
    "LanguageModel",
    "ModelConfig",
    "RopeConfig",
    "dot_product_attention",
    "hga_attention",
    "load_model",
    "opened_pages",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hga_jax' has no attribute {name!r}")
    return getattr(import_module(f"hga_jax.{_HOMES[name]}"), name)
