"""Text to ids and back, against transformers, sentencepiece and the pre-tokenizers' published patterns."""

import json
import struct

import gguf
import numpy as np
import pytest
from tiny_tokenizers import GOLDEN, byte_level_metadata, sentencepiece_golden, sentencepiece_metadata
from tokenizers import pre_tokenizers

from hga_jax.default_model import default_model_path
from hga_jax.text import Tokenizer
from hga_jax.text.gguf_metadata import read_gguf_metadata
from hga_jax.text.gguf_tokenizer import PRE_TOKENIZERS


def write_gguf(path, metadata):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float64("test.double", 0.1)
    writer.add_bool("test.yes", True)
    writer.add_array("test.numbers", [-1, 2, 3])
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def real_gguf():
    return default_model_path()


@pytest.fixture(scope="module")
def transformers_golden():
    return json.loads((GOLDEN / "transformers" / "tokenizers.json").read_text())


@pytest.mark.model
def test_the_real_tokenizer_rebuilt_from_gguf_encodes_as_transformers_does(real_gguf, transformers_golden):
    tokenizer, golden = Tokenizer.from_gguf(real_gguf), transformers_golden["smollm2-135m"]
    for index, text in enumerate(transformers_golden["strings"]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == golden["ids"][index], repr(text)
        assert tokenizer.encode(text, add_special=True).tolist() == golden["ids_with_special_tokens"][index], repr(text)
        assert tokenizer.decode(ids) == golden["decoded"][index], repr(text)
        assert tokenizer.decode(ids, skip_special=True) == golden["decoded_without_special_tokens"][index], repr(text)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (0, 2))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


@pytest.mark.model
def test_path_reader_and_saved_directory_are_the_same_tokenizer(real_gguf, tmp_path, transformers_golden):
    from_path = Tokenizer.from_gguf(real_gguf)
    from_path.save(tmp_path)
    for other in (Tokenizer.from_gguf(gguf.GGUFReader(real_gguf)), Tokenizer.from_directory(tmp_path)):
        assert other.backend.to_str() == from_path.backend.to_str()
        for name in ("eos_ids", "bos_id", "bos_token", "eos_token", "chat_template", "vocab_size"):
            assert getattr(other, name) == getattr(from_path, name), name


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_pre_tokenizers_cut_text_as_the_published_patterns_do(name):
    golden = json.loads((GOLDEN / "text" / "splits.json").read_text())
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    for text, words in zip(golden["texts"], golden["splits"][name], strict=True):
        found = [bytes(byte_of[c] for c in word).decode() for word, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]
        assert found == words, repr(text)


def _byte_characters():
    """GPT-2's character for every byte, asked of the library itself: lone bytes below 128 directly, the others as part of a character."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lead = {bytes([b]): split.pre_tokenize_str(chr(b))[0][0] for b in range(128)}
    for code in [*range(0x80, 0x800, 0x20), *range(0x80, 0xC0), *range(0x800, 0x10000, 0x400), *range(0x10000, 0x110000, 0x4000)]:
        if not 0xD800 <= code < 0xE000:
            lead |= {bytes([b]): c for b, c in zip(chr(code).encode(), split.pre_tokenize_str(chr(code))[0][0], strict=True)}
    return [lead.get(bytes([b])) for b in range(256)]


def test_sentencepiece_vocabulary_encodes_and_decodes_as_sentencepiece_itself():
    tokenizer, golden = Tokenizer.from_gguf(sentencepiece_metadata()), sentencepiece_golden()
    for text, ids, decoded in zip(golden["texts"], golden["ids"], golden["decoded"], strict=True):
        assert tokenizer.encode(text).tolist() == ids, repr(text)
        assert tokenizer.decode(ids) == decoded, repr(text)
    assert tokenizer.encode("License", add_special=True).tolist() == [
        1,
        *golden["ids"][1],
    ]  # begins with <s> unless the file says otherwise
    without = Tokenizer.from_gguf(sentencepiece_metadata(**{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}))
    assert without.encode("License", add_special=True).tolist() == [*golden["ids"][1], 2]


def test_control_tokens_are_found_in_text_and_end_the_generation():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    end, document = (tokenizer.backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_ids == (end, document)
    ids = tokenizer.encode("hello<|im_end|>→tool←")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["hello", "<|im_end|>", "→tool←"]
    assert tokenizer.decode(ids) == "hello<|im_end|>→tool←"
    assert tokenizer.decode(ids, skip_special=True) == "hello→tool←"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # a row of the embedding beyond the vocabulary


def test_llama3_names_begin_with_bos_and_take_whole_words():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata("llama-bpe", **{"tokenizer.ggml.merges": ["h e"]}))
    assert tokenizer.encode("hello", add_special=True).tolist() == [tokenizer.bos_id, tokenizer.backend.token_to_id("hello")]
    assert len(Tokenizer.from_gguf(byte_level_metadata("gpt-2", **{"tokenizer.ggml.merges": ["h e"]})).encode("hello")) == 4


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (byte_level_metadata("viking"), NotImplementedError, "'viking'.*known are default, gpt-2"),
        (byte_level_metadata(None), NotImplementedError, "None"),
        (byte_level_metadata(**{"tokenizer.ggml.model": "rwkv"}), NotImplementedError, "'rwkv'"),
        (byte_level_metadata(**{"tokenizer.ggml.merges": ["he zz"]}), ValueError, "merges"),
        (byte_level_metadata(**{"tokenizer.ggml.merges": None}), ValueError, "no tokenizer.ggml.merges"),
        (byte_level_metadata(**{"tokenizer.ggml.token_type": [1]}), ValueError, "token types"),
        (
            byte_level_metadata(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 9999}),
            ValueError,
            "bos_token_id=9999",
        ),
        (sentencepiece_metadata(**{"tokenizer.ggml.scores": [0.0]}), ValueError, "1 scores"),
        ({}, ValueError, "tokenizer.ggml.model"),
    ],
)
def test_broken_or_unknown_gguf_tokenizers_are_named_in_one_line(metadata, error, message):
    with pytest.raises(error, match=message) as caught:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(caught.value)


def test_gguf_metadata_is_what_the_gguf_package_wrote(tmp_path):
    path = write_gguf(tmp_path / "t.gguf", byte_level_metadata())
    found = read_gguf_metadata(path)
    fields = gguf.GGUFReader(path).fields
    assert found == {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert (found["test.double"], found["test.yes"], found["test.numbers"]) == (0.1, True, [-1, 2, 3])
    assert Tokenizer.from_gguf(path).encode("hello").size == 1


@pytest.mark.parametrize("keep", [0, 10, 30, 200, 3000])
def test_cut_off_gguf_files_are_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "t.gguf", byte_level_metadata())
    assert path.stat().st_size > 3000
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.gguf"):
        read_gguf_metadata(path)


def test_files_that_are_not_gguf_are_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_gguf_metadata(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0))
    with pytest.raises(ValueError, match="version 1"):
        read_gguf_metadata(tmp_path / "b.gguf")


@pytest.fixture
def directory(tmp_path):
    """A directory as the hub has them: settings in the shapes that real checkpoints use."""
    backend = Tokenizer.from_gguf(byte_level_metadata()).backend
    backend.enable_truncation(3)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": None, "chat_template": "from config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_directories_give_whole_prompts_whatever_truncation_they_were_trained_with(directory):
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("hello world, a longer text")) == "hello world, a longer text"
    assert tokenizer.encode("hello").size == 1


def test_end_tokens_of_all_files_count(directory):
    end, document = (Tokenizer.from_directory(directory).backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert Tokenizer.from_directory(directory).eos_ids == (end,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [document], "temperature": 0.5}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_ids == (7, end, document)
    tokenizer.save(directory)
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": [7, end, document], "temperature": 0.5}


def test_chat_template_is_found_where_checkpoints_keep_it(directory):
    assert Tokenizer.from_directory(directory).chat_template == "from config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_directory(directory).chat_template == "the default"
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.from_directory(directory).chat_template == "from json"
    (directory / "chat_template.jinja").write_text("from jinja")
    assert Tokenizer.from_directory(directory).chat_template == "from jinja"
    Tokenizer.from_directory(directory).save(directory / "saved")
    assert Tokenizer.from_directory(directory / "saved").chat_template == "from jinja"


def test_saving_leaves_no_older_template_in_force(directory):
    (directory / "chat_template.jinja").write_text("older")
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    tokenizer.save(directory)
    assert Tokenizer.from_directory(directory).chat_template == tokenizer.chat_template


def test_tokens_declared_in_the_config_only_are_added(directory):
    size = Tokenizer.from_directory(directory).vocab_size
    declared = {str(size): {"content": "<think>", "special": False, "normalized": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    assert Tokenizer.from_directory(directory).encode("<think>").tolist() == [size]
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"5": {"content": "<think>"}}}))
    with pytest.raises(ValueError, match="'<think>' the id 5"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json must hold a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}', "rag"),
    ],
)
def test_broken_directories_are_refused_by_file_name(directory, name, content, message):
    (directory / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(directory)


def test_a_directory_without_tokenizer_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
