"""The two kinds of foreign checkpoints behind one face: what tensors there are, and filling an array of ours from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from convert.gguf_config import config_from_gguf
from convert.gguf_files import GGUFFile, rotary_order
from convert.mapping import HARMLESS_GGUF, HARMLESS_HF, Part, gguf_parts, hf_parts, row_of
from convert.open_files import OpenFiles
from convert.safetensors_files import NAMES, SafetensorsDirectory
from hga_jax.config import ModelConfig

FLOATS = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
PIECE = 4 << 20  # bytes read at a time where the dtype changes on the way: the piece stays in the cache


class Found(NamedTuple):
    """What a checkpoint says of a tensor. kind: "float" (bf16, f16, f32 or a ggml type that becomes numbers), "fp8" or "other"."""

    shape: tuple[int, ...]
    label: str
    kind: str
    file: Path
    offset: int
    nbytes: int


class Item(NamedTuple):
    """A tensor to read: the key of our array, the part of it, and the array to fill (ours or, of a stack over experts, its row)."""

    key: str
    part: Part
    out: np.ndarray


class Piece(NamedTuple):
    """Bytes of a file to read into `raw`, which is `out` itself or, where the dtype differs, what will be converted to it."""

    file: Path
    offset: int
    raw: np.ndarray
    out: np.ndarray

    @property
    def converts(self) -> bool:
        return self.raw is not self.out


def neighbours(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Runs that lie one after another in a file, to be read in one call: a layer of experts is hundreds of tensors. What a run converts
    stays around PIECE bytes."""
    run: list[Piece] = []
    converting, end = 0, None
    for piece in pieces:
        if run and ((piece.file, piece.offset) != end or converting >= PIECE):
            yield run
            run, converting = [], 0
        run.append(piece)
        converting += piece.raw.nbytes if piece.converts else 0
        end = (piece.file, piece.offset + piece.raw.nbytes)
    if run:
        yield run


@runtime_checkable
class Source(Protocol):
    """A checkpoint of another format."""

    path: Path
    config: ModelConfig
    dtype: np.dtype
    raw: dict[str, Any]
    tensors: dict[str, Found]

    def parts(self, key: str) -> tuple[Part, ...]:
        """The tensors that make up our array `key`."""

    def is_harmless(self, name: str) -> bool:
        """Whether a tensor that no array of ours needs is known and may be left out."""

    def read(self, batch: list[Item]) -> None:
        """Fill each item's array, converting to its dtype; items in file order read fastest. Safe to call from several threads."""

    def prefetch(self, names: list[str]) -> None:
        """Tell the system that these tensors are wanted soon."""

    def close(self) -> None: ...


class HuggingFaceSource:
    """config.json and safetensors in a directory. Raises ValueError when either cannot be read or the model is not supported."""

    def __init__(self, path: Path):
        self.path = path
        self.raw, self.config = read_hf_config(path)
        self._tensors = SafetensorsDirectory(path).tensors
        self._files = OpenFiles()
        kinds = {FP8: "fp8", **dict.fromkeys(FLOATS, "float")}
        self.tensors = {
            name: Found(info.shape, NAMES[info.dtype], kinds.get(info.dtype, "other"), info.file, info.offset, info.nbytes)
            for name, info in self._tensors.items()
        }
        embedding = self._tensors.get("model.embed_tokens.weight")
        self.dtype = embedding.dtype if embedding is not None and embedding.dtype in FLOATS else FLOATS[0]

    def parts(self, key: str) -> tuple[Part, ...]:
        return hf_parts(key, self.config)

    def is_harmless(self, name: str) -> bool:
        return bool(HARMLESS_HF.search(name)) or (name == "lm_head.weight" and self.config.tie_embeddings)

    def read(self, batch: list[Item]) -> None:
        for run in neighbours(self._pieces(batch)):
            self._files.read(run[0].file, run[0].offset, *(piece.raw.view(np.uint8) for piece in run))
            for piece in run:
                if piece.converts:
                    piece.out[:] = piece.raw

    def _pieces(self, batch: list[Item]) -> Iterator[Piece]:
        for item in batch:
            info, flat = self._tensors[item.part.name], item.out.reshape(-1)
            if info.dtype == flat.dtype:
                yield Piece(info.file, info.offset, flat, flat)
                continue
            step = PIECE // info.dtype.itemsize
            for start in range(0, flat.size, step):
                some = flat[start : start + step]
                yield Piece(info.file, info.offset + start * info.dtype.itemsize, np.empty(some.size, info.dtype), some)

    def prefetch(self, names: list[str]) -> None:
        self._files.prefetch([(found.file, found.offset, found.nbytes) for found in map(self.tensors.__getitem__, names)])

    def close(self) -> None:
        self._files.close()


class GGUFSource:
    """One GGUF file. Raises ValueError when it cannot be read or the model is not supported."""

    def __init__(self, path: Path):
        self.path = path
        self._files = OpenFiles()
        self._file = GGUFFile(path, self._files)
        self.raw: dict[str, Any] = {k: v for k, v in self._file.metadata.items() if not isinstance(v, list)}
        factors = None
        if "rope_freqs.weight" in self._file.tensors:
            factors = np.zeros(self._file.tensors["rope_freqs.weight"].shape, np.float32)
            self._file.read("rope_freqs.weight", factors)
        try:
            self.config = config_from_gguf(self._file.metadata, self._file.tensors, factors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        usable = {kind: self._file.can_dequantize(name) for name, kind in {n: t.kind for n, t in self._file.tensors.items()}.items()}
        self.tensors = {
            name: Found(info.shape, info.kind.name, "float" if usable[info.kind] else "other", path, info.offset, info.nbytes)
            for name, info in self._file.tensors.items()
        }
        label = self.tensors["token_embd.weight"].label if "token_embd.weight" in self.tensors else ""
        self.dtype = {"F32": FLOATS[2], "F16": FLOATS[1]}.get(label, FLOATS[0])

    def parts(self, key: str) -> tuple[Part, ...]:
        return gguf_parts(key)

    def is_harmless(self, name: str) -> bool:
        return bool(HARMLESS_GGUF.search(name))

    def read(self, batch: list[Item]) -> None:
        for key, part, out in batch:
            row, _ = row_of(key)
            order = None
            if row.transform == "rotary" and self.config.model_type == "llama":
                heads = self.config.heads if row.path.startswith("layers.{i}.attention.q") else self.config.kv_heads
                order = rotary_order(out.shape[0], heads)
            self._file.read(part.name, out, order)

    def prefetch(self, names: list[str]) -> None:
        self._files.prefetch([(found.file, found.offset, found.nbytes) for found in map(self.tensors.__getitem__, names)])

    def close(self) -> None:
        self._files.close()


def read_hf_config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """A directory's config.json, raw and parsed. Raises ValueError naming the file."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: has no config.json: a Hugging Face checkpoint directory, a converted one or a GGUF file is expected")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: must hold a JSON object, not {type(raw).__name__}")
    try:
        return raw, ModelConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
