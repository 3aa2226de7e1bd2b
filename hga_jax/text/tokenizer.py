"""The tokenizer of a checkpoint: text to ids and back, its end tokens, its chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import gguf
import jax
import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from hga_jax.text.gguf_metadata import read_gguf_metadata
from hga_jax.text.gguf_tokenizer import build_tokenizer, end_ids, require

TokenIds = Int[np.ndarray, " T"] | Int[jax.Array, " T"] | Sequence[SupportsIndex]


class Tokenizer:
    """Text to token ids and back. Make one with from_directory or from_gguf.

    backend: the `tokenizers.Tokenizer` that does the work.
    eos_ids: ids after which generation stops, ascending; empty when the checkpoint names none.
    bos_id, bos_token, eos_token: the begin token's id, and both tokens' text as chat templates print them, or None.
    chat_template: Jinja source (render it with hga_jax.text.render_chat), or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ):
        # A tokenizer.json may carry the truncation and padding of its training run; a long prompt must come through whole.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token, self.eos_token, self.chat_template = bos_token, eos_token, chat_template
        self.bos_id: int | None = None if bos_token is None else backend.token_to_id(bos_token)
        ends = set(eos_ids)
        if eos_token is not None and (end := backend.token_to_id(eos_token)) is not None:
            ends.add(end)
        self.eos_ids: tuple[int, ...] = tuple(sorted(ends))

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a Hugging Face style directory: tokenizer.json, and where present tokenizer_config.json, chat_template.jinja (or .json),
        generation_config.json and config.json (whose end tokens all count).

        Raises FileNotFoundError without tokenizer.json, ValueError naming the file when one cannot be parsed or contradicts the vocabulary.
        """
        folder = Path(path)
        source = folder / "tokenizer.json"
        if not source.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json: point at a directory that has one, or at a GGUF file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(source))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{source} cannot be read as a tokenizer: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        _add_declared_tokens(backend, config.get("added_tokens_decoder") or {}, folder / "tokenizer_config.json")
        tokens = _read_json(folder / "special_tokens_map.json") | config
        ends: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            declared = _read_json(folder / name).get("eos_token_id")
            ends |= {declared} if isinstance(declared, int) else set(declared or ())
        return cls(
            backend,
            eos_ids=ends,
            bos_token=_token_text(tokens.get("bos_token")),
            eos_token=_token_text(tokens.get("eos_token")),
            chat_template=_find_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, source: str | os.PathLike[str] | gguf.GGUFReader | Mapping[str, Any]) -> Tokenizer:
        """Rebuild the tokenizer of a GGUF file from its metadata; source is its path, an open GGUFReader, or the metadata itself.

        A path is read about 50 times faster than GGUFReader opens one. Raises ValueError when the file carries no tokenizer or a broken
        one, NotImplementedError naming a pre-tokenizer that is not known.
        """
        if isinstance(source, gguf.GGUFReader):
            wanted = ("tokenizer.", "general.architecture")
            metadata = {key: field.contents() for key, field in source.fields.items() if key.startswith(wanted)}
        elif isinstance(source, Mapping):
            metadata = source
        else:
            metadata = read_gguf_metadata(source)
        backend = build_tokenizer(metadata)

        def text_of(name: str) -> str | None:
            index = metadata.get(f"tokenizer.ggml.{name}_token_id")
            return None if index is None else require(metadata, "tokenizer.ggml.tokens")[index]

        return cls(
            backend,
            eos_ids=end_ids(metadata),
            bos_token=text_of("bos"),
            eos_token=text_of("eos"),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and the end tokens (into generation_config.json, other keys there are kept), so that
        from_directory, and transformers, read the same tokenizer back. Files in the directory that would overrule these
        (chat_template.jinja, chat_template.json, special_tokens_map.json) are removed. Raises OSError when the directory cannot be written.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
        }
        for stale in ("chat_template.jinja", "chat_template.json", "special_tokens_map.json"):  # they would go before what is written here
            (folder / stale).unlink(missing_ok=True)
        generation = _read_json(folder / "generation_config.json") | {"eos_token_id": list(self.eos_ids)}
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
        _write_json(folder / "generation_config.json", generation)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A checkpoint's embedding may have more rows; those decode to nothing."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = False) -> Int32[np.ndarray, " T"]:
        """Token ids of a text; special tokens written in it, such as <|im_end|>, become their ids.

        add_special: also put the begin (and, where the checkpoint says so, end) token around it. Chat templates write their own: leave it
        off then.
        """
        # The batch call is the one without character offsets, 15 % faster on a 600 KB text.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: TokenIds, skip_special: bool = False) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        skip_special: leave special tokens out.

        For text that arrives token by token use TextStream: decoding piece by piece breaks characters apart.
        """
        return self.backend.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=skip_special)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    """tokenizer_config.json writes a token as its text or as an object with `content`."""
    return token["content"] if isinstance(token, Mapping) else token


def _add_declared_tokens(backend: tokenizers.Tokenizer, declared: Mapping[str, Mapping[str, Any]], source: Path) -> None:
    """Fine-tunes sometimes add tokens to tokenizer_config.json only; transformers honours them, so must we."""
    for index, spec in sorted((int(index), spec) for index, spec in declared.items()):
        if backend.token_to_id(spec["content"]) is None:
            flags = {name: spec[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in spec}
            backend.add_tokens([tokenizers.AddedToken(spec["content"], **flags)])
        if (found := backend.token_to_id(spec["content"])) != index:
            raise ValueError(
                f"{source} gives token {spec['content']!r} the id {index}, tokenizer.json {found}: they are of different checkpoints"
            )


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before tokenizer_config.json, as in transformers; of several named templates the default one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, Mapping):
        if "default" not in template:
            raise ValueError(f"{folder}: of its chat templates ({', '.join(template)}) none is named 'default'")
        template = template["default"]
    return template
