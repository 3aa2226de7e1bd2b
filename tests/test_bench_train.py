"""`bench train`: its numbers are there, in small on a CPU."""

from hga_jax.bench.train import measure
from hga_jax.config import HGAConfig


def test_measure():
    result = measure(1280, (2, 1, 16), HGAConfig(), opened=4, repeats=1, check=False)
    assert result["fetched_tokens"] > 0
    assert all(result[f"{name}_{kind}_ms"] > 0 for name in ("hga", "dense") for kind in ("forward", "step"))
