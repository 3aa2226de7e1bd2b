"""Small tokenizers for the tests, described as GGUF metadata describes them."""

import json
from pathlib import Path

from tokenizers import pre_tokenizers

GOLDEN = Path(__file__).parent / "golden"
SPECIAL = ["<|begin|>", "<|im_end|>", "<|endoftext|>"]


def byte_level_metadata(pre: str | None = "gpt-2", **overrides) -> dict:
    """256 byte tokens, a few merges, a user-defined token outside ASCII and three control tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "ð Ł", "ðŁ Ļ"]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + ["→tool←", *SPECIAL]
    kinds = [1] * (len(tokens) - 4) + [4, 3, 3, 3]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    } | overrides


def sentencepiece_golden() -> dict:
    return json.loads((GOLDEN / "text" / "sentencepiece.json").read_text())


def sentencepiece_metadata(**overrides) -> dict:
    """The SentencePiece vocabulary that make_text_goldens.py trained."""
    golden = sentencepiece_golden()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": golden["pieces"],
        "tokenizer.ggml.scores": golden["scores"],
        "tokenizer.ggml.token_type": golden["kinds"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | overrides
