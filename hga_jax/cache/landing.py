"""Host memory that files are read into, on the way to where the history lives, without a copy by the CPU in between.

On a CPU a JAX array takes the memory over. On a GPU it is a few pinned arrays used in turn: a copy of pageable memory to an H100 runs at
8 GB/s, of pinned memory at 46 GB/s, and back to pinned memory at 44 GB/s.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hga_jax.cache.host import put_on_host

ALIGNMENT = 64  # bytes: XLA's CPU client takes such memory as it is, and copies other
logger = logging.getLogger("hga_jax")


class Room(NamedTuple):
    """data: to be filled. array: the pinned array whose memory it is; None where there is none."""

    data: np.ndarray
    array: Array | None


class Landing:
    """Rooms of one shape, zero at first, at most `count` of them out at a time.

    Who fills less of a room than another did before leaves that one's data in the rest. Safe for use by several threads.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, count: int):
        self.shape, self.dtype, self.left = shape, np.dtype(dtype), count
        self.pinned: bool | None = None  # whether rooms are pinned arrays; None: not known, or a CPU
        self._free: list[Room] = []
        self._back = threading.Condition()

    def room(self) -> Room:
        """A room to fill; waits while all are out."""
        with self._back:
            self._back.wait_for(lambda: self._free or self.left)
            if self._free:
                return self._free.pop()
            self.left -= 1
        return self._new()

    def give_back(self, room: Room | None) -> None:
        """A room that was not taken after all may be handed out again (None: another one)."""
        with self._back:
            if room is None:
                self.left += 1
            else:
                self._free.append(room)
            self._back.notify()

    def take(self, room: Room, tier: Literal["device", "host"]) -> Array:
        """What the room holds, as an array on the device or in pinned host memory. The room may be handed out again."""
        if jax.default_backend() == "cpu":
            self.give_back(None)
            return jax.device_put(room.data)
        source = room.data if room.array is None else room.array
        array = jax.device_put(source, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device"))
        array.block_until_ready()
        self.give_back(room)
        return put_on_host(array) if tier == "host" else array

    def _new(self) -> Room:
        if jax.default_backend() == "cpu":
            return Room(aligned_zeros(self.shape, self.dtype), None)
        if self.pinned is None:
            self.pinned = _can_be_written()
            if not self.pinned:
                logger.warning("stored pages pass through pageable memory: pinned arrays cannot be written in place here")
        if not self.pinned:
            return Room(np.zeros(self.shape, self.dtype), None)
        array = put_on_host(jnp.zeros(self.shape, self.dtype))
        return Room(writable_view(array), array)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros in memory that begins at a multiple of ALIGNMENT."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def writable_view(array: Array) -> np.ndarray:
    """The memory of an array on the host, to be written by whoever made the array and shows it to nobody else."""
    array.block_until_ready()
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
    memory.owner = array  # lives as long as any view of its memory
    return np.frombuffer(memory, np.uint8).view(array.dtype).reshape(array.shape)


def _can_be_written() -> bool:
    """JAX does not promise that writing the memory of pinned arrays works, so it is tried: what is written must arrive on the device."""
    try:
        array = put_on_host(jnp.zeros(1024, jnp.int32))
        writable_view(array)[:] = np.arange(1024)
        there = jax.device_put(array, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device"))
        return bool((np.asarray(there) == np.arange(1024)).all())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False
