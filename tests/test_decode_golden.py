"""A sketch-policy sequence decoded token by token through the decode operations, against the float64 golden."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import routed_decode_attention as decode
from pallas_kernels import sketch_routing as sketch
from pallas_kernels.sketch_decode import scan_beside_windows

GOLDEN = Path(__file__).parent / "golden" / "hga" / "sketch_small_pages.npz"


@pytest.mark.parametrize("run", ["xla", "interpret", pytest.param("native", marks=pytest.mark.gpu)])
def test_every_token_sees_the_golden_keys(run):
    if run == "native" and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    golden = np.load(GOLDEN)
    meta = json.loads(str(golden["meta"]))
    query, key, value, rotation = (golden[name].astype(np.float32) for name in ("q", "k", "v", "rotation"))
    length, heads, head_dim = query.shape
    kv_heads, chunk, group = key.shape[1], meta["chunk_size"], meta["group_size"]
    sinks, local, ratio = meta["sink_chunks"], meta["local_chunks"], heads // key.shape[1]
    in_chunk, scale = chunk // group, head_dim**-0.5

    closed = length // chunk * chunk
    means, codes, scales = sketch.sketch_chunks(jnp.asarray(key[:closed].swapaxes(0, 1)), jnp.asarray(rotation), chunk)
    np.testing.assert_array_equal(sketch.unpack_codes(codes)[0], golden["head0_codes"])
    np.testing.assert_allclose(scales[0], golden["head0_scales"], atol=1e-6)
    padded = np.zeros((2, -(-length // chunk) * chunk, kv_heads, head_dim), np.float32)
    padded[:, :length] = key, value
    store = jnp.asarray(padded.reshape(2, -1, group, kv_heads, head_dim).transpose(3, 1, 0, 2, 4))

    how = {"implementation": "xla" if run == "xla" else "pallas", "interpret": run == "interpret"}
    routing = sketch.Config(unpack="arithmetic" if run == "interpret" else "asm", scan_programs=4)
    attention = decode.Config(beside_splits=4, splits=8, tile_pages=4)

    @jax.jit
    def step(token, query, stamps):
        own = token // chunk
        slot, first = jnp.arange((sinks + local + 1) * in_chunk), jnp.maximum(own - local, 0) * in_chunk
        page = jnp.where(slot < sinks * in_chunk, slot, first + slot - sinks * in_chunk)
        used = jnp.where(slot < sinks * in_chunk, slot < first, page < (own + 1) * in_chunk)
        valid = jnp.where(used, jnp.clip(token + 1 - page * group, 0, group), 0)
        window = store[:, jnp.clip(page, 0, store.shape[1] - 1)]
        middle = sketch.middle_of(own, (token + 1) // chunk, sinks, local)
        prepared = sketch.prepare(query, jnp.asarray(rotation), means, middle, **how)
        scores, (part, _), _ = scan_beside_windows(
            query, prepared, codes, scales, middle, window, valid, scale=scale, scan_config=routing, config=attention, **how
        )
        carried = sketch.carried_pages(stamps, own, capacity=128, config=routing, **how)
        old = decode.page_attention(query, *carried, store, scale=scale, parts=carried.count.shape[1], config=attention, **how)
        pages = sketch.select(
            scores, part.stats, stamps, middle, pages_per_chunk=in_chunk, threshold=meta["threshold"], capacity=128, config=routing, **how
        )
        new = decode.page_attention(query, *pages.fresh, store, scale=scale, parts=carried.count.shape[1], config=attention, **how)
        out = decode.merge([part, old, new], jnp.float32, config=attention, **how).out
        return out, pages.stamps, pages.counts[..., 0].sum(1) * group + valid.sum()

    stamps = jnp.full((kv_heads, closed // group), -2, jnp.int32)
    for token in range(length):
        out, stamps, visible = step(jnp.int32(token), jnp.asarray(query[token].reshape(kv_heads, ratio, head_dim)), stamps)
        np.testing.assert_array_equal(np.repeat(np.asarray(visible), ratio), golden["visible_keys"][token], err_msg=f"{token=}")
        np.testing.assert_allclose(np.asarray(out).reshape(heads, head_dim), golden["out"][token], atol=1e-4)
