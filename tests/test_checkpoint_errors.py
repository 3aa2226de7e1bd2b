"""What broken checkpoints get: one line that names the file and everything that is wrong with it, before weights are copied."""

import json
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from checkpoints import GOLDEN, golden_config, tensors_of, write_checkpoint

from convert import load_decoder, read_config
from convert.__main__ import main
from convert.checking import compact
from convert.safetensors_files import SafetensorsFile, write_safetensors
from convert.save import convert_checkpoint


def refusal(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_decoder(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{path}/", "").replace(str(path), "HERE")


@pytest.fixture
def broken(tmp_path):
    """A writable copy of the qwen3 checkpoint: its model.safetensors."""
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "broken")
    return tmp_path / "broken" / "model.safetensors"


def test_every_wrong_tensor_is_named_in_one_error(tmp_path):
    tensors = dict(tensors_of(GOLDEN / "qwen3"))
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra_proj.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.1.self_attn.k_norm.weight"] = np.ones(5, np.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = tensors[name].shape
    tensors[name] = tensors[name][:, :-1]
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.int8)
    fp8 = "model.layers.1.mlp.gate_proj.weight"
    tensors[fp8] = tensors[fp8].astype(ml_dtypes.float8_e4m3fn)
    text = refusal(write_checkpoint(tmp_path, golden_config("qwen3"), tensors))
    assert text == (
        "HERE: the tensors do not fit the model its config describes: "
        "3 missing: model.norm.weight, model.layers.{0-1}.mlp.up_proj.weight; "
        "1 unexpected: model.layers.0.mlp.extra_proj.weight; "
        f"2 misshapen: {name} is {[shape[0], shape[1] - 1]}, expected {list(shape)}, "
        f"model.layers.1.self_attn.k_norm.weight is [5], expected [{golden_config('qwen3')['head_dim']}]; "
        "2 of wrong dtype: model.layers.0.mlp.down_proj.weight is I8, expected BF16, F16 or F32, "
        f"{fp8} is F8_E4M3 without {fp8}_scale_inv, expected BF16, F16 or F32"
    )


def test_wrong_fp8_tensors_are_named(tmp_path):
    tensors = dict(tensors_of(GOLDEN / "qwen3_moe_fp8"))
    layer = "model.layers.0"
    del tensors[f"{layer}.self_attn.k_proj.weight_scale_inv"]
    tensors[f"{layer}.self_attn.q_proj.weight_scale_inv"] = np.ones((3, 2), ml_dtypes.bfloat16)
    tensors[f"{layer}.self_attn.v_proj.weight_scale_inv"] = np.ones((1, 2), np.int32)
    tensors[f"{layer}.mlp.experts.2.up_proj.weight"] = tensors[f"{layer}.mlp.experts.2.up_proj.weight"].astype(ml_dtypes.bfloat16)
    text = refusal(write_checkpoint(tmp_path, golden_config("qwen3_moe_fp8"), tensors))
    assert f"1 missing: {layer}.self_attn.k_proj.weight_scale_inv;" in text
    assert f"1 misshapen: {layer}.self_attn.q_proj.weight_scale_inv is [3, 2], expected [1, 2];" in text
    assert f"{layer}.self_attn.v_proj.weight_scale_inv is I32, expected BF16, F16 or F32" in text
    assert f"{layer}.mlp.experts.2.up_proj.weight is BF16, expected F8_E4M3 (or its module in modules_to_not_convert)" in text


def test_fp8_weights_that_the_config_is_silent_about(tmp_path):
    config = golden_config("qwen3_moe_fp8")
    del config["quantization_config"]
    text = refusal(write_checkpoint(tmp_path, config, tensors_of(GOLDEN / "qwen3_moe_fp8")))
    assert "model.layers.{0,2}.mlp.experts.{0-3}.down_proj.weight_scale_inv" in text
    assert "model.layers.1.mlp.up_proj.weight is F8_E4M3 that config.json announces no such quantisation for, expected BF16" in text


def test_a_truncated_file(broken):
    size = broken.stat().st_size
    with open(broken, "r+b") as file:
        file.truncate(size - 1)
    assert re.fullmatch(rf"model.safetensors: truncated: '.*' ends at byte {size}, the file at byte {size - 1}", refusal(broken.parent))
    with open(broken, "r+b") as file:
        file.truncate(100)
    assert re.fullmatch(r"model.safetensors: truncated: the header ends at byte \d+, the file at byte 100", refusal(broken.parent))
    broken.write_bytes(b"abc")
    assert refusal(broken.parent) == "model.safetensors: truncated: 3 bytes, a safetensors file has at least 8"


def test_a_file_that_is_something_else(broken):
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "corrupt or not safetensors: its first 8 bytes announce a header of" in refusal(broken.parent)


def with_header(path, header: dict | bytes, data: int):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * data)


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"{'a'}", 0, "corrupt header: not JSON"),
        (b"[1, 2]", 0, "corrupt header: a JSON object is expected, found list"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "corrupt header: 'a' has no valid dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8, "'a' has no valid dtype, shape and data_offsets"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1, "'a' has dtype 'F4', which is unknown"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "'a' is F32 [2], 8 bytes, but its offsets span 4"),
        (
            {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}},
            12, "inside 'a', which ends at byte",
        ),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}, 12, "between 'the header' and 'a', belong to no tensor"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, 9, "1 bytes follow the last tensor 'a'"),
    ],
)  # fmt: skip
def test_a_corrupt_header(header, data, complaint, tmp_path):
    with_header(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        SafetensorsFile(tmp_path / "a.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "a.safetensors") + ": ")


def test_an_index_that_does_not_fit_its_files(tmp_path):
    here = shutil.copytree(GOLDEN / "qwen3_moe_sharded", tmp_path / "sharded")
    index = here / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (here / "model-00002-of-00003.safetensors").unlink()
    assert refusal(here) == f"{index.name}: names 1 of 3 files that are absent: model-00002-of-00003.safetensors"
    whole["weight_map"] = {"model.ghost.weight": "model-00001-of-00003.safetensors"}
    index.write_text(json.dumps(whole))
    assert refusal(here) == f"{index.name}: names 1 tensors that their files do not hold: model.ghost.weight"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert refusal(here) == f"{index.name}: names a file outside its directory: '../elsewhere.safetensors'"
    index.write_text("{")
    assert "is not a safetensors index" in refusal(here)
    index.unlink()
    assert refusal(here) == "HERE: holds neither model.safetensors nor model.safetensors.index.json"


def test_a_config_that_is_missing_broken_or_of_another_architecture(broken):
    config = broken.parent / "config.json"
    config.write_text(json.dumps(golden_config("qwen3") | {"model_type": "mamba"}))
    supported = "supported are llama, mistral, qwen2, qwen3, qwen3_moe"
    assert refusal(broken.parent) == f"config.json: model_type='mamba' is not supported: {supported}"
    config.write_text("{")
    assert refusal(broken.parent).startswith("config.json: is not valid JSON: ")
    config.unlink()
    assert refusal(broken.parent).startswith("HERE: has no config.json: ")
    assert refusal(broken).endswith(": is one file of a checkpoint: give its directory, which also holds config.json")
    assert refusal(broken.parent / "nowhere") == "HERE: no such file or directory"


def test_a_dtype_that_weights_cannot_have():
    assert refusal(GOLDEN / "qwen3", dtype="int8") == "dtype='int8': weights can be bfloat16, float32, float16"


def test_a_damaged_converted_checkpoint(tmp_path):
    here = convert_checkpoint(GOLDEN / "qwen3", tmp_path / "converted")
    settings = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(settings | {"format_version": 99}))
    assert refusal(here) == "config.json: format_version=99, this program reads 1: convert again"
    settings["model"]["mlp_size"] += 8
    (here / "config.json").write_text(json.dumps(settings))
    shutil.rmtree(here / "params" / "layers.0")
    shutil.copytree(here / "params" / "final_norm", here / "params" / "something")
    text = refusal(here)
    assert "11 missing: layers.0.attention.k.weight, layers.0.attention.k_norm.weight" in text
    assert "1 unexpected: something/final_norm.weight;" in text
    assert re.search(r"3 misshapen: layers.1.mlp.down.weight is \[\d+, \d+\], expected", text)


def test_a_converted_checkpoint_with_damaged_files(tmp_path):
    here = convert_checkpoint(GOLDEN / "qwen3", tmp_path / "converted")
    for file in (here / "params" / "embedding").rglob("d/*"):
        file.write_bytes(b"")
    assert re.match(r"params/embedding: damaged or not a checkpoint of ours \(.*\): convert again", refusal(here))


def test_a_conversion_killed_half_way_is_not_a_checkpoint(tmp_path):
    here = convert_checkpoint(GOLDEN / "qwen3", tmp_path / "converted")
    (here / "config.json").unlink()  # written last
    assert refusal(here).startswith("HERE: has no config.json")


def test_the_command_exits_with_2_and_one_line(tmp_path, capsys, broken):
    broken.write_bytes(b"abc")
    for source in (tmp_path / "nowhere", broken.parent, broken):
        assert main([str(source), str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {source}") or captured.err.startswith(f"error: {broken}")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_the_config_is_read_without_the_weights(broken):
    broken.unlink()
    assert read_config(broken.parent).model_type == "qwen3"


def test_names_that_differ_in_numbers_are_written_once():
    grid = [f"layers.{i}.experts.{e}.up" for i in (0, 1, 2, 5) for e in range(3)]
    assert compact(grid) == ["layers.{0-2,5}.experts.{0-2}.up"]
    assert compact(grid[:-1]) == grid[:-1]
    assert compact(["layers.7.up", "norm"]) == ["layers.7.up", "norm"]


def test_the_writer_refuses_contents_that_do_not_fit_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="4 bytes of tensors were given, the header promises 8"):
        write_safetensors(tmp_path / "a.safetensors", {"a": ((2,), np.dtype(np.float32))}, [np.zeros(1, np.float32)])
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_survives_writing_and_viewing(tmp_path):
    from convert.safetensors_files import DTYPES

    arrays = {name: np.arange(6).astype(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "a.safetensors", {n: (a.shape, a.dtype) for n, a in arrays.items()}, arrays.values(), {"format": "pt"})
    opened = SafetensorsFile(tmp_path / "a.safetensors")
    assert opened.metadata == {"format": "pt"}
    for name, array in arrays.items():
        assert opened.view(name).dtype == array.dtype
        assert opened.view(name).tobytes() == array.tobytes()
