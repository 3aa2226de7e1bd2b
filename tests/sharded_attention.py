"""A program for four devices (test_sharding.py runs it): hga_attention and its gradient under shard_map, as on one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from reference_cases import PAPER, ROPE, SKETCH, tensors

from hga_jax.attention import hga_attention

BATCH, HEADS = PartitionSpec("x"), PartitionSpec(None, None, "x")


def main() -> None:
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sequences = [tensors(50, heads=8, kv_heads=4, seed=seed) for seed in range(4)]
    q, k, v = (jnp.stack(x) for x in zip(*sequences, strict=True))
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    screened, by_pairs = replace(SKETCH, screening="on"), replace(SKETCH, scan_pairs=3)
    for config, spec in ((SKETCH, BATCH), (screened, HEADS), (by_pairs, HEADS), (replace(PAPER, local_chunks=0), HEADS)):

        def attend(q, k, v, d_out, config=config):
            out, pull = jax.vjp(lambda *x: hga_attention(*x, config=config, rope=ROPE), q, k, v)
            return out, *pull(d_out)

        expected = jax.jit(attend)(q, k, v, d_out)
        split = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))(q, k, v, d_out)
        for ours, theirs in zip(split, expected, strict=True):
            assert len(ours.sharding.device_set) == 4
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        print(config.policy, spec, "ok")


if __name__ == "__main__":
    main()
