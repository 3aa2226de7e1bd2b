"""Inputs, configurations and the comparison with the float64 oracle that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax.attention import hga_attention
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.reference import reference_attention
from hga_jax.rope import rotate
from hga_jax.sketches import built_in_rotation

ROPE = RopeConfig(10000.0)
SKETCH = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=2, policy="sketch", threshold=0.02, votes=0)
PAPER = HGAConfig(chunk_size=16, group_size=4, sink_chunks=1, local_chunks=2, policy="paper", top_chunks=3, top_groups=8)


def tensors(tokens, heads=4, kv_heads=2, head_dim=16, seed=0, rope=ROPE):
    """Rotated queries and keys with some structure, so that selection is not a coin toss."""
    random = np.random.default_rng(seed)
    topics = random.standard_normal((5, head_dim))
    topic = topics[random.integers(0, 5, tokens // 3 + 1).repeat(3)[:tokens]]
    q = random.standard_normal((tokens, heads, head_dim)) + topic[:, None]
    k = random.standard_normal((tokens, kv_heads, head_dim)) + topic[:, None]
    v = random.standard_normal((tokens, kv_heads, head_dim))
    positions = jnp.arange(tokens)
    turned = (rotate(jnp.asarray(x, jnp.float32), positions, rope) for x in (q, k))
    return *(np.asarray(x) for x in turned), v.astype(np.float32)


def check(q, k, v, config, rope=ROPE, start=0, **more):
    """Outputs within float32's rounding, and the same number of visible keys for every query and head."""
    if config.policy == "sketch":
        more["rotation"] = built_in_rotation(q.shape[-1])
    expected = reference_attention(q[start:], k, v, config=config, rope=rope, query_start=start, **more)
    run = jax.jit(
        lambda q, k, v: hga_attention(q, k, v, config=config, rope=rope, query_start=start, return_stats=True, **more),
    )
    out, stats = run(q[None, start:], k[None], v[None])
    np.testing.assert_array_equal(stats.visible_keys[0], expected.visible_keys)
    np.testing.assert_allclose(out[0], expected.out, atol=2e-5)
    return stats.totals, expected
