"""`bench train`: its numbers are there and its own check of the gradients holds, in small on a CPU."""

from hga_jax.bench.train import measure
from hga_jax.config import HGAConfig


def test_measure():
    result = measure(1280, (2, 1, 16), HGAConfig(), opened=4, repeats=1, check=True)
    assert result["fetched_tokens"] > 0
    assert all(result[f"{name}_{kind}_ms"] > 0 for name in ("hga", "dense") for kind in ("forward", "step"))
    assert max(result["difference_from_xla"].values()) < 1e-6  # on a CPU both are XLA
