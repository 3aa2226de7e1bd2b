"""Marks that depend on the machine."""

import jax
import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
