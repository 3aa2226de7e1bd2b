"""config.json files of every supported family parse to the right shapes, and rotary frequencies equal those of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest

from hga_jax.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from hga_jax.rope import attention_factor, frequencies

GOLDEN = Path(__file__).parent / "golden" / "transformers"
ROPE = json.loads((GOLDEN / "rope.json").read_text())
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def read_config(folder: str) -> dict:
    return json.loads((GOLDEN / folder / "config.json").read_text())


@pytest.mark.parametrize("entry", ROPE, ids=lambda entry: entry["name"])
def test_frequencies_equal_transformers(entry):
    config = ModelConfig.from_hf(entry["config"] or read_config(entry["name"]))
    ours = frequencies(config.rope, config.head_dim)
    # transformers computes in float32 (2e-7 a rounding or two), we in float64.
    np.testing.assert_allclose(ours, np.array(entry["inv_freq"]), rtol=1e-6, atol=0)
    assert attention_factor(config.rope) == pytest.approx(entry["attention_scaling"], rel=1e-12)


def test_every_checkpoint_has_its_frequencies_recorded():
    assert set(FOLDERS) <= {entry["name"] for entry in ROPE}


EXPECTED = {
    "llama_linear": {"heads": 4, "kv_heads": 2, "head_dim": 16, "hidden_size": 64, "rms_eps": 1e-5},
    "llama_llama3": {"heads": 3, "kv_heads": 1, "head_dim": 32, "hidden_size": 48, "native_context": 512},
    "llama_yarn": {"heads": 3, "kv_heads": 1, "head_dim": 32, "hidden_size": 48, "native_context": 256},
    "mistral": {"heads": 4, "kv_heads": 1, "head_dim": 16, "qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "output_bias": False, "tie_embeddings": True, "head_dim": 16, "qk_norm": False},
    "qwen3": {"qk_norm": True, "qkv_bias": False, "tie_embeddings": False, "head_dim": 32, "experts": 0, "mlp_size": 80},
    "qwen3_moe": {"qk_norm": True, "experts": 8, "experts_per_token": 2, "expert_size": 24, "norm_topk_prob": True, "dense_layers": (1,)},
    "qwen3_moe_fp8": {"experts": 4, "expert_size": 136, "mlp_size": 200, "dense_layers": (1,), "fp8_block": (128, 128)},
}


@pytest.mark.parametrize("folder", EXPECTED)
def test_config_json_parses(folder):
    config = ModelConfig.from_hf(read_config(folder))
    wanted = EXPECTED[folder] | {"vocab_size": 96, "bos_token_id": 1, "eos_token_ids": (2,)}
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_both_generations_of_config_json_mean_the_same():
    """transformers 5 saves num_local_experts, rope_parameters and dtype; the hub has num_experts, rope_theta and torch_dtype."""
    new, old = read_config("qwen3_moe"), read_config("qwen3_moe_sharded")
    assert "num_local_experts" in new
    assert "num_experts" in old
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


def test_fp8_skips_router_norms_and_head():
    config = ModelConfig.from_hf(read_config("qwen3_moe_fp8"))
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.2.input_layernorm"} <= set(config.fp8_skip)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, LinearScaling(2.0)),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),  # the inner one wins
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 1e4, YarnScaling(4.0, 512)),
        ({"rope_theta": 1e4, "rope_scaling": LLAMA3}, 1e4, Llama3Scaling(8.0, 1.0, 4.0, 64)),
    ],
)
def test_rope_of_config_json(rope, theta, scaling):
    config = ModelConfig.from_hf(LLAMA | rope)
    assert (config.rope.theta, config.rope.scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "model_type": "mistral", "sliding_window": 256}, "sliding_window"),
        ({"rope_theta": 1e4, "model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window"),  # transformers assumes 4096
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | change)
