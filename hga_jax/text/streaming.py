"""Text of a running generation: only characters that no later token can change."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import ClassVar, SupportsIndex

import numpy as np
import tokenizers

from hga_jax.text.tokenizer import TokenIds, Tokenizer


class TextStream:
    """Feed token ids as they come; get text that is final.

    What feed and flush return, joined, is exactly `tokenizer.decode(all ids, skip_special)` cut before the first stop string to complete,
    however the ids are split over calls. A character whose bytes are not all there is held back, and so is text that may become a stop
    string. Work per token does not grow with the length of the output.

    stop: strings that end the text; when one completes, it and what follows is dropped and `stopped` is True.
    skip_special: leave special tokens out.
    Raises ValueError for an empty stop string, NotImplementedError for a decoder other than byte-level BPE or SentencePiece with byte
    fallback.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special: bool = False):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"{stop=}: give a list of non-empty strings")
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""
        self._flushed = False
        self._pieces = _decoder_of(tokenizer.backend)
        self._token_of = tokenizer.backend.id_to_token
        added = tokenizer.backend.get_added_tokens_decoder()
        self._skipped = {index for index, token in added.items() if skip_special and token.special}

    def feed(self, ids: SupportsIndex | TokenIds) -> str:
        """Take the next id, or several, and return the text that became final; "" once stopped."""
        if self._flushed:
            raise ValueError("this TextStream was flushed: make a new one for a new text")
        text = ""
        if not self.stopped:
            tokens = (self._token_of(index) for index in np.atleast_1d(np.asarray(ids, np.int64)).tolist() if index not in self._skipped)
            text = "".join(self._pieces.feed(token) for token in tokens if token is not None)
        return self._release(text)

    def flush(self) -> str:
        """The text still held back, at the end of the generation; bytes of an unfinished character become U+FFFD, as in decode."""
        rest = "" if self._flushed or self.stopped else self._pieces.finish()
        self._flushed = True
        return self._release(rest)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # The stop string that completes first counts, and of two that complete together the longer: as if fed character by character.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = 0 if self._flushed else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNPRINTED = (*range(33), *range(127, 161), 173)


class _ByteLevelPieces:
    """GPT-2's decoder: every character of a token stands for one byte; the bytes of all tokens are read as UTF-8."""

    # Bytes that print stand for themselves, the others for U+0100 and on, in order.
    _BYTE_OF: ClassVar = {chr(byte): byte for byte in _PRINTED} | {chr(256 + place): byte for place, byte in enumerate(_UNPRINTED)}

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: str) -> str:
        try:
            data = bytes(self._BYTE_OF[character] for character in token)
        except KeyError:  # an added token that is written in plain text
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallbackPieces:
    """SentencePiece's decoder: ▁ is a space, one space is dropped at the start; a run of <0x..> tokens is text only if all UTF-8."""

    _BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

    def __init__(self, strip_first_space: bool):
        self._strip = strip_first_space
        self._run = bytearray()

    def feed(self, token: str) -> str:
        token = token.replace("▁", " ")
        if byte := self._BYTE.fullmatch(token):
            self._run.append(int(byte[1], 16))
            return ""
        return self._without_first_space(self._end_run() + token)

    def finish(self) -> str:
        return self._without_first_space(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _without_first_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _decoder_of(backend: tokenizers.Tokenizer) -> _ByteLevelPieces | _ByteFallbackPieces:
    # The Python object does not show its settings; its serialized form does.
    spec = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteLevelPieces()
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if steps[:3] == [space, {"type": "ByteFallback"}, {"type": "Fuse"}] and steps[3:] in ([], [strip]):
        return _ByteFallbackPieces(strip_first_space=bool(steps[3:]))
    raise NotImplementedError(f"streaming text is not supported for the decoder {' + '.join(str(step['type']) for step in steps)}")
