"""Memory that files are read into on their way to the device: what was filled in arrives, and stays when the memory is used again."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.cache.host import put_on_host
from hga_jax.cache.landing import ALIGNMENT, Landing, aligned_zeros, writable_view

SHAPE = (3, 40, 2, 16, 8)


@pytest.fixture(params=["here", "pinned"])
def memory(request, monkeypatch):
    """Rooms as on this machine, and on a CPU also as on a GPU: JAX keeps arrays apart that are said to be pinned."""
    if request.param == "pinned":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return request.param


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rooms_are_used_in_turn(memory, tier):
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 2**15, (7, *SHAPE), np.uint16).view(jnp.bfloat16)
    landing = Landing(SHAPE, "bfloat16", 2)
    taken = []
    for data in expected:
        room, other = landing.room(), landing.room()
        room.data[...] = data
        other.data[...] = 0
        taken.append(landing.take(room, tier))
        landing.take(other, tier)
    for array, data in zip(taken, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint16), data.view(np.uint16))
    if memory == "pinned":
        assert room.array.sharding.memory_kind == "pinned_host"
        assert taken[0].sharding.memory_kind == {"device": "device", "host": "pinned_host"}[tier]


def test_a_room_is_waited_for():
    landing = Landing(SHAPE, np.float32, 1)
    room, got = landing.room(), []
    waiting = threading.Thread(target=lambda: got.append(landing.room()))
    waiting.start()
    waiting.join(0.05)
    assert not got
    landing.give_back(room)
    waiting.join()
    assert got == [room]


def test_view_writes_the_array_itself():
    array = put_on_host(jnp.zeros((5, 64), jnp.float32))
    view = writable_view(array)
    assert view.shape == (5, 64)
    view[2] = np.arange(64)
    expected = np.zeros((5, 64), np.float32)
    expected[2] = np.arange(64)
    np.testing.assert_array_equal(np.asarray(jax.device_put(array, jax.sharding.SingleDeviceSharding(jax.devices()[0]))), expected)


def test_unfilled_rooms_are_zero_and_aligned():
    zeros = aligned_zeros((3, 7), np.dtype(np.float32))
    assert zeros.ctypes.data % ALIGNMENT == 0
    assert not zeros.any()
    assert not np.asarray(Landing((4, 4), np.float32, 1).room().data).any()
