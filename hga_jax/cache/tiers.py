"""Which tier holds the history."""

from __future__ import annotations


def choose_tier(kv_store: str, device_fits: bool = True) -> str:
    """The tier that a --kv-store value asks for ("auto": the device when the plan fits there, else the host), or a clear refusal."""
    if kv_store == "auto":
        return "device" if device_fits else "host"
    if kv_store in ("device", "host"):
        return kv_store
    raise ValueError(f"--kv-store {kv_store} is not supported in this version: use auto, device or host")
