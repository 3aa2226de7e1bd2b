"""Loading a checkpoint beside merely reading its files: seconds, GB/s, peak host and device bytes.

Both read with as many threads. --cold empties the system's cache of the files before each, so that both come from the disk; otherwise the
cache is filled first and both come from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import load_decoder, read_config
from convert.safetensors_files import SafetensorsDirectory
from convert.stream import READERS
from hga_jax.bench.decode import environment
from hga_jax.loading import default_dtype
from hga_jax.model import weight_leaves
from hga_jax.placement import on_host

PIECE = 8 << 20


def weight_files(directory: Path) -> list[Path]:
    return [directory / name for name in SafetensorsDirectory(directory).files]


def empty_cache(files: list[Path]) -> None:
    """Drop the files from the system's cache; pages not yet written to the disk are written first."""
    for path in files:
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(files: list[Path], readers: int) -> float:
    """Seconds to read the files into a few buffers, in order, by threads."""
    jobs = [(path, start) for path in files for start in range(0, path.stat().st_size, PIECE)]
    opened = {path: os.open(path, os.O_RDONLY) for path in files}
    buffers = [np.empty(PIECE, np.uint8) for _ in range(readers)]

    def share(reader: int) -> None:
        for path, start in jobs[reader::readers]:
            os.preadv(opened[path], [buffers[reader]], start)

    begin = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(share, range(readers)))
    seconds = time.perf_counter() - begin
    for descriptor in opened.values():
        os.close(descriptor)
    return seconds


def resident_bytes() -> dict[str, int]:
    """Bytes of main memory this process holds now: in all, its own (anonymous), mapped from files, and shared (some drivers pin there)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"all": "VmRSS", "anonymous": "RssAnon", "files": "RssFile", "shared": "RssShmem"}
    return {name: int(lines[field].split()[0]) * 1024 for name, field in names.items()}


class ResidentPeak:
    """The largest of each of `resident_bytes` while it is open, looked at every few milliseconds."""

    def __init__(self):
        self.peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ResidentPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def _look(self) -> None:
        self.peak = {name: max(size, self.peak[name]) for name, size in resident_bytes().items()}


def measure(directory: Path, *, cold: bool, readers: int) -> tuple[Any, dict[str, Any]]:
    """(the decoder, the figures)."""
    files = weight_files(directory)
    nbytes = sum(path.stat().st_size for path in files)
    if cold:
        empty_cache(files)
    else:
        read_files(files, readers)
    reading = read_files(files, readers)
    if cold:
        empty_cache(files)
    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(np.zeros(1), device))
    before = resident_bytes()
    with ResidentPeak() as watched:
        begin = time.perf_counter()
        decoder, config = load_decoder(directory, dtype=default_dtype(), readers=readers)
        seconds = time.perf_counter() - begin
    peak = watched.peak | {"all": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    leaves = {path: sum(x.nbytes for x in jax.tree.leaves(leaf)) for path, leaf in weight_leaves(decoder).items()}
    hosted = sum(size for path, size in leaves.items() if on_host(path, config, device))
    stats = device.memory_stats() or {}
    return decoder, {
        "bytes": nbytes, "layers": config.layers, "cold": cold, "readers": readers,
        "read_seconds": reading, "read_gb_s": nbytes / reading / 1e9,
        "load_seconds": seconds, "load_gb_s": nbytes / seconds / 1e9, "ratio": seconds / reading,
        "device_bytes": sum(leaves.values()) - hosted, "pinned_bytes": hosted, "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "host_bytes_before": before["all"], "host_peak_bytes": peak["all"], "host_peaks": peak, "host_before": before,
    }  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench load", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of safetensors (python -m convert.synthetic makes one)")
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the system's cache")
    parser.add_argument("--readers", type=int, default=READERS, help=f"threads (default {READERS})")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    read_config(options.model)
    _, result = measure(options.model, cold=options.cold, readers=options.readers)
    print_result(result)
    if options.json:
        command = " ".join(["python -m hga_jax.bench load", *argv])
        Path(options.json).write_text(json.dumps({"command": command, "environment": environment(), **result}, indent=1))


def print_result(result: dict[str, Any]) -> None:
    gib = 2**30
    where = "disk" if result["cold"] else "cache"
    print(
        f"{result['bytes'] / 1e9:.2f} GB, {result['layers']} layers, from the {where}, {result['readers']} threads: "
        f"read {result['read_seconds']:.2f} s ({result['read_gb_s']:.1f} GB/s), "
        f"load {result['load_seconds']:.2f} s ({result['load_gb_s']:.1f} GB/s), {result['ratio']:.2f} x",
        flush=True,
    )
    peak = result["device_peak_bytes"]
    print(
        f"host: {result['host_bytes_before'] / gib:.2f} GiB before, peak {result['host_peak_bytes'] / gib:.2f} GiB "
        f"({', '.join(f'{name} {size / gib:.2f}' for name, size in result['host_peaks'].items() if name != 'all')}), "
        f"of it pinned for good {result['pinned_bytes'] / gib:.2f}; "
        f"device: weights {result['device_bytes'] / gib:.3f} GiB, peak {'unknown' if peak is None else f'{peak / gib:.3f} GiB'}",
        flush=True,
    )
