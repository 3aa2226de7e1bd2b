"""A million tokens: every index still fits, what does not is refused by name, and the last pages are found. Mostly shapes, no memory."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hga_jax import plan
from hga_jax.attention import HGAAttention
from hga_jax.cache import host
from hga_jax.cache.window import window_places
from hga_jax.config import HGAConfig, ModelConfig
from hga_jax.plan import GIB, layers_to_host, place_history
from pallas_kernels.limits import check_offsets
from pallas_kernels.routed_prefill_attention.kernel import routed_prefill_attention
from pallas_kernels.routed_prefill_attention.kernel import unsupported as cannot_attend
from pallas_kernels.sketch_prefill_routing import unsupported as cannot_route
from pallas_kernels.sketch_prefill_routing.api import route
from pallas_kernels.sketch_prefill_routing.config import Rule
from pallas_kernels.sketch_prefill_routing.keys import page_keys
from pallas_kernels.sketch_prefill_routing.sketches import sketch_pages
from pallas_kernels.sketch_routing import carried_pages, list_shape, middle_of
from pallas_kernels.sketch_routing import kernel as sketch_kernel
from pallas_kernels.sketch_routing.config import Config

MILLION = 2**20
PAGES, CHUNKS = MILLION // 16, MILLION // 64
MODEL = ModelConfig(
    model_type="qwen3", vocab_size=512, hidden_size=256, layers=2, heads=32, kv_heads=4, head_dim=128, mlp_size=256, native_context=MILLION
)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("policy", ["sketch", "paper"])
@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_token_can_be_decoded(policy, tier):
    """The kernels' own checks, over shapes: 4 kv heads of 128 make 2^30 elements a layer."""
    backend = HGAAttention(HGAConfig(policy=policy), MODEL.rope, tier=tier, implementation="interpret")
    state = jax.eval_shape(lambda: backend.init_state(MILLION, 4, 128, jnp.bfloat16))
    query, key = shape(32, 128), shape(4, 128)
    out, after, _ = jax.eval_shape(backend.decode, query, key, key, state)
    assert out.shape == (32, 128)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def prefill_arrays(kv_heads):
    return shape(128, 8 * kv_heads, 128), shape(kv_heads, PAGES, 2, 16, 128)


def sketches(kv_heads):
    return shape(kv_heads, CHUNKS, 128), shape(kv_heads, MILLION, 32, dtype=jnp.uint8), shape(kv_heads, MILLION)


@pytest.mark.parametrize(("kv_heads", "fits"), [(4, True), (8, False)])
def test_prefill_kernels_take_what_fits_and_name_what_does_not(kv_heads, fits):
    """8 kv heads of 128 make exactly 2^31 elements of a layer's pages."""
    query, pages = prefill_arrays(kv_heads)
    number, lists = shape(dtype=jnp.int32), shape(kv_heads, 3, 1, 1024, dtype=jnp.int32)
    rotation, stamps = shape(128, 128, dtype=jnp.float32), shape(kv_heads, PAGES, dtype=jnp.int32)
    rule = Rule(chunk_size=64, group_size=16, sink_chunks=2, local_chunks=8, scale=0.1)
    settings = {"chunk_size": 64, "sink_chunks": 2, "local_chunks": 8, "scale": 0.1}

    def attend(*arrays):
        return routed_prefill_attention(*arrays, **settings, config=None, interpret=True)

    def summarise(pages, *arrays):
        return sketch_pages(pages, *arrays, 256, interpret=True)

    def routing(query, pages, means, codes, scales, rotation, stamps, first, count):
        keys = page_keys(means, codes, scales, rotation, 16, first, implementation="pallas", interpret=True)
        return route(
            query, pages, keys, stamps, first, count, rule=rule, threshold=0.01, capacity=1024, implementation="pallas", interpret=True
        )  # fmt: skip

    calls = [
        (attend, (query, pages, number, number, lists, lists, shape(kv_heads, 3, 1, dtype=jnp.int32))),
        (summarise, (pages, *sketches(kv_heads), shape(kv_heads, 128, dtype=jnp.float32), rotation, number, number)),
        (routing, (query, pages, *sketches(kv_heads), rotation, stamps, number, number)),
    ]
    for call, arrays in calls:
        if fits:
            jax.eval_shape(call, *arrays)
        else:
            with pytest.raises(ValueError, match=r"of shape \(8, 65536, 2, 16, 128\): 2147483648 elements"):
                jax.eval_shape(call, *arrays)
    assert (cannot_route(query, pages, 64, 16) is None) == fits
    assert cannot_attend(query, pages, lists, 64) is None  # page ids and rows share a word: pages count, not elements
    assert "exceed" in cannot_attend(query, shape(1, 2**23, 2, 16, 128), lists, 64)


def test_the_boundary_is_two_to_the_31():
    check_offsets(array=shape(2, 2**15, 2**15 - 1))
    with pytest.raises(ValueError, match=r"array of shape \(2, 32768, 32768\): 2147483648 elements"):
        check_offsets(array=shape(2, 2**15, 2**15))


def gpu():
    device = Mock(spec=jax.Device, platform="gpu", device_kind="made-up GPU", client=Mock(platform_version="made up"))
    device.memory_stats = lambda: {"bytes_limit": 80 * GIB}
    return device


def test_what_the_kernels_cannot_index_is_refused_before_anything_is_loaded():
    wide = replace(MODEL, kv_heads=8)
    backend = HGAAttention(HGAConfig())
    with pytest.raises(ValueError, match=r"8 kv heads x 128 pass 2\^31 elements a layer.*--ctx 1048512 is the most"):
        place_history(wide, backend, MILLION, jnp.bfloat16, "host", device=gpu())
    assert place_history(wide, backend, 1_048_512, jnp.bfloat16, "host", device=gpu())[0].tier == "host"
    assert place_history(MODEL, backend, MILLION, jnp.bfloat16, "host", device=gpu())[0].tier == "host"
    with pytest.raises(ValueError, match=r"needs the decode kernels: group_size=12.*--kv-store device"):
        place_history(MODEL, HGAAttention(HGAConfig(chunk_size=48, group_size=12)), MILLION, jnp.bfloat16, "host", device=gpu())
    assert layers_to_host(MODEL, backend, MILLION, jnp.bfloat16, "host", gpu()) == 0  # no experts


def test_more_than_jax_pins_is_refused_with_the_name_of_its_limit(monkeypatch):
    """4 GiB of history: beyond a limit of 3 GiB, and within what the command asks for where the user said nothing."""
    monkeypatch.setattr(plan, "_main_memory", lambda: ("main memory", 32 * GIB))
    monkeypatch.setenv(host.PINNED_LIMIT, "3")
    plan.allow_pinning_all()
    assert host.pinned_limit() == 3 * GIB
    with pytest.raises(ValueError, match=r"4\.00 GiB of host memory and 3\.00 GiB are available \(XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"):
        place_history(MODEL, HGAAttention(HGAConfig()), MILLION, jnp.bfloat16, "host", device=gpu())[1].check()
    monkeypatch.delenv(host.PINNED_LIMIT)
    assert host.pinned_limit() == 64 * GIB
    plan.allow_pinning_all()
    assert host.pinned_limit() == 32 * GIB
    place_history(MODEL, HGAAttention(HGAConfig()), MILLION, jnp.bfloat16, "host", device=gpu())[1].check()
    monkeypatch.delenv(host.PINNED_LIMIT)


def test_windows_of_the_last_of_a_million_tokens():
    config = HGAConfig()
    pages, valid, newest = window_places(jnp.int32(MILLION - 1), config)
    held = sorted(page for page, count in zip(pages.tolist(), valid.tolist(), strict=True) if count)
    assert held == [*range(8), *range(PAGES - 9 * 4, PAGES)]  # two sinks, eight chunks and the own one
    assert int(pages[newest]) == PAGES - 1


def test_lists_reach_the_last_pages():
    """One kv head, a page in 97 open before, a page in 89 asked for; threshold 1/2 of what windows and pages weigh together."""
    parts, room = list_shape(PAGES, 1024)
    own, middle = CHUNKS - 1, np.arange(8, PAGES - 9 * 4)
    stamps = np.full(PAGES, -2, np.int32)
    stamps[middle[::97]] = own - 1
    scores = np.full((1, PAGES, 8), -1e9, np.float32)
    wanted = middle[::89]
    scores[0, wanted, 0] = 0
    config = Config(unpack="arithmetic", scan_programs=2)
    partials = jnp.full((1, 2, 2, 8), -jnp.inf).at[:, :, 1].set(0).at[0, 0, :, 0].set(jnp.array([0.0, float(len(wanted))]))
    window = jnp.zeros((1, 1, 2, 1))  # one window score of 0 and an empty sum
    chunks = middle_of(jnp.int32(own), jnp.int32(own), 2, 8)
    how = {"pages_per_chunk": 4, "threshold": 0.5 / len(wanted), "parts": parts, "room": room, "config": config, "interpret": True}
    after, fresh, fresh_count, *_ = sketch_kernel.select(jnp.asarray(scores), partials, window, jnp.asarray(stamps)[None], chunks, **how)
    found = np.concatenate([part[:n] for part, n in zip(np.asarray(fresh[0]).reshape(parts, -1), np.asarray(fresh_count[0]), strict=True)])
    expected = np.setdiff1d(wanted, middle[::97])
    assert sorted(found.tolist()) == expected.tolist()
    assert expected[-1] > PAGES - 200
    stamped = np.where(np.isin(np.arange(PAGES), wanted), own, stamps)
    np.testing.assert_array_equal(after[0], stamped)
    for implementation in ("xla", "pallas"):
        before = carried_pages(
            jnp.asarray(stamps)[None], jnp.int32(own), capacity=1024, implementation=implementation, config=config,
            interpret=implementation == "pallas",
        )  # fmt: skip
        listed = np.asarray(before.ids[0]).reshape(parts, -1)
        carried = [page for part, n in zip(listed, np.asarray(before.count[0]), strict=True) for page in part[:n].tolist()]
        assert sorted(carried) == middle[::97].tolist()
