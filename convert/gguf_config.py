"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from hga_jax.config import LinearScaling, Llama3Scaling, ModelConfig, RopeConfig, YarnScaling

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
# Every Llama 3.x release has these, and GGUF keeps only the factors they give: transformers' `rope_scaling` of rope_type llama3.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def config_from_gguf(metadata: Mapping[str, Any], tensors: Collection[str], rope_factors: np.ndarray | None = None) -> ModelConfig:
    """The model a GGUF file holds. tensors: the names in the file; rope_factors: its `rope_freqs.weight`, where it has one.

    Raises ValueError naming the key that is missing or the value that is not supported.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture={arch!r} is not supported: supported are {', '.join(ARCHITECTURES)}")
    get = _Keys(metadata, arch)
    hidden, heads, layers = int(get("embedding_length")), int(get("attention.head_count")), int(get("block_count"))
    head_dim = int(get("attention.key_length", hidden // heads))
    if (value_dim := int(get("attention.value_length", head_dim))) != head_dim:
        raise ValueError(f"{arch}.attention.value_length={value_dim} differs from key_length={head_dim}: that is not supported")
    if (rotated := int(get("rope.dimension_count", head_dim))) != head_dim:
        raise ValueError(f"{arch}.rope.dimension_count={rotated} of {head_dim} is not supported: the whole head must rotate")
    context = int(get("context_length"))
    if (window := int(get("attention.sliding_window", 0))) and window < context:
        raise ValueError(f"{arch}.attention.sliding_window={window} is not supported: only full attention layers are")
    experts = int(get("expert_count", 0))
    if bool(experts) != (arch == "qwen3moe"):
        raise ValueError(f"{arch}.expert_count={experts} is not supported: experts go with the architecture qwen3moe")
    vocab = metadata.get(f"{arch}.vocab_size")
    if vocab is None:
        if "tokenizer.ggml.tokens" not in metadata:
            raise ValueError(f"the metadata lacks both {arch}.vocab_size and tokenizer.ggml.tokens")
        vocab = len(metadata["tokenizer.ggml.tokens"])
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    return ModelConfig(
        model_type=ARCHITECTURES[arch], vocab_size=int(vocab), hidden_size=hidden, layers=layers, heads=heads,
        kv_heads=int(get("attention.head_count_kv", heads)), head_dim=head_dim, mlp_size=int(get("feed_forward_length")),
        native_context=context, rope=_rope(get, context, head_dim, rope_factors),
        rms_eps=_shortest(get("attention.layer_norm_rms_epsilon")), qk_norm=arch in ("qwen3", "qwen3moe"),
        qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in tensors, output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors, tie_embeddings="output.weight" not in tensors,
        experts=experts, experts_per_token=int(get("expert_used_count")) if experts else 0,
        expert_size=int(get("expert_feed_forward_length")) if experts else 0,
        norm_topk_prob=bool(get("expert_weights_norm", True)) if experts else False,
        dense_layers=tuple(i for i in range(layers) if f"blk.{i}.ffn_gate_inp.weight" not in tensors) if experts else (),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"), eos_token_ids=() if eos is None else (int(eos),),
    )  # fmt: skip


class _Keys:
    """Reads `<architecture>.<key>`; without a default a missing key is an error."""

    def __init__(self, metadata: Mapping[str, Any], arch: str):
        self.metadata, self.arch = metadata, arch

    def __call__(self, key: str, *default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}")
        if value is None and not default:
            raise ValueError(f"the metadata lacks {self.arch}.{key}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ValueError(f"{self.arch}.{key} differs from layer to layer ({value[:4]}...): that is not supported")
            value = value[0]
        return default[0] if value is None else value


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: GGUF's 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _rope(get: _Keys, context: int, head_dim: int, factors: np.ndarray | None) -> RopeConfig:
    theta = _shortest(get("rope.freq_base"))
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        scaling = None
        if (old := float(get("rope.scale_linear", 1.0))) != 1.0:  # what files of 2023 wrote
            scaling = LinearScaling(old)
    elif kind == "linear":
        scaling = LinearScaling(_shortest(get("rope.scaling.factor")))
    elif kind == "yarn":
        factor, extra = _shortest(get("rope.scaling.factor")), _shortest(get("rope.scaling.attn_factor", 1.0))
        scaling = YarnScaling(
            factor,
            int(get("rope.scaling.original_context_length", context)),
            beta_fast=_shortest(get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=_shortest(get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=None if extra == 1.0 else extra * (0.1 * math.log(factor) + 1.0),
        )
    else:
        raise ValueError(f"{get.arch}.rope.scaling.type={kind!r} is not supported: supported are none, linear, yarn")
    if factors is not None and not np.all(factors == 1.0):
        if scaling is not None:
            raise ValueError(f"rope_freqs.weight beside {get.arch}.rope.scaling.type={kind!r} is not supported")
        scaling = _llama3(theta, head_dim, np.asarray(factors, np.float64))
    return RopeConfig(theta, scaling)


def llama3_factors(theta: float, head_dim: int, scaling: Llama3Scaling) -> np.ndarray:
    """What llama.cpp writes as rope_freqs.weight: by how much each pair's frequency is divided, [H/2]."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ramp = (scaling.original_context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = np.clip(ramp, 0.0, 1.0)
    return 1.0 / ((1 - ramp) / scaling.factor + ramp)


def _llama3(theta: float, head_dim: int, factors: np.ndarray) -> Llama3Scaling:
    scaling = Llama3Scaling(float(np.round(factors.max(), 4)), LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT)
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, llama3_factors(theta, head_dim, scaling), rtol=1e-4):
        raise ValueError(
            f"rope_freqs.weight is not Llama 3's rule (low {LLAMA3_LOW:g}, high {LLAMA3_HIGH:g}, original context {LLAMA3_CONTEXT}): "
            "other frequency factors are not supported"
        )
    return scaling
