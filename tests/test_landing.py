"""Memory that files are read into on their way to the device: what was filled in arrives, and stays when the memory is used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax.cache.host import put_on_host
from hga_jax.cache.landing import ALIGNMENT, Landing, aligned_zeros, writable_view

SHAPE = (3, 40, 2, 16, 8)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_rooms_are_used_in_turn(tier):
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


@pytest.mark.gpu
def test_rooms_are_pinned_and_hold_what_goes_to_the_host():
    landing = Landing(SHAPE, "bfloat16", 1)
    room = landing.room()
    assert room.array.sharding.memory_kind == "pinned_host"
    assert landing.take(room, "host").sharding.memory_kind == "pinned_host"
    assert landing.room().array is room.array
    assert landing.take(room, "device").sharding.memory_kind == "device"


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
