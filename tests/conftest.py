"""Marks that depend on the machine, and how hard XLA optimises what tests compile."""

import jax
import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    # Tiny programs run once: compiling them costs more than they do. A pretrained model's are worth optimising.
    tiny = jax.default_backend() == "cpu" and item.get_closest_marker("model") is None
    jax.config.update("jax_disable_most_optimizations", tiny)
