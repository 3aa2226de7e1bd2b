"""Which kernels ran and for how long, from JAX's profiler."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import jax

Kernel = dict[str, int | float]  # "launches" and "total_us"


class KernelTrace:
    """Records between start() and stop(); `kernels` then maps each kernel's name to {"launches", "total_us"}.

    Use as a context manager: leaving it stops. start() may come later, from inside the work, to leave its beginning out.
    """

    def __init__(self):
        self._folder: tempfile.TemporaryDirectory | None = None
        self.kernels: dict[str, Kernel] = {}

    def start(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name)

    def __enter__(self) -> KernelTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        found = sorted(Path(self._folder.name).rglob("*.trace.json.gz"))
        for file in found[:1]:
            with gzip.open(file) as opened:
                self._count(json.load(opened)["traceEvents"])
        self._folder.cleanup()

    def _count(self, events: list[dict]) -> None:
        named = {"process_name": {}, "thread_name": {}}
        for event in events:
            if event.get("name") in named:
                named[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
        devices = {pid for (pid, _), name in named["process_name"].items() if "GPU" in name}
        streams = {key for key, name in named["thread_name"].items() if key[0] in devices and "Stream" in name}
        for event in events:
            if event.get("ph") == "X" and (event["pid"], event.get("tid")) in streams:
                kernel = self.kernels.setdefault(event["name"], {"launches": 0, "total_us": 0.0})
                kernel["launches"] += 1
                kernel["total_us"] += event["dur"]
