"""Synthetic checkpoints: names, shapes, dtypes and files of the real ones, and activations that stay of order one."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert import load_decoder, read_config
from convert.safetensors_files import SafetensorsDirectory
from convert.synthetic import list_tensors, main, make_config, write_synthetic
from hga_jax.language_model import LanguageModel
from hga_jax.quantized import BlockScaled, dequantize

FP8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


def test_the_fp8_model_has_the_real_ones_tensors():
    """Qwen/Qwen3-30B-A3B-Instruct-2507-FP8: every projection has scales, the rest is bfloat16; 30.5 billion parameters."""
    tensors = {name: (shape, dtype) for name, shape, dtype in list_tensors(make_config("qwen3-30b-a3b-fp8"))}
    layer = {name.removeprefix("model.layers.47."): found for name, found in tensors.items() if name.startswith("model.layers.47.")}
    expected = {
        "input_layernorm.weight": ((2048,), BF16), "post_attention_layernorm.weight": ((2048,), BF16),
        "self_attn.q_norm.weight": ((128,), BF16), "self_attn.k_norm.weight": ((128,), BF16), "mlp.gate.weight": ((128, 2048), BF16),
    }  # fmt: skip
    shapes = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)}
    modules = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    for e in range(128):
        modules |= {f"mlp.experts.{e}.{name}": (768, 2048) for name in ("gate_proj", "up_proj")}
        modules[f"mlp.experts.{e}.down_proj"] = (2048, 768)
    for name, shape in modules.items():
        expected[f"{name}.weight"] = (shape, FP8)
        expected[f"{name}.weight_scale_inv"] = ((shape[0] // 128, shape[1] // 128), BF16)
    assert layer == expected
    outside = {name: found for name, found in tensors.items() if ".layers." not in name}
    table = ((151936, 2048), BF16)
    assert outside == {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": ((2048,), BF16)}
    assert len(tensors) == 48 * (5 + 2 * (4 + 384)) + 3
    weights = sum(np.prod(shape) for name, (shape, _) in tensors.items() if not name.endswith("_scale_inv"))
    assert 30.5e9 < weights < 30.6e9


def test_the_other_models_have_the_real_sizes():
    for like, low, high in (("qwen3-30b-a3b", 30.5e9, 30.6e9), ("qwen3-0.6b", 0.75e9, 0.76e9)):  # the small one holds its table twice
        tensors = list_tensors(make_config(like))
        assert {dtype for _, _, dtype in tensors} == {BF16}
        assert low < sum(np.prod(shape) for _, shape, _ in tensors) < high


def test_the_config_says_what_the_real_one_says():
    raw = make_config("qwen3-30b-a3b-fp8")
    for key, value in {
        "model_type": "qwen3_moe", "rope_theta": 10000000, "max_position_embeddings": 262144, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "num_experts_per_tok": 8, "intermediate_size": 6144, "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }.items():  # fmt: skip
        assert raw[key] == value
    quantization = raw["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.layers.47.mlp.gate", "model.layers.0.input_layernorm"} <= set(quantization["modules_to_not_convert"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "model"
    return write_synthetic(out, "qwen3-30b-a3b-fp8", layers=3, tiny=True, max_shard_bytes=300_000)


def test_it_loads_in_several_files(written):
    assert len(list(written.glob("model-0000?-of-0000?.safetensors"))) > 2
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in SafetensorsDirectory(written).tensors.values())
    decoder, config = load_decoder(written)
    assert (config.layers, config.experts, config.fp8_block) == (3, 4, (128, 128))
    assert isinstance(decoder.layers[2].mlp.up.get_value(), BlockScaled)


def test_weights_are_finite_and_of_the_right_size(written):
    tensors = SafetensorsDirectory(written)
    for name in tensors.tensors:
        assert np.isfinite(tensors.view(name).astype(np.float32)).all(), name
    decoder, _ = load_decoder(written)
    gate = np.asarray(dequantize(decoder.layers[0].mlp.gate.get_value(), np.float32))
    # 192 inputs fill 1.5 blocks of 128 and the scale counts 2; 3 % more is the rounding to e4m3 and bfloat16.
    assert np.sqrt(np.mean(gate**2)) == pytest.approx(1 / np.sqrt(256), rel=0.03)
    embedding = np.asarray(decoder.embedding.get_value(), np.float32)
    assert np.sqrt(np.mean(embedding**2)) == pytest.approx(1 / np.sqrt(192), rel=0.03)
    assert abs(np.corrcoef(gate[0].ravel(), gate[1].ravel())[0, 1]) < 0.05  # experts differ


def test_logits_stay_of_order_one(written):
    decoder, config = load_decoder(written, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40), dtype=np.int32)
    logits = LanguageModel(decoder, config, None, "synthetic").logits(tokens, attention="dense")
    assert 0.3 < float(np.std(logits)) < 3


def test_a_seed_gives_the_same_tensors_whatever_the_depth(written, tmp_path):
    shallow = SafetensorsDirectory(write_synthetic(tmp_path / "shallow", "qwen3-30b-a3b-fp8", layers=1, tiny=True))
    other = SafetensorsDirectory(write_synthetic(tmp_path / "other", "qwen3-30b-a3b-fp8", layers=1, tiny=True, seed=1))
    deep = SafetensorsDirectory(written)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert shallow.view(name).tobytes() == deep.view(name).tobytes() != other.view(name).tobytes()
    assert sorted(path.name for path in (tmp_path / "shallow").iterdir()) == ["config.json", "model.safetensors"]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["--like", "qwen3-0.6b", "--layers", "2", "--tiny", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: 0.00 GB")
    assert read_config(out).tie_embeddings
    load_decoder(out)
    assert main(["--like", "qwen3-0.6b", "--layers", "2", "--tiny", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: exists already: choose another name\n"
    assert main(["--like", "qwen3-0.6b", "--layers", "0", "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == "error: layers=0 must be at least 1\n"
