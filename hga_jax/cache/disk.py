"""The durable tier: the K/V of stretches of tokens on disk, as blocks that are written once, never changed, and found by their content.

A *block* holds everything attention needs of up to `block_tokens` neighbouring tokens of one sequence, all layers. Its id is a hash of the
tokens before it and of its own, so the same beginning of a prompt is the same chain of blocks, whichever session wrote it:

    DIR/blocks/<id of the block before, or of the model and its settings>/<id>/
        block.json       tokens, shapes, sizes of the other files, a checksum of itself
        pages/           TensorStore zarr3 [L, K, pages, 2, g, H]: one file a layer, its bytes in order, then their CRC-32C
        piece_sums/      zarr3 [L, K, chunks]: the CRC-32 of each *piece*, the pages of one kv head and chunk
        summaries.<i>/   zarr3 [L, K, entries, ...], one file for each array the policy keeps
        requests/        zarr3 [L, R, K, pages held, 2 bits]: what the queries before each of R reuse points had requested lately;
                         two bytes a page where votes count

A layer of a block is read whole by resuming, which checks the file's own checksum, and piece by piece by decoding from disk: byte ranges
of the same file, checked against piece_sums. hga_jax/session/README.md says what was measured.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, UInt32

VERSION = 2  # 1 had sharded files of pieces: read at half the speed from memory, a fraction of it from a disk
HEADER = "block.json"
PAGES, PIECE_SUMS, REQUESTS = "pages", "piece_sums", "requests"
FILES_AT_A_TIME = 32  # TensorStore's default is the number of cores, too few to keep a disk busy


class StoreError(ValueError):
    """Stored data that is missing, damaged or of another kind; the message names the file."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of a stored array, and the shape of the part of it in each of its files."""

    shape: tuple[int, ...]
    dtype: str
    file: tuple[int, ...]

    @staticmethod
    def from_json(raw: dict[str, Any]) -> ArraySpec:
        return ArraySpec(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


@dataclass(frozen=True)
class Header:
    """What block.json says. first: position of the first token. reuse: positions after it at which a prompt may go on differently."""

    id: str
    parent: str
    first: int
    tokens: Int[np.ndarray, " T"]
    reuse: tuple[int, ...]
    arrays: dict[str, ArraySpec]
    files: dict[str, int]

    @property
    def end(self) -> int:
        return self.first + len(self.tokens)

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def block_id(parent: str, tokens: Int[np.ndarray, " T"]) -> str:
    """The id of the block of these tokens after `parent`."""
    return hashlib.sha256(bytes.fromhex(parent) + np.asarray(tokens, "<i4").tobytes()).hexdigest()[:32]


def sealed(data: dict[str, Any]) -> str:
    """JSON text of `data` with a checksum of it inside."""
    return json.dumps(data | {"checksum": _digest(data)}, indent=1) + "\n"


def unsealed(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Read what `sealed` wrote. Raises StoreError naming the file when it is missing, damaged, or of another kind or version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stated = data.pop("checksum")
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{path} is damaged: not the JSON that was written") from None
    if stated != _digest(data):
        raise StoreError(f"{path} is damaged: its checksum does not match")
    found = data.get("format"), data.get("version")
    if found != (kind, version):
        raise StoreError(f"{path} is {found[0]!r} version {found[1]}, and this program reads version {version}: delete it and begin anew")
    return data


def write_durably(path: Path, text: str) -> None:
    """Replace a file so that after a crash either the old or the new content is there, whole."""
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_tokens(tokens: Int[np.ndarray, " T"]) -> str:
    return base64.b64encode(np.asarray(tokens, "<i4").tobytes()).decode()


def unpack_tokens(text: str) -> Int[np.ndarray, " T"]:
    return np.frombuffer(base64.b64decode(text), "<i4").astype(np.int32)


class BlockStore:
    """The blocks below one directory. Reading and writing go through TensorStore, many at a time; nothing is kept in memory."""

    def __init__(self, directory: Path):
        self.directory = directory / "blocks"
        self.damaged: set[str] = set()  # blocks whose content was found damaged: the next equal one takes their place
        # Files are synced when their block is complete (BlockWriter.finish): a write costs a copy, not a wait for the disk.
        self.context = ts.Context({"file_io_concurrency": {"limit": FILES_AT_A_TIME}, "file_io_sync": False})
        self._files = ts.KvStore.open({"driver": "file", "path": f"{self.directory}/"}, context=self.context).result()

    def folder(self, parent: str, block: str) -> Path:
        return self.directory / parent / block

    def children(self, parent: str) -> list[str]:
        """Ids of the blocks that follow `parent`, whole or not."""
        try:
            return sorted(entry.name for entry in os.scandir(self.directory / parent) if entry.is_dir())
        except FileNotFoundError:
            return []

    def header(self, parent: str, block: str) -> Header:
        """Raises StoreError when block.json or a file it lists is missing, of the wrong size, or damaged."""
        folder = self.folder(parent, block)
        data = unsealed(folder / HEADER, "hga_jax block", VERSION)
        tokens = unpack_tokens(data["tokens"])
        if data["parent"] != parent or block_id(parent, tokens) != block:
            raise StoreError(f"{folder / HEADER} does not belong there: its tokens have another id")
        for name, size in data["files"].items():
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise StoreError(f"{folder / name} cannot be read ({error.strerror})") from None
            if found != size:
                raise StoreError(f"{folder / name} is damaged: {found} bytes instead of {size}")
        arrays = {name: ArraySpec.from_json(raw) for name, raw in data["arrays"].items()}
        return Header(block, parent, data["first"], tokens, tuple(data["reuse"]), arrays, data["files"])

    def open(self, header: Header, name: str) -> ts.Future:
        """A stored array, for reading. The future's errors: see `checked`."""
        return _open(self.folder(header.parent, header.id) / name, header.arrays[name], self.context, create=False)

    def read_pieces(
        self, header: Header, layer: int, heads: Int[np.ndarray, " n"], pages: Int[np.ndarray, " n"], piece_pages: int, sums: np.ndarray
    ) -> Callable[[], np.ndarray]:
        """Start reading pieces of `piece_pages` neighbouring pages; call the result for them, [n, piece_pages, 2, g, H].

        heads, pages: kv head and first page of each, sums: its CRC-32. The call raises StoreError when one is damaged.
        """
        spec = header.arrays[PAGES]
        page_bytes = int(np.prod(spec.shape[3:])) * np.dtype(spec.dtype).itemsize
        size = piece_pages * page_bytes
        name = f"{PAGES}/{_file_name(layer, len(spec.shape))}"
        path = self.folder(header.parent, header.id) / name
        begins = (heads.astype(np.int64) * spec.shape[2] + pages) * page_bytes
        key = f"{header.parent}/{header.id}/{name}"
        reads = [self._files.read(key, byte_range=slice(begin, begin + size)) for begin in begins.tolist()]

        def result() -> np.ndarray:
            out = np.empty((len(reads), piece_pages, *spec.shape[3:]), spec.dtype)
            rows = out.view(np.uint8).reshape(len(reads), size) if reads else []
            for row, future, stated in zip(rows, reads, sums.tolist(), strict=True):
                data = read(future, path).value
                if len(data) != size or zlib.crc32(data) != stated:
                    raise StoreError(f"{path} is damaged: a checksum does not match")
                row[:] = np.frombuffer(data, np.uint8)
            return out

        return result

    def publish(self, staged: Path, header: Header) -> None:
        """Give a finished block its place. An equal block that is there already stays; one that cannot be read is replaced."""
        place = self.folder(header.parent, header.id)
        try:
            if header.id in self.damaged:
                raise StoreError(f"{place} is damaged")
            self.header(header.parent, header.id)
        except StoreError:
            self.remove(header.parent, header.id)
            self.damaged.discard(header.id)
        else:
            shutil.rmtree(staged)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staged, place)
        except OSError:
            if not (place / HEADER).exists():
                raise
            shutil.rmtree(staged)  # another process was first
        sync(place.parent)
        sync(self.directory)

    def remove(self, parent: str, block: str) -> None:
        """Take a block away at once: its name first, then its files."""
        place, doomed = self.folder(parent, block), self.directory / f"removed-{os.getpid()}-{block}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(place, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()  # the last child is gone

    def everything(self) -> Iterator[tuple[str, str]]:
        """(parent, id) of every block."""
        if self.directory.is_dir():
            for parent in sorted(entry.name for entry in os.scandir(self.directory) if entry.is_dir()):
                yield from ((parent, block) for block in self.children(parent))


@contextlib.contextmanager
def checked(folder: Path) -> Iterator[None]:
    """TensorStore's errors about stored data as StoreError, in one line that names the file."""
    try:
        yield
    except StoreError:
        raise
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0].split(" [tensorstore_spec")[0][:300] or type(error).__name__
        raise StoreError(f"{folder} is damaged: {reason}") from error


def read(future: Any, folder: Path) -> Any:
    """What TensorStore opened or read, or StoreError."""
    with checked(folder):
        return future.result()


class BlockWriter:
    """One block on its way to disk, in a folder of its own until `finish`. Writes are asynchronous; `pending` are those not yet on disk."""

    def __init__(self, store: BlockStore, staging: Path, parent: str, first: int, tokens: Int[np.ndarray, " T"]):
        self.store, self.parent, self.first, self.tokens = store, parent, first, tokens
        self.id = block_id(parent, tokens)
        self.folder = staging / self.id
        self.arrays: dict[str, ArraySpec] = {}
        self._opened: dict[str, ts.TensorStore] = {}
        self.pending: list[Any] = []
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def create(self, name: str, spec: ArraySpec) -> None:
        self.arrays[name] = spec
        self._opened[name] = _open(self.folder / name, spec, self.store.context, create=True).result()

    def write(self, name: str, data: np.ndarray, index: int | None = None) -> Any:
        """Start writing an array, or its entry `index` of the first axis. `data` must not change before the future returned is done."""
        target = self._opened[name] if index is None else self._opened[name][index]
        future = target.write(data, can_reference_source_data_indefinitely=True)
        self.pending.append(future)
        return future

    def finish(self, reuse: Sequence[int]) -> Header:
        """Wait until everything is on disk, write block.json, and publish the block."""
        for future in self.pending:
            future.result()
        self.pending.clear()
        files = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder) / name
                files[str(path.relative_to(self.folder))] = path.stat().st_size
                sync(path)
            sync(Path(folder))
        header = Header(self.id, self.parent, self.first, self.tokens, tuple(reuse), self.arrays, files)
        data = {
            "format": "hga_jax block", "version": VERSION, "parent": self.parent, "first": self.first, "tokens": pack_tokens(self.tokens),
            "reuse": list(reuse), "arrays": {name: vars(spec) for name, spec in self.arrays.items()}, "files": files,
        }  # fmt: skip
        write_durably(self.folder / HEADER, sealed(data))
        self.store.publish(self.folder, header)
        return header


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def piece_sums(pages: Any, piece_pages: int) -> UInt32[np.ndarray, "K pieces"]:
    """CRC-32 of each kv head's pages (contiguous), `piece_pages` at a time: [K, pages, 2, g, H] -> uint32 [K, pieces]."""
    starts = range(0, pages.shape[1], piece_pages)
    data = pages.view(np.uint8)
    return np.array([[zlib.crc32(head[start : start + piece_pages]) for start in starts] for head in data], np.uint32)


def _file_name(layer: int, axes: int) -> str:
    """The file of one layer of an array that has one file a layer."""
    return ".".join([str(layer), *["0"] * (axes - 1)])


def _open(folder: Path, spec: ArraySpec, context: ts.Context, create: bool) -> ts.Future:
    metadata = {
        "shape": spec.shape, "data_type": spec.dtype, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": spec.file}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }  # fmt: skip
    description = {
        "driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata,
        # A missing file is damage, not zeros.
        "store_data_equal_to_fill_value": True, "fill_missing_data_reads": False,
    }  # fmt: skip
    # block.json says what there is, under its checksum: no need to read zarr.json, which is there for other programs.
    return ts.open(description, create=create, open=not create, assume_metadata=not create, context=context)
