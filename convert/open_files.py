"""Reading files at an offset, from several threads: no memory map whose pages count as the process's memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np

MOST_BUFFERS = 512  # a call takes; Linux allows 1024


class OpenFiles:
    """Open files by path, and reads at an offset; short reads are errors, not garbage."""

    def __init__(self):
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]

    def read(self, file: Path, offset: int, *outs: np.ndarray) -> None:
        """Fill contiguous uint8 arrays with what lies one after another in the file, in as few calls as the system allows."""
        descriptor, views, first = self._descriptor(file), [memoryview(out) for out in outs if len(out)], 0
        while first < len(views):
            count = os.preadv(descriptor, views[first : first + MOST_BUFFERS], offset)
            if not count:
                raise ValueError(f"{file}: ends at byte {offset} although it was longer when it was opened")
            offset += count
            while first < len(views) and count >= len(views[first]):
                count -= len(views[first])
                first += 1
            if count:
                views[first] = views[first][count:]

    def prefetch(self, spans: list[tuple[Path, int, int]]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        for file, offset, length in merge_spans(spans):
            os.posix_fadvise(self._descriptor(file), offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


def merge_spans(spans: list[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """(file, offset, length) in file order, neighbours joined."""
    merged: list[tuple[Path, int, int]] = []
    for file, offset, length in sorted(spans):
        if merged and merged[-1][0] == file and offset <= merged[-1][1] + merged[-1][2]:
            start = merged[-1][1]
            merged[-1] = (file, start, max(merged[-1][2], offset + length - start))
        else:
            merged.append((file, offset, length))
    return merged
