"""Checkpoints in and out: what load_decoder makes of files that transformers wrote, and the round trip through `python -m convert`."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import GOLDEN, assert_same_weights, golden_config, tensors_of, write_checkpoint

from convert import load_decoder, read_config
from convert.__main__ import main
from convert.checking import array_targets
from convert.load import open_source
from convert.mapping import TABLE
from convert.save import convert_checkpoint
from convert.stream import HostBuffers, make_units, stream_arrays
from hga_jax.config import ModelConfig
from hga_jax.language_model import LanguageModel
from hga_jax.model import Decoder, weight_leaves
from hga_jax.quantized import BlockScaled

FAMILIES = ("qwen3", "qwen3_moe_fp8", "qwen2", "llama_llama3", "llama_yarn", "llama_linear", "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_changes_no_bit(family, tmp_path):
    decoder, config = load_decoder(GOLDEN / family)
    again, config_again = load_decoder(convert_checkpoint(GOLDEN / family, tmp_path / "converted"))
    assert config_again == config == read_config(tmp_path / "converted")
    assert_same_weights(again, decoder)


def test_logits_of_a_converted_checkpoint_equal_transformers(tmp_path):
    golden = np.load(GOLDEN / "qwen3_moe_fp8.npz")
    decoder, config = load_decoder(convert_checkpoint(GOLDEN / "qwen3_moe_fp8", tmp_path / "converted"), dtype=jnp.float32)
    assert isinstance(decoder.layers[0].mlp.gate.get_value(), BlockScaled)
    logits = LanguageModel(decoder, config, None, "converted").logits(golden["tokens"][None], attention="dense")[0]
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)  # float32 on both sides, logits of order 1 to 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_dtype_of_every_plain_weight(dtype, tmp_path):
    source = GOLDEN / "qwen3_moe_fp8"
    for path in (source, convert_checkpoint(source, tmp_path / "narrow", dtype=dtype), convert_checkpoint(source, tmp_path / "own")):
        for name, leaf in weight_leaves(load_decoder(path, dtype=dtype)[0]).items():
            if isinstance(leaf, BlockScaled):
                assert (leaf.values.dtype, leaf.scales.dtype) == (jnp.float8_e4m3fn, jnp.float32), name
            else:
                assert leaf.dtype == dtype, name


def test_without_a_dtype_the_checkpoints_own_is_kept():
    assert load_decoder(GOLDEN / "qwen3")[0].embedding.get_value().dtype == jnp.float32
    assert load_decoder(GOLDEN / "qwen3_moe_fp8")[0].embedding.get_value().dtype == jnp.bfloat16


def test_casts_are_those_of_numpy():
    wide = tensors_of(GOLDEN / "qwen3")["model.layers.1.mlp.up_proj.weight"]
    narrow = load_decoder(GOLDEN / "qwen3", dtype="bfloat16")[0].layers[1].mlp.up.weight.get_value()
    np.testing.assert_array_equal(np.asarray(narrow), wide.astype(ml_dtypes.bfloat16))


def test_experts_are_stacked_in_their_order():
    tensors = tensors_of(GOLDEN / "qwen3_moe")
    layer = load_decoder(GOLDEN / "qwen3_moe")[0].layers[0]
    for e in range(golden_config("qwen3_moe")["num_local_experts"]):
        np.testing.assert_array_equal(layer.mlp.down.get_value()[e], tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"])
    np.testing.assert_array_equal(layer.mlp.router.get_value(), tensors["model.layers.0.mlp.gate.weight"])


def test_fp8_can_be_dequantised():
    tensors = tensors_of(GOLDEN / "qwen3_moe_fp8")
    decoder, config = load_decoder(GOLDEN / "qwen3_moe_fp8", dtype="float32", fp8="dequantize")
    assert config.fp8_block is None
    values = tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    scales = tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"].astype(np.float32)
    expected = values * np.kron(scales, np.ones((128, 128), np.float32))[: values.shape[0], : values.shape[1]]
    np.testing.assert_array_equal(decoder.layers[0].attention.q.weight.get_value(), expected)


def test_sharded_and_single_file_checkpoints_are_the_same():
    assert_same_weights(load_decoder(GOLDEN / "qwen3_moe_sharded")[0], load_decoder(GOLDEN / "qwen3_moe")[0])


def test_memory_for_one_layer_is_enough():
    plenty, _ = load_decoder(GOLDEN / "qwen3_moe")
    assert_same_weights(load_decoder(GOLDEN / "qwen3_moe", host_bytes=1, readers=1)[0], plenty)


def test_host_buffers_used_again_hold_nothing_of_their_last_use():
    """As on a GPU: each array is copied away and its buffer goes back to the readers. A third of the checkpoint fits at a time."""
    source = open_source(GOLDEN / "qwen3_moe_fp8")
    targets = array_targets(Decoder.abstract(source.config, jnp.bfloat16))
    seen, copies = set(), {}

    def put(key, host):
        seen.add(host.ctypes.data)
        return host.copy(), True

    limit = sum(item.size * item.dtype.itemsize for item in targets.values()) // 3
    copies = dict(stream_arrays(source, make_units(source, targets), put, buffers=HostBuffers(limit)))
    assert len(seen) < 0.8 * len(copies)  # some buffers did serve twice
    decoder, _ = load_decoder(GOLDEN / "qwen3_moe_fp8", dtype="bfloat16")
    for path, leaf in weight_leaves(decoder).items():
        pieces = {".values": leaf.values, ".scales": leaf.scales} if isinstance(leaf, BlockScaled) else {"": leaf}
        for piece, array in pieces.items():
            assert copies[path + piece].tobytes() == np.asarray(array).tobytes(), path + piece


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe_fp8", "llama_yarn"])
def test_a_gpu_gets_the_bits_that_a_cpu_gets(family, tmp_path):
    cpu, gpu = jax.local_devices(backend="cpu")[0], jax.devices("gpu")[0]
    expected, _ = load_decoder(GOLDEN / family, sharding=cpu)
    for path in (GOLDEN / family, convert_checkpoint(GOLDEN / family, tmp_path / "converted")):
        decoder, _ = load_decoder(path, sharding=gpu, host_bytes=200_000)
        assert decoder.embedding.get_value().devices() == {gpu}
        assert_same_weights(decoder, expected)


def test_weights_go_where_the_sharding_says():
    asked = []
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load_decoder(GOLDEN / "qwen3_moe_fp8", sharding=lambda path: asked.append(path) or device)
    assert set(asked) == weight_leaves(load_decoder(GOLDEN / "qwen3_moe_fp8")[0]).keys()


@pytest.mark.parametrize("converted", [False, True])
def test_progress_counts_every_byte_once(converted, tmp_path):
    path = convert_checkpoint(GOLDEN / "qwen3", tmp_path / "converted") if converted else GOLDEN / "qwen3"
    heard = []
    load_decoder(path, progress=lambda done, total: heard.append((done, total)))
    total = sum(array.nbytes for array in tensors_of(GOLDEN / "qwen3").values())
    assert heard[-1] == (total, total)
    assert heard == sorted(heard)


def test_a_tied_checkpoint_may_hold_the_head_twice_and_old_buffers(tmp_path):
    config, tensors = golden_config("qwen2"), tensors_of(GOLDEN / "qwen2")
    assert config["tie_word_embeddings"]
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    decoder, _ = load_decoder(write_checkpoint(tmp_path / "extra", config, {**tensors, **extra}))
    without = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    assert_same_weights(decoder, load_decoder(write_checkpoint(tmp_path / "without", config, without))[0])


@pytest.mark.parametrize("entry", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn", "model.layers.0", "q_proj"])
def test_modules_left_unquantised_are_plain(entry, tmp_path):
    config, tensors = golden_config("qwen3_moe_fp8"), dict(tensors_of(GOLDEN / "qwen3_moe_fp8"))
    config["quantization_config"]["modules_to_not_convert"].append(entry)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        if weight.startswith(entry + ".") or weight.endswith(f".{entry}.weight"):
            del tensors[name]
            tensors[weight] = tensors[weight].astype(ml_dtypes.bfloat16)
    decoder, _ = load_decoder(write_checkpoint(tmp_path, config, tensors))
    assert not isinstance(decoder.layers[0].attention.q.weight.get_value(), BlockScaled)
    assert isinstance(decoder.layers[2].mlp.gate.get_value(), BlockScaled)
    assert isinstance(decoder.layers[0].mlp.gate.get_value(), BlockScaled) == (entry != "model.layers.0")


def test_the_table_covers_every_weight_of_every_family_once():
    assert len({row.path for row in TABLE}) == len({row.hf for row in TABLE}) == len({row.gguf for row in TABLE}) == len(TABLE)
    seen = set()
    for family in (*FAMILIES, "qwen3_moe"):
        paths = weight_leaves(Decoder.abstract(ModelConfig.from_hf(golden_config(family) | {"mlp_bias": True, "attention_bias": True})))
        seen |= {".".join("{i}" if part.isdigit() else part for part in path.split(".")) for path in paths}
    assert seen == {row.path for row in TABLE}


def test_the_command_writes_a_checkpoint_with_its_tokenizer_and_says_so(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", golden_config("qwen2"), tensors_of(GOLDEN / "qwen2"))
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert main([str(source), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["source"] == golden_config("qwen2")
    assert (settings["dtype"], settings["format_version"]) == ("float16", 1)


def test_the_command_replaces_a_conversion_only_when_asked_and_nothing_else_ever(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(GOLDEN / "qwen2"), str(out)]) == 0
    capsys.readouterr()
    assert main([str(GOLDEN / "qwen3"), str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out}: exists already: choose another name or pass --overwrite\n"
    assert read_config(out).model_type == "qwen2"
    assert main([str(GOLDEN / "qwen3"), str(out), "--overwrite"]) == 0
    assert read_config(out).model_type == "qwen3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    capsys.readouterr()
    assert main([str(GOLDEN / "qwen3"), str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "exists and is no converted checkpoint: --overwrite replaces those only" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_conversion_that_dies_leaves_nothing(tmp_path):
    def die(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(GOLDEN / "qwen2", tmp_path / "out", progress=die)
    assert list(tmp_path.iterdir()) == []
