"""What every evaluation prints and writes: tables, the header that says where a figure comes from, JSON, the progress bar."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

THREADS = 8  # texts and programs that are made at a time
LINE_SECONDS = 10  # between two lines of progress, where stderr is no terminal


def check_writable(option: str, target: str | None) -> None:
    """Raises ValueError now rather than after an hour of measuring."""
    if target is None or target == "-":
        return
    path = Path(target)
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {target}: cannot be written there")


def check_plotting(target: str | None) -> None:
    """Raises ValueError when plots are wanted and cannot be drawn."""
    if target is None:
        return
    check_writable("--plot", target)
    if target == "-":
        raise ValueError("--plot -: a plot needs a file name")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'hga-jax[plot]'") from None


def read_texts(paths: Sequence[str]) -> dict[str, str]:
    """Text by file name. Raises ValueError naming the file that cannot be read."""
    texts = {}
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise ValueError(f"--text {path}: cannot read it ({error.strerror})") from None
        name = Path(path).name
        texts[name if name not in texts else path] = text
    return texts


def provenance() -> dict[str, Any]:
    """Device, versions and command: what a figure needs beside it."""
    import flax
    import jax
    import numpy

    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__, "numpy": numpy.__version__}
    kind = device.device_kind if device.platform != "cpu" else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"device": kind, "versions": versions, "command": "python -m hga_jax.eval " + shlex.join(sys.argv[1:])}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, the first left-aligned and the others right-aligned; None is printed as -."""
    cells = [[str(item) for item in header], *[["-" if item is None else str(item) for item in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip() for r in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(target: str, data: dict[str, Any]) -> None:
    """Write data to the file `target`, or print it for "-"."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    if target == "-":
        print(text)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def keeper(target: str | None) -> Callable[[dict[str, Any]], None]:
    """What writes a report that is still growing to the file `target`, so that a run that is cut off leaves what it has."""
    if target is None or target == "-" or (Path(target).exists() and not Path(target).is_file()):
        return lambda report: None
    origin = provenance()
    return lambda report: write_json(target, report | origin)


def side_by_side[Result](name: str, work: Sequence[Callable[[], Result]]) -> list[Result]:
    """What calls made in a few threads return, in their order. Raises the error of the first one that has failed."""
    results = []
    with Progress(len(work), name, unit="") as bar, ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(lambda call: call(), work):
            results.append(result)
            bar.finish(1)
    return results


class Progress:
    """A bar with the time left, on stderr, counted in tokens of prefill; a line now and then where stderr is no terminal."""

    def __init__(self, total: int | None, name: str, unit: str = "tok"):
        self._name, self._total, self._note, self._begin = name, total, "", time.monotonic()
        self._said = self._begin
        self._bar = tqdm(total=total, desc=name, leave=False, file=sys.stderr, disable=None, mininterval=0.2, unit=unit, unit_scale=True)
        self._done = 0

    def of(self, done: int, total: int) -> None:
        """`done` of `total`, for work that knows its total only once it runs."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """What is being worked on."""
        self._note = text
        self._bar.set_postfix_str(text)

    def inside(self) -> Callable[[int | float], None] | None:
        """What hears how much of the run that begins now is done; None where nobody looks: the host waits for each layer to say so."""
        return None if self._bar.disable else partial(self.within, self._done)

    def within(self, start: int, done: int | float) -> None:
        """A run that began when `start` was done has done `done` more."""
        self._bar.update(round(start + done) - self._bar.n)

    @property
    def done(self) -> int:
        return self._done

    def finish(self, amount: int) -> None:
        """A run worth `amount` is over."""
        self._done += amount
        self._bar.update(self._done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= LINE_SECONDS:
            self._said, passed = now, now - self._begin
            left = passed * (self._total - self._done) / self._done
            said = f"{self._name}: {self._done / self._total:.0%} in {passed:.0f} s, about {left:.0f} s left"
            print(", ".join(filter(None, (said, self._note))), file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
