"""Tunables of the sketch routing kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """block_chunks: chunks of sketches a scanning program works on at a time. scan_programs: such programs a kv head, scan_warps: their
    warps; scan_stages: one more than the blocks whose codes are on their way while one is worked on. unpack: how codes become float16
    levels, "asm" (PTX, any GPU since SM80) or "arithmetic" (also interpret mode). select_pages, select_warps: pages that a selecting
    program looks at in one step, and its warps.
    """

    block_chunks: int = 2
    scan_programs: int = 128
    scan_warps: int = 4
    scan_stages: int = 3
    unpack: Literal["asm", "arithmetic"] = "asm"
    select_pages: int = 256
    select_warps: int = 4

    def __post_init__(self):
        for name in ("block_chunks", "scan_programs", "scan_warps", "select_pages", "select_warps"):
            if not power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a power of two")
        if self.scan_stages < 1:
            raise ValueError(f"scan_stages={self.scan_stages} must be at least 1")
        if self.select_pages > 32768:
            raise ValueError(f"select_pages={self.select_pages} must be at most 32768: two counts share an int32 prefix sum")
        if self.unpack not in ("asm", "arithmetic"):
            raise ValueError(f"unpack={self.unpack!r}: choose asm or arithmetic")
