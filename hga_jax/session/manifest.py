"""manifest.json of a session: what it holds and of which model. Replaced whole, by an atomic rename, as the last act of a turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from hga_jax.cache.disk import StoreError, pack_tokens, sealed, unpack_tokens, unsealed, write_durably

FORMAT, VERSION = "hga_jax session", 2
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """identity: see identity.py. root: the id the first block follows. blocks: (id, tokens) of each block, in order.

    tokens: those whose K/V the blocks hold. pending: drawn, but not fed yet. turns: completed ones. updated: ISO time.
    """

    model: str
    identity: dict[str, Any]
    root: str
    blocks: tuple[tuple[str, int], ...]
    tokens: Int[np.ndarray, " T"]
    pending: tuple[int, ...]
    messages: tuple[dict[str, str], ...]
    turns: int
    created: str
    updated: str

    def chain(self) -> list[tuple[str, str]]:
        """(parent, id) of each block."""
        parents = [self.root, *(block for block, _ in self.blocks)]
        return [(parent, block) for parent, (block, _) in zip(parents, self.blocks, strict=False)]

    def write(self, folder: Path) -> None:
        """Commit. Whatever happens meanwhile, the old or the new manifest is readable afterwards."""
        data = vars(self) | {
            "format": FORMAT, "version": VERSION, "tokens": pack_tokens(self.tokens), "pending": list(self.pending),
            "blocks": [list(block) for block in self.blocks], "messages": list(self.messages),
        }  # fmt: skip
        write_durably(folder / NAME, sealed(data))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises StoreError naming the file when it is missing or damaged."""
        data = unsealed(folder / NAME, FORMAT, VERSION)
        data = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            manifest = Manifest(
                **data | {
                    "tokens": unpack_tokens(data["tokens"]), "pending": tuple(data["pending"]),
                    "blocks": tuple((block, count) for block, count in data["blocks"]), "messages": tuple(data["messages"]),
                }
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{folder / NAME} is damaged ({type(error).__name__}: {error})") from error
        return manifest
