"""Which tier holds the history."""

from __future__ import annotations

import os
from pathlib import Path

WORDS = ("auto", "device", "host")


def on_disk(kv_store: str) -> bool:
    """Whether a --kv-store value names a directory: one that exists, or a path with a separator in it."""
    return kv_store not in WORDS and (os.sep in kv_store or Path(kv_store).is_dir())


def choose_tier(kv_store: str, device_fits: bool = True) -> str:
    """The tier that a --kv-store value asks for ("auto": the device when the plan fits there, else the host), or a clear refusal."""
    if on_disk(kv_store):
        return "disk"
    if kv_store == "auto":
        return "device" if device_fits else "host"
    if kv_store in WORDS:
        return kv_store
    raise ValueError(f"--kv-store {kv_store}: choose auto, device, host or a directory (./{kv_store} for a new one)")
