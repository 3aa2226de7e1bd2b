"""The pipeline: threads read a checkpoint in file order into host buffers while finished arrays go to the device.

Host memory is bounded by the buffers' limit (or one layer, whichever is more); the file is passed over once.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.mapping import Part
from convert.sources import Item, Source

HOST_BYTES = 5 << 28  # 1.25 GiB: two layers of Qwen3-30B-A3B-FP8, one read while the other is copied
READERS = min(8, os.cpu_count() or 1)
BATCH = 8 << 20  # bytes read per task: small tensors travel together
COPIES = 8  # to the device, under way at once


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
        self._idle: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self.busy_bytes += size
        if waiting := self._idle.get((shape, np.dtype(dtype))):
            self.idle_bytes -= size
            return waiting.pop()
        if self.busy_bytes + self.idle_bytes > self.limit:
            for unused in (array for arrays in self._idle.values() for array in arrays):
                self._forget(unused)
            self._idle.clear()
            self.idle_bytes = 0
        return self._new(shape, np.dtype(dtype))

    def done(self, array: np.ndarray, reuse: bool) -> None:
        self.busy_bytes -= array.nbytes
        if reuse:
            self._idle.setdefault((array.shape, array.dtype), []).append(array)
            self.idle_bytes += array.nbytes
        else:
            self._forget(array)

    def to_device(self, host: np.ndarray, target: jax.sharding.Sharding) -> tuple[jax.Array, bool]:
        """Start to copy one of these arrays; also whether it is free again afterwards (a CPU device may keep the buffer itself)."""
        array = jax.device_put(host, target)
        kept = any(device.platform == "cpu" for device in target.device_set) or target.memory_kind not in (None, "device")
        return array, not kept

    def _new(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        raw = np.empty(size + 64, np.uint8)
        return raw[-raw.ctypes.data % 64 :][:size].view(dtype).reshape(shape)

    def _forget(self, array: np.ndarray) -> None:
        """An array that will not be used again."""


class PinnedBuffers(HostBuffers):
    """Arrays that a GPU's copy engine reads without staging: 46 GB/s on an H100 (PCIe 5) where ordinary ones reach 8.

    Each is the memory of a JAX array in pinned host memory, written through its address. That breaks JAX's rule that arrays do not change,
    which is safe here alone: nobody else sees the pinned array until it is complete, and copies out of it are waited for.
    """

    def __init__(self, limit: int, device: jax.Device):
        super().__init__(limit)
        self._device = jax.sharding.SingleDeviceSharding(device)
        self._sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self._owners: dict[int, jax.Array] = {}
        # JAX pins memory in regions, each twice the one before: growing buffer by buffer, it would pin twice what they need. Asked for all
        # of it first, it pins one region (the next power of two), and the buffers come out of that.
        self._pinned((limit,), np.dtype(np.uint8)).delete()

    def to_device(self, host: np.ndarray, target: jax.sharding.Sharding) -> tuple[jax.Array, bool]:
        owner = self._owners[host.ctypes.data]
        if target == self._sharding:
            return owner, False
        return jax.device_put(owner, target), True

    def _new(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        owner = self._pinned(shape, dtype)
        address = owner.unsafe_buffer_pointer()
        self._owners[address] = owner
        memory = (ctypes.c_uint8 * owner.nbytes).from_address(address)
        return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)

    def _pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        """Zeros that come from the device: from main memory they would pass through another pinned array as large."""
        return jax.block_until_ready(jax.device_put(jnp.zeros(shape, dtype, device=self._device), self._sharding))

    def _forget(self, array: np.ndarray) -> None:
        del self._owners[array.ctypes.data]


def stream_arrays(
    source: Source,
    units: list[list[ArrayPlan]],
    put: Callable[[str, np.ndarray], tuple[jax.Array | np.ndarray, bool]],
    progress: Callable[[int, int], None] | None = None,
    buffers: HostBuffers | None = None,
    readers: int = READERS,
) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
    """Yield every array of `units` in order, as (key, put(key, filled host array)).

    put returns what it made and whether the host array is free again once that is complete. progress hears (bytes read so far, bytes in
    all). buffers: where host arrays come from; their limit bounds how far reading runs ahead.
    """
    total = sum(source.tensors[part.name].nbytes for unit in units for plan in unit for part in plan.parts)
    read = 0
    buffers = buffers or HostBuffers(HOST_BYTES)
    waiting: deque[tuple[ArrayPlan, np.ndarray, list[Future]]] = deque()
    copying: deque[tuple[jax.Array | np.ndarray, np.ndarray, bool]] = deque()

    def release(most: int) -> None:
        """Wait until at most `most` copies are under way, oldest first: waiting for every small one costs more than copying it."""
        while len(copying) > most:
            made, host, free = copying.popleft()
            jax.block_until_ready(made)
            buffers.done(host, free)

    def finish() -> tuple[str, jax.Array | np.ndarray]:
        nonlocal read
        plan, host, tasks = waiting.popleft()
        for task in tasks:
            task.result()
        made, free = put(plan.key, host)
        copying.append((made, host, free))
        release(COPIES)
        read += sum(source.tensors[part.name].nbytes for part in plan.parts)
        if progress is not None:
            progress(read, total)
        return plan.key, made

    pool = ThreadPoolExecutor(readers, thread_name_prefix="read")
    try:
        _prefetch(source, units, 0)
        for index, unit in enumerate(units):
            while (waiting or copying) and buffers.busy_bytes + sum(plan.nbytes for plan in unit) > buffers.limit:
                if copying:
                    release(0)
                else:
                    yield finish()
            _prefetch(source, units, index + 1)
            filled = {plan.key: buffers.take(plan.target.shape, plan.target.dtype) for plan in unit}
            tasks = _submit(pool, source, unit, filled)
            waiting.extend((plan, filled[plan.key], tasks[plan.key]) for plan in unit)
            filled = {}
        while waiting:
            yield finish()
        release(0)
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
    batch: list[Item] = []
    size = 0
    for at, (found, key, part) in enumerate(jobs):
        batch.append(Item(key, part, filled[key] if part.expert is None else filled[key][part.expert]))
        size += found.nbytes
        if size >= BATCH or at == len(jobs) - 1:
            future = pool.submit(source.read, batch)
            for name in {item.key for item in batch}:
                tasks[name].append(future)
            batch, size = [], 0
    return tasks
