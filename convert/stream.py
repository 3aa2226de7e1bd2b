"""The pipeline: threads read a checkpoint in file order into host buffers while finished arrays go to the device.

Host memory is bounded by `host_bytes` (or one layer, whichever is more); the file is passed over once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from convert.mapping import Part
from convert.sources import Source

HOST_BYTES = 3 << 29  # 1.5 GiB: two layers of Qwen3-30B-A3B-FP8, one read while the other is copied
READERS = 4
BATCH = 8 << 20  # bytes read per task: small tensors travel together


@dataclass(frozen=True)
class ArrayPlan:
    """One array of ours and the tensors it is made of."""

    key: str
    target: jax.ShapeDtypeStruct
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return self.target.size * self.target.dtype.itemsize


def unit_of(key: str) -> str:
    """What is read and saved together: a layer ("layers.7"), or a part outside the layers ("embedding", "final_norm", "lm_head")."""
    pieces = key.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "layers" else pieces[0]


def make_units(source: Source, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[list[ArrayPlan]]:
    """The arrays by unit, units in the order in which the files hold them."""
    units: dict[str, list[ArrayPlan]] = {}
    for key, target in targets.items():
        units.setdefault(unit_of(key), []).append(ArrayPlan(key, target, source.parts(key)))

    def first(unit: list[ArrayPlan]) -> tuple:
        return min((found.file, found.offset) for plan in unit for found in (source.tensors[part.name] for part in plan.parts))

    return sorted(units.values(), key=first)


class HostBuffers:
    """Arrays to read into, used again once given back: on many systems fresh pages cost more than the copy. 64-byte aligned, so that a
    CPU device takes the buffer itself instead of a copy (such a buffer must not be given back).
    """

    def __init__(self, limit: int):
        self.limit, self.idle_bytes, self.busy_bytes = limit, 0, 0
        self._idle: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self.busy_bytes += size
        if self._idle.get(size):
            raw = self._idle[size].pop()
            self.idle_bytes -= size
        else:
            if self.busy_bytes + self.idle_bytes > self.limit:
                self._idle.clear()
                self.idle_bytes = 0
            raw = np.empty(size + 64, np.uint8)
            raw = raw[-raw.ctypes.data % 64 :][:size]
        return raw.view(dtype).reshape(shape)

    def done(self, array: np.ndarray, reuse: bool) -> None:
        self.busy_bytes -= array.nbytes
        if reuse:
            self._idle.setdefault(array.nbytes, []).append(array.reshape(-1).view(np.uint8))
            self.idle_bytes += array.nbytes


def stream_arrays(
    source: Source,
    units: list[list[ArrayPlan]],
    put: Callable[[str, np.ndarray], tuple[jax.Array | np.ndarray, bool]],
    progress: Callable[[int, int], None] | None = None,
    host_bytes: int = HOST_BYTES,
    readers: int = READERS,
) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
    """Yield every array of `units` in order, as (key, put(key, filled host array)).

    put returns what it made and whether the host array is free again. progress hears (bytes read so far, bytes in all).
    """
    total = sum(source.tensors[part.name].nbytes for unit in units for plan in unit for part in plan.parts)
    read = 0
    buffers = HostBuffers(host_bytes)
    waiting: deque[tuple[ArrayPlan, np.ndarray, list[Future]]] = deque()

    def finish() -> tuple[str, jax.Array | np.ndarray]:
        nonlocal read
        plan, host, tasks = waiting.popleft()
        for task in tasks:
            task.result()
        made, free = put(plan.key, host)
        buffers.done(host, free)
        read += sum(source.tensors[part.name].nbytes for part in plan.parts)
        if progress is not None:
            progress(read, total)
        return plan.key, made

    pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
    try:
        _prefetch(source, units, 0)
        for index, unit in enumerate(units):
            while waiting and buffers.busy_bytes + sum(plan.nbytes for plan in unit) > host_bytes:
                yield finish()
            _prefetch(source, units, index + 1)
            filled = {plan.key: buffers.take(plan.target.shape, plan.target.dtype) for plan in unit}
            tasks = _submit(pool, source, unit, filled)
            waiting.extend((plan, filled[plan.key], tasks[plan.key]) for plan in unit)
            filled = {}
        while waiting:
            yield finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prefetch(source: Source, units: list[list[ArrayPlan]], index: int) -> None:
    if index < len(units):
        source.prefetch([part.name for plan in units[index] for part in plan.parts])


def _submit(pool: ThreadPoolExecutor, source: Source, unit: list[ArrayPlan], filled: dict[str, np.ndarray]) -> dict[str, list[Future]]:
    """Queue the unit's reads in file order; the futures that each array waits for."""
    jobs = [(source.tensors[part.name], plan.key, part) for plan in unit for part in plan.parts]
    jobs.sort(key=lambda job: (job[0].file, job[0].offset))
    tasks: dict[str, list[Future]] = {plan.key: [] for plan in unit}
    batch: list[tuple[str, Part, np.ndarray]] = []
    size = 0
    for at, (found, key, part) in enumerate(jobs):
        batch.append((key, part, filled[key] if part.expert is None else filled[key][part.expert]))
        size += found.nbytes
        if size >= BATCH or at == len(jobs) - 1:
            future = pool.submit(_read_batch, source, batch)
            for name in {item[0] for item in batch}:
                tasks[name].append(future)
            batch, size = [], 0
    return tasks


def _read_batch(source: Source, batch: list[tuple[str, Part, np.ndarray]]) -> None:
    for key, part, out in batch:
        source.read(key, part, out)
