"""Opening a checkpoint: where it is, how wide its numbers are, and the LanguageModel made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hga_jax.config import ModelConfig
from hga_jax.default_model import default_model_path
from hga_jax.language_model import LanguageModel


def locate_model(model: str | Path | None) -> tuple[Path, str]:
    """A local path and a name for a model given as path, hub id, or None (the built-in small model). Raises ValueError."""
    if model is None:
        return default_model_path(), "SmolLM2-135M-Instruct"
    path = Path(model).expanduser()
    if path.exists():
        return path, path.name
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"model {str(model)!r} is neither a file or directory here nor a hub id such as Qwen/Qwen3-0.6B")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"model {str(model)!r} is not here and downloading it needs huggingface_hub: pip install 'hga-jax[hub]'") from None
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])), str(model)
    except Exception as error:  # the hub's errors have many types and long texts; the user needs the first line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"downloading {str(model)!r} failed ({reason}): check the name and the network, or pass a local directory"
        ) from None


def default_dtype() -> Any:
    """float32 on a CPU, where bfloat16 products are slow; bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load_model(
    model: str | Path | None = None,
    *,
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
    before_weights: Callable[[ModelConfig, Any], int | None] | None = None,
    host_experts: int = 0,
) -> LanguageModel:
    """Open a checkpoint: a Hugging Face directory, a GGUF file, a directory that `python -m convert` wrote, a hub id, or None.

    None is SmolLM2-135M-Instruct, fetched once into the user's cache.
    dtype: of weights and K/V (FP8 weights stay FP8); default float32 on a CPU, bfloat16 elsewhere.
    progress hears (bytes done, of how many). before_weights is called with the config and dtype before any weight is read, so that a
    plan can refuse in time; what it returns, if anything, replaces host_experts. host_experts: in how many layers the experts lie in pinned
    host memory, which makes room on an NVIDIA GPU for long histories (hga_jax.plan.layers_to_host says how many a context asks for).
    Raises ValueError with one line that says what to do.
    """
    from convert import load_decoder, read_config, read_tokenizer

    path, name = locate_model(model)
    dtype = default_dtype() if dtype is None else dtype
    if before_weights is not None:
        asked = before_weights(read_config(path), dtype)
        host_experts = host_experts if asked is None else asked
    decoder, config = load_decoder(path, dtype=dtype, progress=progress, host_experts=host_experts)
    return LanguageModel(decoder, config, read_tokenizer(path), name)
