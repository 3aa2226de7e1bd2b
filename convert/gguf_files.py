"""GGUF files: what tensors they hold and their values, dequantised block of rows by block of rows with the `gguf` package."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from convert.open_files import OpenFiles
from hga_jax.text.gguf_metadata import read_gguf_header

BLOCK_ELEMENTS = 1 << 20  # dequantised at a time: 4 MB of float32, which stays in the cache


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies, its row-major shape and its ggml type."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType


class GGUFFile:
    """One GGUF file: `metadata` as Python values, `tensors` as GGUFTensor; `read` fills an array.

    Raises ValueError, one line naming the file, when it is no GGUF, cut off, corrupt, or one part of a split model.
    """

    def __init__(self, path: str | os.PathLike, files: OpenFiles | None = None):
        self.path = Path(path)
        self._files = OpenFiles() if files is None else files
        try:
            self.metadata, table = read_gguf_header(self.path)
            size = self.path.stat().st_size
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
        if (parts := self.metadata.get("split.count", 0)) > 1:
            raise ValueError(f"{self.path}: is one of {parts} parts: join them first with `llama-gguf-split --merge`")
        self.tensors: dict[str, GGUFTensor] = {}
        for name, info in table.items():
            try:
                kind = gguf.GGMLQuantizationType(info.kind)
            except ValueError as error:
                raise ValueError(f"{self.path}: {name!r} has ggml type {info.kind}, which the gguf package does not know") from error
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if info.shape and info.shape[-1] % block:
                raise ValueError(f"{self.path}: corrupt: {name!r} is {kind.name} {list(info.shape)}, but {kind.name} rows come in {block}s")
            nbytes = math.prod(info.shape) // block * block_bytes
            if info.offset + nbytes > size:
                raise ValueError(f"{self.path}: truncated: {name!r} ends at byte {info.offset + nbytes}, the file at byte {size}")
            self.tensors[name] = GGUFTensor(self.path, info.offset, nbytes, info.shape, kind)

    def can_dequantize(self, name: str) -> bool:
        """Whether the gguf package turns this tensor's type into numbers."""
        kind = self.tensors[name].kind
        try:
            dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def read(self, name: str, out: np.ndarray, order: np.ndarray | None = None) -> None:
        """Fill `out` (of the tensor's shape, any float dtype). order: row r of the file goes to row order[r] of `out`."""
        info = self.tensors[name]
        width = info.shape[-1]
        rows = math.prod(info.shape[:-1])
        if order is not None and len(info.shape) == 1:  # a llama q or k bias: its elements are the rows
            out[order] = self._block(info, 0, rows, 1).reshape(-1)
            return
        target = out.reshape(rows, width)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, rows, step):
            where: Any = slice(start, start + step) if order is None else order[start : start + step]
            target[where] = self._block(info, start, min(step, rows - start), rows)

    def _block(self, info: GGUFTensor, start: int, count: int, rows: int) -> np.ndarray:
        """Rows start..start+count of a tensor of `rows` rows, dequantised to float32."""
        stride = info.nbytes // rows
        data = np.empty((count, stride), np.uint8)
        self._files.read(info.file, info.offset + start * stride, data.reshape(-1))
        return dequantize(data, info.kind).reshape(count, -1)


def rotary_order(rows: int, heads: int) -> np.ndarray:
    """Where the rows of a llama GGUF's q or k go: its heads interleave pairs (0, H/2, 1, H/2+1, ...), ours are half-split."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
