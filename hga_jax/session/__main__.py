"""`python -m hga_jax.session`: look after stored sessions.

python -m hga_jax.session list DIR            the sessions of a store directory
python -m hga_jax.session show DIR/NAME       one of them: model, settings, turns, blocks
python -m hga_jax.session verify DIR[/NAME]   read every byte and check it; exit code 1 when something is damaged
python -m hga_jax.session delete DIR/NAME     remove it, and the blocks that no other session uses
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hga_jax.cache.disk import BlockStore, StoreError, read
from hga_jax.session.folder import default_store, delete, sessions, split
from hga_jax.session.manifest import NAME, Manifest

MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.session", description="Look after stored sessions.")
    parser.add_argument("action", choices=("list", "show", "verify", "delete"))
    parser.add_argument("path", metavar="DIR", nargs="?", help=f"a store directory, or DIR/NAME (default {default_store()})", type=Path)
    options = parser.parse_args(arguments)
    path = (options.path or default_store()).expanduser()
    try:
        return {"list": show_all, "show": show, "verify": verify, "delete": remove}[options.action](path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def show_all(store: Path) -> int:
    if (store / NAME).exists():
        return show(store)
    for folder in sessions(store):
        try:
            manifest = Manifest.read(folder)
        except StoreError as error:
            print(f"{folder.name}: {error}")
            continue
        size = stored_bytes(folder) / MIB
        held = f"{len(manifest.tokens):,} tokens, {manifest.turns} turns, {size:,.1f} MiB"
        print(f"{folder.name}  {manifest.model}, {held}, last used {manifest.updated}")
    return 0


def show(folder: Path) -> int:
    manifest = Manifest.read(_session(folder))
    print(f"session {folder.name}\nmodel {manifest.model}, weights {manifest.identity['weights']}, {manifest.identity['dtype']}")
    print(f"attention {json.dumps(manifest.identity['attention'])}\nrope {json.dumps(manifest.identity['rope'])}")
    print(f"begun {manifest.created}, last turn {manifest.updated}, {manifest.turns} turns")
    print(f"{len(manifest.tokens):,} tokens in {len(manifest.blocks)} blocks, {stored_bytes(folder) / MIB:,.1f} MiB")
    for message in manifest.messages:
        text = " ".join(message["content"].split())
        print(f"  {message['role']}: {text[:100]}{'...' if len(text) > 100 else ''}")
    return 0


def verify(path: Path) -> int:
    folders = [path] if (path / NAME).exists() else sessions(path)
    damaged = 0
    for folder in folders:
        problems, size = check(folder)
        damaged += bool(problems)
        print(
            f"{folder.name}: "
            + ("every byte is as it was written" if not problems else f"{len(problems)} problems")
            + f", {size / MIB:,.1f} MiB read"
        )
        for problem in problems:
            print(f"  {problem}")
    return 1 if damaged else 0


def check(folder: Path) -> tuple[list[str], int]:
    """Read all that a session refers to: what is wrong with it, and the bytes read."""
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        return [str(error)], 0
    store, problems, size, position = BlockStore(split(folder)[0]), [], 0, 0
    for (parent, block), (_, count) in zip(manifest.chain(), manifest.blocks, strict=True):
        try:
            header = store.header(parent, block)
            for name in header.arrays:
                place = store.folder(parent, block) / name
                array = read(store.open(header, name), place)
                for index in range(array.shape[0]):  # a layer at a time: a block of all layers may be large
                    read(array[index].read(), place)
            size += header.bytes
        except StoreError as error:
            problems.append(f"tokens {position} to {position + count - 1}: {error}")
        position += count
    return problems, size


def remove(folder: Path) -> int:
    freed = delete(_session(folder))
    print(f"{folder.name} deleted; " + ("its blocks go when no session is open" if freed is None else f"{freed / MIB:,.1f} MiB freed"))
    return 0


def stored_bytes(folder: Path) -> int:
    """Bytes on disk of a session's blocks, those it shares with others included."""
    store = BlockStore(split(folder)[0])
    files = (path for pair in Manifest.read(folder).chain() for path in store.folder(*pair).rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def _session(folder: Path) -> Path:
    if not (folder / NAME).exists():
        raise ValueError(f"{folder} holds no session")
    return folder


if __name__ == "__main__":
    sys.exit(main())
