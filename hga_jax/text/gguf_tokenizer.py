"""A `tokenizers` tokenizer rebuilt from what a GGUF file says about it.

A GGUF file holds the vocabulary and the merges (or SentencePiece scores) and, for everything else, the *name* of a pre-tokenizer. What each
name stands for is written down here, taken from the tokenizer.json of the model family that the name was made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# Text that ends a turn or a document in the supported families. llama.cpp stops at them too, whatever the file's eos_token_id.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SYMBOLS_AND_SPACE}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SYMBOLS_AND_SPACE}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SYMBOLS_AND_SPACE}"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """split: the family's own pattern, None for GPT-2's. ignore_merges: a word that is a token is taken whole, whatever its merges say."""

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False  # when the file has no add_bos_token

    def build(self) -> pre_tokenizers.PreTokenizer:
        parts: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        if self.split is not None:
            parts.append(pre_tokenizers.Split(Regex(self.split), "isolated"))
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.split is None))
        return pre_tokenizers.Sequence(parts)


_LLAMA3_PRE = _PreTokenizer(split=_LLAMA3, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "default": _PreTokenizer(),
    "gpt-2": _PreTokenizer(),
    "llama-bpe": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "qwen2": _PreTokenizer(split=_QWEN2, nfc=True),
    "smollm": _PreTokenizer(single_digits=True),
    "tekken": _PreTokenizer(split=_TEKKEN, ignore_merges=True, add_bos=True),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises ValueError when a key is missing or the vocabulary contradicts itself, NotImplementedError naming a tokenizer model or
    pre-tokenizer that is not known here.
    """
    model = require(metadata, "tokenizer.ggml.model")
    tokens: list[str] = require(metadata, "tokenizer.ggml.tokens")
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise ValueError(
            f"GGUF tokenizer: {len(tokens)} tokens, {len(vocabulary)} of them distinct, and {len(kinds)} token types must be as many"
        )
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        tokenizer, add_bos = _byte_level(vocabulary, require(metadata, "tokenizer.ggml.merges"), pre), pre.add_bos
    elif model == "llama":
        scores: list[float] = require(metadata, "tokenizer.ggml.scores")
        tokenizer, add_bos = _sentencepiece(vocabulary, scores, kinds, metadata.get("tokenizer.ggml.add_space_prefix", True)), True
    else:
        raise NotImplementedError(
            f"GGUF tokenizer model {model!r} is not supported: known are 'gpt2' and 'llama'; pass a directory with tokenizer.json"
        )

    special = (int(TokenType.CONTROL), int(TokenType.UNKNOWN))
    pairs = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in pairs if kind in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == TokenType.USER_DEFINED])
    _add_ends(tokenizer, metadata, add_bos)
    return tokenizer


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids after which generation stops: the file's own end tokens, and control tokens known to end a turn or a document."""
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [
        index
        for index, (token, kind) in enumerate(
            zip(metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or [], strict=False)
        )
        if kind == TokenType.CONTROL and token in END_TOKENS
    ]
    return [index for index in named if index is not None] + known


def require(metadata: Mapping[str, Any], key: str) -> Any:
    if metadata.get(key) is None:
        raise ValueError(f"GGUF file has no {key}: it carries no tokenizer; pass a directory with tokenizer.json")
    return metadata[key]


def _pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None and str(metadata.get("general.architecture")).startswith("qwen"):
        name = "qwen2"  # files made before April 2024 do not name it
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise NotImplementedError(f"GGUF pre-tokenizer {name!r} is not supported: known are {known}; pass a directory with tokenizer.json")
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: dict[str, int], merges: Sequence[str], pre: _PreTokenizer) -> Tokenizer:
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"GGUF tokenizer: its merges do not fit its vocabulary: {error}") from error
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: dict[str, int], scores: Sequence[float], kinds: Sequence[int], space_prefix: bool) -> Tokenizer:
    """SentencePiece BPE: the pair whose join has the highest score merges first, so the scores give the order of the merges."""
    if len(scores) != len(vocabulary):
        raise ValueError(f"GGUF tokenizer: {len(scores)} scores for {len(vocabulary)} tokens")
    normal = {token for token, index in vocabulary.items() if kinds[index] == TokenType.NORMAL}
    ranked = []
    for token in normal:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        ranked += [
            (-scores[vocabulary[token]], vocabulary[token], left, right) for left, right in splits if left in normal and right in normal
        ]
    ranked.sort(key=lambda merge: (merge[0], merge[1], -len(merge[2])))
    unknown = next((token for token, index in vocabulary.items() if kinds[index] == TokenType.UNKNOWN), None)
    merges = [(left, right) for _, _, left, right in ranked]
    byte_fallback = int(TokenType.BYTE) in kinds
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback))
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], add_bos: bool) -> None:
    """What add_special puts around a text: the file's add_bos_token and add_eos_token, else what the family does."""
    parts, special = ["$A"], []
    for name, default, place in (("bos", add_bos, 0), ("eos", False, 2)):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default) and index is not None:
            token = tokenizer.id_to_token(index)
            if token is None:
                raise ValueError(f"GGUF tokenizer: {name}_token_id={index} is not in its vocabulary of {tokenizer.get_vocab_size()}")
            parts.insert(place, token)
            special.append((token, index))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=special)
