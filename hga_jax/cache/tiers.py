"""Which tier holds the history."""

from __future__ import annotations

import jax


def choose_tier(kv_store: str) -> str:
    """The tier that a --kv-store value asks for, or a clear refusal."""
    if kv_store in ("auto", "device"):
        return "device"
    if kv_store == "host" and jax.default_backend() == "cpu":
        return "host"  # on a CPU the device's memory is the host's
    raise ValueError(f"--kv-store {kv_store} is not supported in this version on {jax.default_backend()}: use auto or device")
