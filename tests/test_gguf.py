"""GGUF files: the same weights as the Hugging Face checkpoint they were made of, the config read from metadata, broken files refused.

The files are written here with the gguf package, following llama.cpp's convert_hf_to_gguf.py.
"""

import gguf
import numpy as np
import pytest
from checkpoints import GOLDEN, assert_same_weights, golden_config, tensors_of
from gguf.quants import dequantize, quantize

from convert import load_decoder, read_config, read_tokenizer
from convert.__main__ import main
from convert.save import convert_checkpoint
from convert.synthetic import write_synthetic
from hga_jax.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from hga_jax.default_model import default_model_path
from hga_jax.model import weight_leaves

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(family: str) -> dict[str, np.ndarray]:
    raw, tensors, out = golden_config(family), tensors_of(GOLDEN / family), {}
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else -1 for p in n.split(".")]):
        array = tensors[name]
        if name in TOP:
            out[TOP[name]] = array
            continue
        _, _, layer, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        if module.startswith("mlp.experts."):
            experts.setdefault(f"blk.{layer}.ffn_{module.split('.')[3].removesuffix('_proj')}_exps.weight", []).append(array)
            continue
        if raw["model_type"] in ("llama", "mistral") and module in ("self_attn.q_proj", "self_attn.k_proj"):
            array = interleave(array, raw["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"])
        out[f"blk.{layer}.{NAMES[module]}.{kind}"] = array
    return out | {name: np.stack(parts) for name, parts in experts.items()}


def metadata_of(family: str) -> dict:
    config = ModelConfig.from_hf(golden_config(family))
    arch = {"mistral": "llama", "qwen3_moe": "qwen3moe"}.get(config.model_type, config.model_type)
    keys = {
        "block_count": config.layers, "context_length": config.native_context, "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size, "attention.head_count": config.heads, "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim, "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.rms_eps, "rope.freq_base": config.rope.theta,
    }  # fmt: skip
    if config.experts:
        keys |= {
            "expert_count": config.experts, "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_size, "expert_weights_norm": config.norm_topk_prob,
        }  # fmt: skip
    scaling = config.rope.scaling
    if isinstance(scaling, LinearScaling):
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, YarnScaling):
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling.factor}
        keys |= {"rope.scaling.original_context_length": scaling.original_context}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}


def write_gguf(path, metadata: dict, tensors: dict[str, np.ndarray], kinds: dict[str, gguf.GGMLQuantizationType] | None = None):
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, array if kind is None else quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_weights_and_config_equal_the_hugging_face_checkpoints(family, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", metadata_of(family), gguf_tensors(family))
    decoder, config = load_decoder(path)
    expected, expected_config = load_decoder(GOLDEN / family)
    assert_same_weights(decoder, expected)
    for name in (
        "heads",
        "kv_heads",
        "head_dim",
        "mlp_size",
        "qk_norm",
        "qkv_bias",
        "tie_embeddings",
        "dense_layers",
        "experts",
        "rms_eps",
    ):
        assert getattr(config, name) == getattr(expected_config, name), name
    assert config.rope.theta == expected_config.rope.theta
    if family != "llama_yarn":
        assert config.rope == expected_config.rope
    assert read_config(path) == config


def yarn(**keys) -> dict:
    base = metadata_of("qwen3") | {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
    return base | {f"qwen3.rope.scaling.{key}": value for key, value in keys.items()}


def test_yarn_from_metadata(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", yarn(original_context_length=64), gguf_tensors("qwen3"))
    assert read_config(path).rope.scaling == YarnScaling(4.0, 64)
    path = write_gguf(tmp_path / "b.gguf", yarn(yarn_beta_fast=16.0, attn_factor=0.5), gguf_tensors("qwen3"))
    scaling = read_config(path).rope.scaling
    assert (scaling.beta_fast, scaling.beta_slow, scaling.original_context) == (
        16.0,
        1.0,
        golden_config("qwen3")["max_position_embeddings"],
    )
    assert scaling.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4) + 1))  # llama.cpp multiplies the two


def llama3_factors(head_dim: int, theta: float, factor=8.0, low=1.0, high=4.0, old=8192) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, one frequency after the other."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < old / high:
            out.append(1.0)
        elif wavelength > old / low:
            out.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama3_frequency_factors_become_the_rope_scaling(tmp_path):
    metadata, tensors = metadata_of("llama_linear"), gguf_tensors("llama_linear")
    metadata = {key: value for key, value in metadata.items() if "rope.scaling" not in key} | {"llama.rope.freq_base": 500000.0}
    head_dim = golden_config("llama_linear")["head_dim"]
    for factor in (8.0, 32.0):  # Llama 3.1 and 3.2
        factors = {"rope_freqs.weight": llama3_factors(head_dim, 500000.0, factor)}
        path = write_gguf(tmp_path / f"{factor}.gguf", metadata, tensors | factors)
        assert load_decoder(path)[1].rope.scaling == Llama3Scaling(factor, 1.0, 4.0, 8192)
    path = write_gguf(tmp_path / "ones.gguf", metadata, tensors | {"rope_freqs.weight": np.ones(head_dim // 2, np.float32)})
    assert read_config(path).rope.scaling is None
    other = {"rope_freqs.weight": llama3_factors(head_dim, 500000.0, old=4096)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's rule"):
        read_config(write_gguf(tmp_path / "other.gguf", metadata, tensors | other))


def test_quantised_tensors_become_numbers(tmp_path):
    wide = str(write_synthetic(tmp_path / "wide", "qwen3-30b-a3b", layers=1, tiny=True))  # 192 inputs: six blocks of 32
    tensors, expected = {name: array.astype(np.float32) for name, array in gguf_tensors(wide).items()}, {}
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 for name, a in tensors.items() if a.ndim > 1 and a.shape[-1] % 32 == 0}
    kinds["blk.0.attn_q.weight"] = gguf.GGMLQuantizationType.F16
    kinds["blk.0.attn_output.weight"] = gguf.GGMLQuantizationType.BF16
    assert {"token_embd.weight", "blk.0.ffn_up_exps.weight"} <= kinds.keys()
    for name, kind in kinds.items():
        expected[name] = dequantize(quantize(tensors[name], kind), kind)
    path = write_gguf(tmp_path / "model.gguf", metadata_of(wide), tensors, kinds)
    leaves = weight_leaves(load_decoder(path, dtype="float32")[0])
    ours = {"blk.0.attn_q.weight": "layers.0.attention.q.weight", "blk.0.attn_output.weight": "layers.0.attention.o.weight"}
    ours |= {"token_embd.weight": "embedding", "blk.0.attn_v.weight": "layers.0.attention.v.weight"}
    ours |= {"blk.0.ffn_down_exps.weight": "layers.0.mlp.down", "blk.0.ffn_up_exps.weight": "layers.0.mlp.up"}
    for name, path in ours.items():
        np.testing.assert_array_equal(leaves[path], expected.get(name, tensors[name]))


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        load_decoder(path)
    return str(caught.value).replace(str(path), "FILE")


def test_every_wrong_tensor_is_named_in_one_error(tmp_path):
    tensors = gguf_tensors("qwen3")
    del tensors["output_norm.weight"]
    tensors["blk.0.ffn_extra.weight"] = np.zeros((4, 4), np.float32)
    shape = tensors["blk.1.ffn_up.weight"].shape
    tensors["blk.1.ffn_up.weight"] = np.zeros((8, 8), np.float32)
    tensors["blk.0.attn_norm.weight"] = np.zeros(tensors["blk.0.attn_norm.weight"].shape, np.int32)
    assert refusal(write_gguf(tmp_path / "model.gguf", metadata_of("qwen3"), tensors)) == (
        "FILE: the tensors do not fit the model its config describes: 1 missing: output_norm.weight; "
        f"1 unexpected: blk.0.ffn_extra.weight; 1 misshapen: blk.1.ffn_up.weight is [8, 8], expected {list(shape)}; "
        "1 of wrong dtype: blk.0.attn_norm.weight is I32, expected BF16, F16 or F32"
    )


@pytest.mark.parametrize(
    "key", ["block_count", "attention.head_count", "rope.freq_base", "context_length", "attention.layer_norm_rms_epsilon"]
)
def test_a_missing_key_is_named(key, tmp_path):
    metadata = metadata_of("qwen3")
    del metadata[f"qwen3.{key}"]
    assert refusal(write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors("qwen3"))) == f"FILE: the metadata lacks qwen3.{key}"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba' is not supported: supported are llama, qwen2, qwen3, qwen3moe"),
        ({"qwen3.rope.scaling.type": "longrope"}, "qwen3.rope.scaling.type='longrope' is not supported: supported are none, linear, yarn"),
        ({"qwen3.rope.dimension_count": 8}, "qwen3.rope.dimension_count=8 of"),
        ({"qwen3.attention.value_length": 8}, "qwen3.attention.value_length=8 differs from key_length="),
        ({"qwen3.attention.sliding_window": 16}, "qwen3.attention.sliding_window=16 is not supported"),
        ({"qwen3.expert_count": 4}, "qwen3.expert_count=4 is not supported"),
        ({"split.count": 3}, "is one of 3 parts: join them first"),
    ],
)
def test_what_is_not_supported_is_named(change, complaint, tmp_path):
    assert complaint in refusal(write_gguf(tmp_path / "model.gguf", metadata_of("qwen3") | change, gguf_tensors("qwen3")))


def test_truncated_and_foreign_files(tmp_path, capsys):
    path = write_gguf(tmp_path / "model.gguf", metadata_of("qwen3"), gguf_tensors("qwen3"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert "FILE: truncated: '" in refusal(path)
    path.write_bytes(whole[:300])
    assert "cut off or corrupt at byte" in refusal(path)
    path.write_bytes(b"something else that is long enough to have a header")
    assert "FILE is not a GGUF file" in refusal(path)
    assert main([str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gguf_converts_to_a_checkpoint_of_ours(tmp_path):
    source = write_gguf(tmp_path / "model.gguf", metadata_of("qwen3_moe") | tiny_vocabulary(96), gguf_tensors("qwen3_moe"))
    target = convert_checkpoint(source, tmp_path / "converted")
    assert_same_weights(load_decoder(target)[0], load_decoder(source)[0])
    assert read_config(target) == read_config(source)
    text = "abc ab"
    assert len(read_tokenizer(source).encode("ab")) == 1
    np.testing.assert_array_equal(read_tokenizer(target).encode(text), read_tokenizer(source).encode(text))


def tiny_vocabulary(size: int) -> dict:
    letters = [chr(ord("!") + i) for i in range(size - 2)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": [*letters, "ab", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * (size - 1) + [3], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": size - 1,
    }  # fmt: skip


@pytest.mark.model
def test_the_built_in_model_loads_as_its_tensors_dequantise():
    path = default_model_path()
    decoder, config = load_decoder(path, dtype="float32")
    assert (config.layers, config.rope.theta, config.rms_eps, config.tie_embeddings) == (30, 1e5, 1e-5, True)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    layer = decoder.layers[29]

    def original(name: str) -> np.ndarray:
        return dequantize(reader[name].data, reader[name].tensor_type)

    np.testing.assert_array_equal(decoder.embedding.get_value(), original("token_embd.weight"))
    np.testing.assert_array_equal(layer.mlp.down.weight.get_value(), original("blk.29.ffn_down.weight"))
    np.testing.assert_array_equal(interleave(np.asarray(layer.attention.q.weight.get_value()), 9), original("blk.29.attn_q.weight"))
    np.testing.assert_array_equal(interleave(np.asarray(layer.attention.k.weight.get_value()), 3), original("blk.29.attn_k.weight"))
