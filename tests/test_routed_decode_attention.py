"""Decode attention over windows and routed pages: kernels and XLA twin against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routed_decode_attention as decode
from pallas_kernels.routed_decode_attention.reference import reference_attention

RUNS = ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)]
SMALL = decode.Config(tile_pages=4, splits=4, window_tile_pages=4, window_splits=4)


def settings(run):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    return {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret", "config": SMALL}


def tolerance(dtype):
    return 1e-5 if dtype == np.float32 else 1e-2  # bfloat16 has 8 bits: weights and outputs round at 2^-9 each


def problem(kv_heads, heads, head_dim, pages, group, windows, dtype, seed=0):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    valid = rng.integers(1, group + 1, windows).astype(np.int32)
    return (
        random(kv_heads, heads, head_dim),
        random(kv_heads, windows, 2, group, head_dim),
        valid,
        random(kv_heads, pages, 2, group, head_dim),
    )


def page_list(listed, capacity):
    ids = np.full((len(listed), capacity), 2**20, np.int32)  # what lies beyond the count must not matter
    for k, pages in enumerate(listed):
        ids[k, : len(pages)] = pages
    return jnp.asarray(ids), jnp.asarray([[len(pages), 0] for pages in listed], jnp.int32)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(n, h, np.float32) for n, h in [(1, 64), (4, 128), (7, 64), (8, 128), (3, 80), (2, 96), (17, 64)]]
    + [(8, 128, jnp.bfloat16), (3, 80, jnp.bfloat16)],
)
def test_windows_and_pages(run, heads, head_dim, dtype):
    how, rng = settings(run), np.random.default_rng(7)
    query, window, valid, store = problem(2, heads, head_dim, pages=37, group=16, windows=5, dtype=dtype)
    listed = [sorted(rng.permutation(37)[:19]), sorted(rng.permutation(37)[:1])]
    ids, counts = page_list(listed, 24)
    scale = head_dim**-0.5
    part, *_ = decode.window_attention(query, window, jnp.asarray(valid), scale=scale, **how)
    more = decode.page_attention(query, ids, counts, store, scale=scale, **how)
    out = decode.merge([part, more], dtype, **how).out
    assert out.dtype == dtype
    expected = reference_attention(query, window, valid, store, listed, None, scale)
    assert np.abs(np.asarray(out, np.float64) - expected).max() <= tolerance(dtype) * np.abs(expected).max()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("listed", [[[], []], [list(range(9)), []], [list(range(9)), list(range(9))]])
def test_no_pages_and_all_pages(run, listed):
    how = settings(run)
    query, window, valid, store = problem(2, 4, 64, pages=9, group=16, windows=1, dtype=np.float32)
    ids, counts = page_list(listed, 9)
    part, *_ = decode.window_attention(query, window, jnp.asarray(valid), scale=0.125, **how)
    more = decode.page_attention(query, ids, counts, store, scale=0.125, **how)
    expected = reference_attention(query, window, valid, store, listed, None, 0.125)
    np.testing.assert_allclose(decode.merge([part, more], np.float32, **how).out, expected, atol=1e-5)
    alone = reference_attention(query, window, 0 * valid, store, listed, None, 0.125)
    np.testing.assert_allclose(decode.merge([more], np.float32, **how).out, alone, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_list_in_parts(run):
    """Three parts, one empty, one full."""
    how, rng = settings(run), np.random.default_rng(3)
    query, window, valid, store = problem(2, 4, 64, pages=30, group=8, windows=3, dtype=np.float32)
    listed = [[], []]
    ids, counts = np.full((2, 12), 2**20, np.int32), np.zeros((2, 3), np.int32)  # what lies beyond the counts must not matter
    for k in range(2):
        for part, count in enumerate(rng.permutation([0, 2, 4])):
            chosen = rng.permutation([page for page in range(30) if page % 3 == part])[:count]
            ids[k, 4 * part : 4 * part + count], counts[k, part] = chosen, count
            listed[k] += list(chosen)
    part, *_ = decode.window_attention(query, window, jnp.asarray(valid), scale=0.125, **how)
    routed = decode.page_attention(query, jnp.asarray(ids), jnp.asarray(counts), store, parts=3, scale=0.125, **how)
    expected = reference_attention(query, window, valid, store, listed, None, 0.125)
    np.testing.assert_allclose(decode.merge([part, routed], np.float32, **how).out, expected, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_each_head_sees_its_own_pages(run):
    how, rng = settings(run), np.random.default_rng(2)
    query, window, valid, store = problem(2, 7, 64, pages=30, group=8, windows=3, dtype=np.float32)
    listed = [sorted(rng.permutation(30)[:20]) for _ in range(2)]
    bits = rng.integers(0, 2**7, (2, 32)).astype(np.int32) & ~4  # head 2 sees no page at all
    heads = [{page: {n for n in range(7) if bits[k, i] >> n & 1} for i, page in enumerate(listed[k])} for k in range(2)]
    ids, counts = page_list(listed, 32)
    part, *_ = decode.window_attention(query, window, jnp.asarray(valid), scale=0.125, **how)
    more = decode.page_attention(query, ids, counts, store, scale=0.125, heads=jnp.asarray(bits), **how)
    expected = reference_attention(query, window, valid, store, listed, heads, 0.125)
    np.testing.assert_allclose(decode.merge([part, more], np.float32, **how).out, expected, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_the_newest_token_joins_the_windows(run):
    """The pages of the windows named by their places in a larger array, the token's row written there and attended to."""
    how, rng = settings(run), np.random.default_rng(4)
    query, store, _, _ = problem(2, 4, 64, pages=1, group=8, windows=9, dtype=np.float32)
    key, value = (jnp.asarray(rng.standard_normal((2, 64)), jnp.float32) for _ in range(2))
    pages, valid, place = np.array([7, -1, 2, 5, 20], np.int32), np.array([8, 0, 8, 4, 0], np.int32), jnp.array([3, 3])
    fresh = decode.FreshToken(key, value, place)
    part, after = decode.window_attention(
        query, store + 0, jnp.asarray(valid), pages=jnp.asarray(pages), fresh=fresh, scale=0.125, **how
    )  # fmt: skip
    expected = store.at[:, 5, 0, 3].set(key).at[:, 5, 1, 3].set(value)
    np.testing.assert_array_equal(after, expected)
    there = expected[:, np.array([7, 2, 5])]
    expected = reference_attention(query, there, valid[[0, 2, 3]], store, [[], []], None, 0.125)
    np.testing.assert_allclose(decode.merge([part], np.float32, **how).out, expected, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_copied_pages_land_in_their_place(run):
    how = settings(run)
    store = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 2, 8, 80)), jnp.bfloat16)
    fresh = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 2, 8, 80)), jnp.bfloat16)
    for target, source, count, most in ((3, 1, 4, 4), (7, 4, 2, 6), (0, 0, 1, 6), (5, 2, 0, 2)):
        out = decode.copy_pages(
            store + 0, fresh, target_page=jnp.int32(target), source_page=jnp.int32(source), count=jnp.int32(count), most=most,
            implementation=how["implementation"], interpret=how["interpret"],
        )  # fmt: skip
        np.testing.assert_array_equal(out, store.at[:, target : target + count].set(fresh[:, source : source + count]))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
def test_host_pages_are_read_and_written_in_place():
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device")
    query, window, valid, store = problem(2, 4, 128, pages=500, group=16, windows=3, dtype=jnp.bfloat16)
    listed = [list(range(1, 300, 3)), list(range(0, 490, 7))]
    ids, counts = page_list(listed, 128)

    def attend(store, query, ids, counts):
        return decode.page_attention(query, ids, counts, store, scale=0.1, implementation="pallas")

    program = jax.jit(attend, in_shardings=(host, device, device, device), out_shardings=device)
    store_host = jax.device_put(store, host)
    assert " copy(" not in program.lower(store_host, query, ids, counts).compile().as_text()
    out = decode.merge([program(store_host, query, ids, counts)], np.float32, implementation="pallas").out
    expected = reference_attention(query, window, 0 * valid, store, listed, None, 0.1)
    np.testing.assert_allclose(out, expected, atol=1e-2)
    fresh = jnp.ones((2, 4, 2, 16, 128), jnp.bfloat16)
    write = jax.jit(
        lambda store, fresh, page: decode.copy_pages(
            jax.device_put(store, jax.memory.Space.Host), fresh, target_page=page, source_page=jnp.int32(0), count=jnp.int32(4), most=4,
            implementation="pallas",
        ),
        donate_argnums=0, in_shardings=(host, device, device), out_shardings=host,
    )  # fmt: skip
    text = write.lower(store_host, fresh, jnp.int32(8)).compile().as_text()
    assert not [line for line in text.splitlines() if " copy(" in line and "[2,500,2,16,128]" in line]
    np.testing.assert_array_equal(np.asarray(write(store_host, fresh, jnp.int32(8))), store.at[:, 8:12].set(1))


def test_a_store_too_large_for_int32_offsets_is_refused():
    with pytest.raises(ValueError, match="one array per layer"):
        jax.eval_shape(
            lambda store: decode.page_attention(
                jnp.zeros((4, 8, 128)),
                jnp.zeros((4, 8), jnp.int32),
                jnp.zeros((4, 2), jnp.int32),
                store,
                scale=1.0,
                implementation="pallas",
            ),
            jax.ShapeDtypeStruct((4, 2**17, 2, 16, 128), jnp.bfloat16),
        )
    with pytest.raises(ValueError, match="splits=3"):
        decode.Config(splits=3)
