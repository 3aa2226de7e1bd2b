"""The public functions; `implementation` picks the kernels or plain XLA. What they compute, and the references, are the two operations'."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import routed_decode_attention as attention
from pallas_kernels import sketch_routing as routing
from pallas_kernels.sketch_decode import kernel


class Scanned(NamedTuple):
    """What a token knows before it selects pages."""

    scores: routing.Scores
    windows: attention.Windows


def scan_beside_windows(
    query: Float[Array, "K G H"],
    prepared: routing.ScanQuery,
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 4"],
    window: Float[Array, "K W 2 g H"],
    valid: Int[Array, " places"],
    *,
    pages: Int[Array, " places"] | None = None,
    fresh: attention.FreshToken | None = None,
    scale: float,
    implementation: Literal["pallas", "xla"],
    scan_config: routing.Config | None = None,
    config: attention.Config | None = None,
    interpret: bool = False,
) -> Scanned:
    """`sketch_routing.scan` and `routed_decode_attention.window_attention` in one launch: neither waits for the other.

    A launch of its own would cost the windows about 5 us (H100), a third of the scan; beside it they are for nothing.
    """
    group_size = window.shape[3]
    routing.check_sketch(prepared.chunk_scores.shape[1], codes.shape[1], group_size)
    rules = {"heads": query.shape[1], "group_size": group_size, "scale": scale}
    how = {"implementation": implementation, "interpret": interpret}
    if implementation != "pallas":
        scores = routing.scan(prepared, codes, scales, middle, config=scan_config, **rules, **how)
        return Scanned(
            scores, attention.window_attention(query, window, valid, pages=pages, fresh=fresh, scale=scale, config=config, **how)
        )
    scores, (acc, stats, *after) = kernel.scan_beside_windows(
        query, prepared, codes, scales, middle, window, valid, pages, fresh,
        group_size=group_size, scale=scale, scan_config=scan_config or routing.Config(), config=config or attention.Config(),
        interpret=interpret,
    )  # fmt: skip
    return Scanned(routing.Scores(*scores), attention.Windows(attention.Partial(acc, stats), *after or (window,)))
