"""Tunables of the decode attention kernels."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Config:
    """tile_pages, warps: pages a program reads at once (all their loads in flight together) and its warps. splits: programs a kv head.
    window_tile_pages, window_splits, window_warps: the same for the windows; beside_tile_pages, beside_splits: of the windows' programs in
    a launch that does something else meanwhile (few and narrow: they must not take registers and room from the others).
    selected_tile_pages, selected_warps: of the programs that select pages and read them. merge_in_launch: the last of them to finish merges
    (else a launch after theirs). merge_warps: warps of a program of the merging launch, one a query head."""

    tile_pages: int = 1
    splits: int = 64
    warps: int = 4
    window_tile_pages: int = 2
    window_splits: int = 32
    window_warps: int = 4
    beside_tile_pages: int = 1
    beside_splits: int = 16
    selected_tile_pages: int = 8
    selected_warps: int = 8
    merge_in_launch: bool = True
    merge_warps: int = 4

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (isinstance(value, bool) or power_of_two(value)):
                raise ValueError(f"{name}={value} must be a power of two")
