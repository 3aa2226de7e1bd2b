"""Tunables of the sketch routing kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """block_chunks: chunks of sketches a scanning program works on at a time. scan_programs: such programs a kv head, scan_warps: their
    warps. scan_ahead: whether a program reads its next block while it works on one.
    unpack: how codes become float16 levels, "asm" (PTX, any GPU since SM80) or "arithmetic" (also interpret mode).
    select_pages, select_warps: pages that the selecting program of a kv head looks at in one step, and its warps.

    Measured on an H100, 64K history, 4 kv heads of 8 heads, 128 wide: scan 13.3 us at (4, 4), 13.2 at (2, 1), 13.7 at (4, 2), 15 at (2, 2);
    fewer chunks a block make more partial sums, and selection with 8 warps went from 7 to 31 us over 512 of them.
    """

    block_chunks: int = 4
    scan_programs: int = 128
    scan_warps: int = 4
    scan_ahead: bool = False
    unpack: Literal["asm", "arithmetic"] = "asm"
    select_pages: int = 4096
    select_warps: int = 16

    def __post_init__(self):
        for name in ("block_chunks", "scan_programs", "scan_warps", "select_pages", "select_warps"):
            if not power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a power of two")
        if self.select_pages > 32768:
            raise ValueError(f"select_pages={self.select_pages} must be at most 32768: two counts share an int32 prefix sum")
        if self.unpack not in ("asm", "arithmetic"):
            raise ValueError(f"unpack={self.unpack!r}: choose asm or arithmetic")
