"""What the prefill routing kernels are told: the rule (data of the policy) and tunables."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.limits import power_of_two


@dataclass(frozen=True)
class Rule:
    """Which queries probe the history, and how a page is scored.

    chunk_size, group_size: tokens in a chunk (one query block) and in a page. sink_chunks, local_chunks: the windows around the routed
    middle. stride: positions p with p % stride == 0 are probes; the other queries ask for nothing themselves.
    scale: of the scores. spread: how many standard deviations above its mean a page counts, where a page is summarised by both.
    votes: rows of a chunk for which a page must reach vote_share of the threshold to stay open to the next chunk; 0: any request does it.
    vote_stride: positions p with p % vote_stride == 0 vote.
    """

    chunk_size: int
    group_size: int
    sink_chunks: int
    local_chunks: int
    scale: float
    stride: int = 1
    spread: float = 0.0
    votes: int = 0
    vote_share: float = 1.0
    vote_stride: int = 1

    def __post_init__(self):
        if self.chunk_size % self.group_size or self.chunk_size % self.stride or self.chunk_size % self.vote_stride:
            raise ValueError(
                f"chunk_size={self.chunk_size} must be a multiple of group_size={self.group_size}, stride={self.stride} and "
                f"vote_stride={self.vote_stride}"
            )

    @property
    def pages_per_chunk(self) -> int:
        return self.chunk_size // self.group_size

    @property
    def probes(self) -> int:
        """Probing positions in a chunk."""
        return self.chunk_size // self.stride

    def blocks(self, queries: int) -> int:
        """Chunks that so many neighbouring queries touch at most."""
        return -(-(queries - 1) // self.chunk_size) + 1


@dataclass(frozen=True)
class Screen:
    """The cheap pass before sketches are read.

    stride: every how manyth query screens. request_stride: every how manyth asks for candidates. spread: standard deviations above its
    mean that a page counts for: the largest of 16 Gaussian scores lies 1.77 above their mean. margin: a page is a candidate when its
    estimate reaches margin * threshold of the mass of the row's windows, which is known before the pass begins. threshold: factor on the
    threshold of the queries that ask. capacity: most candidates of a chunk, in order of (row, page id).

    Pages weighed by mean and three spreads overrate the mass, which `threshold` makes good: Qwen2.5-Coder-0.5B, 32,768 tokens, three texts:
    full scan +0.0073 nats (4,132 tokens fetched), as set here +0.0089 (4,027), with threshold 1 +0.0330 (1,941). Spread 1 loses 0.060 on
    source code (SmolLM2-135M, 4,096 tokens; full scan 0.0029): single tokens that match a query far better than their page's mean does are
    what must not be missed. A diagonal variance in place of one number a page gained nothing.
    """

    stride: int = 4
    request_stride: int = 1
    spread: float = 3.0
    margin: float = 1 / 16
    threshold: float = 0.25
    capacity: int = 2048

    def __post_init__(self):
        if min(self.stride, self.request_stride, self.capacity) < 1 or not self.spread >= 0:
            raise ValueError(
                f"stride={self.stride}, request_stride={self.request_stride} and capacity={self.capacity} must be positive, "
                f"spread={self.spread} not negative"
            )
        if not 0 < self.margin <= 1 or not self.threshold > 0:
            raise ValueError(f"margin={self.margin} must lie in (0, 1] and threshold={self.threshold} be positive")


@dataclass(frozen=True)
class Tile:
    """pages: scored in one step. warps, stages: of the launch."""

    pages: int = 64
    warps: int = 8
    stages: int = 3

    def __post_init__(self):
        if self.pages < 16 or not power_of_two(self.pages):
            raise ValueError(f"pages={self.pages} must be a power of two of at least 16: the smallest matmul of the tensor cores")
        if not power_of_two(self.warps) or self.stages < 1:
            raise ValueError(f"warps={self.warps} must be a power of two and stages={self.stages} positive")


@dataclass(frozen=True)
class Config:
    """rows: (query, head) rows of one program, at most. means, tokens: how pages are scored by their mean, and by their tokens.
    candidates: pages that one program of a scan may score twice; where more might be asked for, it scores all of them twice. list_pages,
    list_warps: pages that the list kernel looks at in one step, and its warps.
    """

    rows: int = 128
    means: Tile = Tile(64, 4, 2)
    tokens: Tile = Tile(64, 8, 3)
    candidates: int = 512
    list_pages: int = 4096
    list_warps: int = 8

    def __post_init__(self):
        for name in ("rows", "list_pages", "list_warps"):
            if not power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a power of two")
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} must be positive")
        if self.rows < 16:
            raise ValueError(f"rows={self.rows} must be at least 16: the smallest matmul of the tensor cores")

    def tile(self, parts: int) -> Tile:
        """For pages scored by so many vectors."""
        return self.means if parts == 1 else self.tokens
