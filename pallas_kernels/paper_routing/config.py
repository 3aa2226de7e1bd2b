"""Tunables of the paper routing kernels."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """block_chunks: chunk summaries one program scores. select_warps: warps that pick one query head's chunks and groups.
    list_pages, list_warps: pages that the listing program of a kv head looks at in one step, and its warps."""

    block_chunks: int = 64
    select_warps: int = 4
    list_pages: int = 4096
    list_warps: int = 8

    def __post_init__(self):
        for name in ("block_chunks", "select_warps", "list_pages", "list_warps"):
            if not power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a power of two")
        if self.block_chunks < 16:
            raise ValueError(f"block_chunks={self.block_chunks} must be at least 16, the side of a matrix product")
