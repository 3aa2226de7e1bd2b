"""The folders of sessions: names, locks, and the removal of blocks that no session refers to any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hga_jax.cache.disk import BlockStore, StoreError
from hga_jax.cache.tiers import on_disk
from hga_jax.session.manifest import NAME, Manifest

LOCK = "lock"
STAGING = "staging"
RESERVED = ("blocks", LOCK)


def default_store() -> Path:
    """Where sessions given by name live unless told otherwise: the user's data directory."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "hga_jax" / "sessions"


def session_path(session: str, kv_store: str) -> Path:
    """The folder of --session NAME: a path as it is, a plain name below --kv-store DIR or the user's own store."""
    if os.sep in session:
        return Path(session)
    return (Path(kv_store) if on_disk(kv_store) else default_store()) / session


def passing_name() -> str:
    """A name for a session that ends with its run."""
    return f"run-{os.getpid()}-{time.time_ns():x}"


def sessions(store: Path) -> list[Path]:
    """The session folders below a store directory. Raises ValueError when there is no such directory."""
    if not store.is_dir():
        raise ValueError(f"{store} is not a directory")
    return sorted(path for path in store.iterdir() if path.name not in RESERVED and (path / NAME).exists())


def split(path: Path) -> tuple[Path, str]:
    """(store directory, name) of a session path. Raises ValueError for a name that cannot be used."""
    path = path.expanduser().absolute()
    if path.name in RESERVED or not path.name:
        raise ValueError(f"a session cannot be called {path.name!r}: choose another name")
    return path.parent, path.name


class Lock:
    """An advisory lock on a file, held until `release` or the end of the process, however it ends."""

    def __init__(self, path: Path, shared: bool = False):
        """Raises OSError when the file cannot be made, BlockingIOError when another process holds the lock."""
        flags = os.O_RDWR | os.O_CREAT
        try:
            self.descriptor = os.open(path, flags, 0o644)
        except OSError:
            self.descriptor = os.open(path, os.O_RDONLY)  # a read-only directory: the lock itself still works
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self.descriptor)
            raise BlockingIOError(f"held by process {holder}" if holder else "held by another process") from None
        if not shared:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)
                os.pwrite(self.descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.close(self.descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a session for the time of a command. Raises ValueError when a process uses it."""
    try:
        lock = Lock(folder / LOCK)
    except BlockingIOError as error:
        raise ValueError(f"session {folder} is in use ({error}): end that process first") from None
    try:
        yield
    finally:
        lock.release()


def collect_garbage(store: Path) -> int | None:
    """Remove the blocks that no session's manifest names; bytes freed, or None when it must wait.

    It waits while a session is open, which may count on blocks that no manifest names yet, and while a manifest cannot be read.
    """
    try:
        lock = Lock(store / LOCK)
    except OSError:
        return None
    try:
        try:
            used = {pair for folder in sessions(store) for pair in Manifest.read(folder).chain()}
        except StoreError:
            return None
        blocks, freed = BlockStore(store), 0
        for pair in list(blocks.everything()):
            if pair not in used:
                freed += sum(path.stat().st_size for path in blocks.folder(*pair).rglob("*") if path.is_file())
                blocks.remove(*pair)
        return freed
    finally:
        lock.release()


def delete(folder: Path) -> int | None:
    """Remove a session and the blocks that only it used; bytes freed, None when its blocks stay until no session is open."""
    store, _ = split(folder)
    with locked(folder):
        (folder / NAME).unlink(missing_ok=True)  # first: from here on there is no session
        shutil.rmtree(folder)
    return collect_garbage(store)
