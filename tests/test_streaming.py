"""Streamed text: what is given out is final, and all of it together is what decode gives."""

import numpy as np
import pytest
from tiny_tokenizers import byte_level_metadata, sentencepiece_metadata
from tokenizers import decoders

from hga_jax.default_model import default_model_path
from hga_jax.text import TextStream, Tokenizer

TEXTS = ["hello 🙂 wörld 👩‍👩‍👧‍👦", " leading and  double spaces\n", "你好，世界", "a\ufffdb", "→tool←<|im_end|>", ""]


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", pytest.param("real", marks=pytest.mark.model)])
def tokenizer(request):
    if request.param == "real":
        return Tokenizer.from_gguf(default_model_path())
    return Tokenizer.from_gguf(byte_level_metadata() if request.param == "byte level" else sentencepiece_metadata())


def random_ids(tokenizer, rng):
    """Text, tokens of text torn apart and shuffled, and tokens of nothing: any id, some outside the vocabulary."""
    pieces = []
    for _ in range(rng.integers(1, 6)):
        ids = tokenizer.encode(str(rng.choice(TEXTS)))
        kind = rng.integers(3)
        if kind == 1:
            ids = rng.permutation(ids)
        elif kind == 2:
            ids = rng.integers(0, tokenizer.vocab_size + 3, 8)
        pieces.append(ids[rng.integers(0, 3) :])
    return np.concatenate(pieces).astype(np.int32)


def split_at_random(ids, rng):
    cuts = np.sort(rng.integers(0, len(ids) + 1, rng.integers(0, len(ids) + 1)))
    return np.split(ids, cuts)


@pytest.mark.parametrize("skip_special", [False, True])
def test_stream_joined_is_decode_for_every_split(tokenizer, skip_special):
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = random_ids(tokenizer, rng)
        whole = tokenizer.decode(ids, skip_special)
        for pieces in (list(ids), [ids], split_at_random(ids, rng)):
            stream = TextStream(tokenizer, skip_special=skip_special)
            parts = [stream.feed(piece) for piece in pieces]
            assert "".join(parts) + stream.flush() == whole, ids.tolist()


def test_every_prefix_that_was_given_out_is_final(tokenizer):
    """Text out so far must begin the text of every continuation: here, the true one and one that breaks the next character."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        ids, other = random_ids(tokenizer, rng), random_ids(tokenizer, rng)
        stream, out = TextStream(tokenizer), ""
        for count, index in enumerate(ids, 1):
            out += stream.feed(index)
            for continuation in (ids[count:], other):
                assert tokenizer.decode(np.concatenate([ids[:count], continuation])).startswith(out)


def test_characters_come_whole(tokenizer):
    stream, text = TextStream(tokenizer), "Grüße 🙂 你好 👍🏽 end"
    parts = [stream.feed(index) for index in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > 3  # it does stream


def test_ascii_is_not_held_back(tokenizer):
    stream, ids = TextStream(tokenizer, stop=["\nUser:"]), tokenizer.encode("hello world")
    assert "".join(stream.feed(index) for index in ids) == "hello world"


def test_an_unfinished_character_appears_at_the_end_only(tokenizer):
    ids = tokenizer.encode("ok🙂")[:-1]
    stream = TextStream(tokenizer)
    assert stream.feed(ids) == "ok"
    rest = stream.flush()
    assert rest
    assert set(rest) == {"\ufffd"}
    assert "ok" + rest == tokenizer.decode(ids)
    assert stream.flush() == ""


def by_character(text, stops):
    """The meaning of stop strings, spelled out: grow the text by a character until it ends with one; of two that do, the longer counts."""
    for count in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:count].endswith(stop)]
        if ends:
            return text[: count - max(map(len, ends))], True
    return text, False


def test_stop_strings_cut_at_the_same_place_for_every_split():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    rng = np.random.default_rng(2)
    stopped = 0
    for _ in range(1000):
        text = "".join(rng.choice(list("abcé"), 20))
        stops = ["".join(rng.choice(list("abcé"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        expected, stops_at_all = by_character(text, stops)
        stream = TextStream(tokenizer, stop=stops)
        parts = [stream.feed(piece) for piece in split_at_random(tokenizer.encode(text), rng)]
        assert "".join(parts) + stream.flush() == expected, (text, stops)
        assert stream.stopped == stops_at_all
        stopped += stream.stopped
    assert 200 < stopped < 1000


def test_the_beginning_of_a_stop_string_is_held_until_it_is_decided(tokenizer):
    stream = TextStream(tokenizer, stop=["<end>"])
    assert stream.feed(tokenizer.encode("abc<en")) == "abc"
    assert not stream.stopped
    stream = TextStream(tokenizer, stop=["<end>"])
    assert stream.feed(tokenizer.encode("abc<en")) + stream.flush() == "abc<en"
    stream = TextStream(tokenizer, stop=["<end>"])
    assert stream.feed(tokenizer.encode("abc<end> and more")) == "abc"
    assert stream.stopped
    assert stream.feed(tokenizer.encode("more")) == ""
    assert stream.flush() == ""


def test_wrong_use_is_refused():
    tokenizer = Tokenizer.from_gguf(byte_level_metadata())
    with pytest.raises(ValueError, match="non-empty"):
        TextStream(tokenizer, stop=["a", ""])
    with pytest.raises(ValueError, match="list"):
        TextStream(tokenizer, stop="abc")
    stream = TextStream(tokenizer)
    stream.flush()
    with pytest.raises(ValueError, match="flushed"):
        stream.feed(1)
    tokenizer.backend.decoder = decoders.WordPiece()
    with pytest.raises(NotImplementedError, match="WordPiece"):
        TextStream(tokenizer)
