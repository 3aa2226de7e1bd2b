"""Safetensors by header and memory map: every dtype that ml_dtypes knows (FP8 included), checked before use, nothing read until asked for.

The libraries' own numpy readers fail on FP8. Format: 8 bytes header length (little endian), a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "U16": np.dtype(np.uint16), "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "U64": np.dtype(np.uint64), "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "C64": np.dtype(np.complex64),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`, `shape` row-major elements of `dtype`."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsFile:
    """One file. `tensors` maps names to TensorInfo; `view(name)` is an array over the memory map.

    Raises ValueError, one line naming the file and the fault, when the header cannot be trusted or disagrees with the file's size.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.tensors, self.metadata = _read_header(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, mode="r")

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the file; its bytes are read when they are used."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.zeros(info.shape, info.dtype)
        return np.asarray(self._bytes[info.offset : info.offset + info.nbytes]).view(info.dtype).reshape(info.shape)


class SafetensorsDirectory:
    """A checkpoint directory: model.safetensors, or the shards that model.safetensors.index.json lists."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        index = self.path / INDEX
        if index.exists():
            placed = _read_index(index)
            self.files = {file: SafetensorsFile(self.path / file) for file in sorted(set(placed.values()))}
            absent = sorted(name for name, file in placed.items() if name not in self.files[file].tensors)
            if absent:
                raise ValueError(f"{index}: names {len(absent)} tensors that their files do not hold: {_some(absent)}")
        elif (self.path / SINGLE).exists():
            placed = None
            self.files = {SINGLE: SafetensorsFile(self.path / SINGLE)}
        else:
            raise ValueError(f"{self.path}: holds neither {SINGLE} nor {INDEX}")
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for file, opened in self.files.items():
            for name, info in opened.tensors.items():
                if placed is not None and placed.get(name, file) != file:
                    continue  # a stray copy of a tensor that the index places elsewhere
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise ValueError(f"{self.path}: {name!r} is in {other} and in {file}, and the index lists neither")
                self.tensors[name], self._file_of[name] = info, opened

    def view(self, name: str) -> np.ndarray:
        return self._file_of[name].view(name)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        placed = json.loads(path.read_text())["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not a safetensors index (a JSON object with a weight_map of tensor name to file name)") from error
    outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    if outside:
        raise ValueError(f"{path}: names a file outside its directory: {outside[0]!r}")
    absent = [file for file in files if not (path.parent / file).is_file()]
    if absent:
        raise ValueError(f"{path}: names {len(absent)} of {len(files)} files that are absent: {_some(absent)}")
    return placed


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER:
            raise ValueError(f"{path}: corrupt or not safetensors: its first 8 bytes announce a header of {length} bytes")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated: the header ends at byte {8 + length}, the file at byte {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: corrupt header: not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: corrupt header: a JSON object is expected, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    end, last = 8 + length, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            raise ValueError(f"{path}: corrupt header: {name!r} starts at byte {info.offset}, inside {last!r}, which ends at byte {end}")
        if info.offset > end:
            raise ValueError(f"{path}: corrupt header: bytes {end} to {info.offset}, between {last!r} and {name!r}, belong to no tensor")
        end, last = info.offset + info.nbytes, name
    if end > size:
        raise ValueError(f"{path}: truncated: {last!r} ends at byte {end}, the file at byte {size}")
    if end < size:
        raise ValueError(f"{path}: corrupt: {size - end} bytes follow the last tensor {last!r}")
    return tensors, metadata


def _tensor_info(path: Path, name: str, entry: object, data: int) -> TensorInfo:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: corrupt header: {name!r} has no valid dtype, shape and data_offsets") from error
    if kind not in DTYPES:
        raise ValueError(f"{path}: {name!r} has dtype {kind!r}, which is unknown; known are {', '.join(DTYPES)}")
    need = math.prod(shape) * DTYPES[kind].itemsize
    if stop - start != need:
        raise ValueError(f"{path}: corrupt header: {name!r} is {kind} {shape}, {need} bytes, but its offsets span {stop - start}")
    return TensorInfo(path, data + start, need, tuple(shape), DTYPES[kind])


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    pieces: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write one file: header first, then the tensors' bytes, then a rename, so that a killed write leaves no file of that name.

    tensors: name -> (shape, dtype), in file order. pieces: the tensors' contents in that order, a tensor in one or more pieces.
    Returns the bytes of tensor data written. Raises ValueError when the pieces do not add up to the tensors.
    """
    path, header, offset = Path(path), {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data starts 8-byte aligned
    partial, written = path.with_name(path.name + ".partial"), 0
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for piece in pieces:
                piece = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                file.write(piece)
                written += piece.nbytes
        if written != offset:
            raise ValueError(f"{path}: {written} bytes of tensors were given, the header promises {offset}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return written
