"""The public functions; `implementation` picks the kernels or plain XLA. What they compute, and the references, are the two operations'."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import routed_decode_attention as attention
from pallas_kernels import sketch_routing as routing
from pallas_kernels.sketch_decode import kernel, xla


class Scanned(NamedTuple):
    """What a token knows before it selects pages. finished: zeros for `attend_selected` to count in; to be used once."""

    scores: routing.Scores
    windows: attention.Windows
    finished: Int[Array, " K"]


class Attended(NamedTuple):
    """out: attention outputs over windows and visible pages. stamps, counts, unopened: see sketch_routing.Pages. bank: with the missed
    pages in it; hits: pages found there."""

    out: Float[Array, "K G H"]
    stamps: Int[Array, "K P"]
    counts: Int[Array, "K parts 2"]
    unopened: Float[Array, "K parts G"]
    bank: attention.Bank | None
    hits: Int[Array, "K parts"] | None


def scan_beside_windows(
    query: Float[Array, "K G H"],
    prepared: routing.ScanQuery,
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 5"],
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

    Alone, the windows took 4.3 us and the scan 16.6 (H100, Qwen3-30B-A3B's heads, 64K tokens), together 12 to 13.
    """
    group_size = window.shape[3]
    routing.check_sketch(prepared.chunk_scores.shape[1], codes.shape[1], group_size)
    rules = {"heads": query.shape[1], "group_size": group_size, "scale": scale}
    how = {"implementation": implementation, "interpret": interpret}
    if implementation == "xla":
        scores = routing.scan(prepared, codes, scales, middle, config=scan_config, **rules, **how)
        windows = attention.window_attention(query, window, valid, pages=pages, fresh=fresh, scale=scale, config=config, **how)
        return Scanned(scores, windows, jnp.zeros(query.shape[0], jnp.int32))
    if implementation != "pallas":
        raise ValueError(f"{implementation=}: choose pallas or xla")
    scores, partials, finished, acc, stats, *after = kernel.scan_beside_windows(
        query, prepared, codes, scales, middle, window, valid, pages, fresh,
        group_size=group_size, scale=scale, scan_config=scan_config or routing.Config(), config=config or attention.Config(),
        interpret=interpret,
    )  # fmt: skip
    windows = attention.Windows(attention.Partial(acc, stats), *after or (window,))
    return Scanned(routing.Scores(scores, partials), windows, finished)


def attend_selected(
    query: Float[Array, "K G H"],
    scanned: Scanned,
    stamps: Int[Array, "K P"],
    middle: Int[Array, " 5"],
    store: Float[Array, "K P 2 g H"],
    *,
    bank: attention.Bank | None = None,
    pages_per_chunk: int,
    threshold: float,
    capacity: int,
    scale: float,
    votes: int = 0,
    vote_share: float = 1.0,
    implementation: Literal["pallas", "xla"],
    scan_config: routing.Config | None = None,
    config: attention.Config | None = None,
    interpret: bool = False,
) -> Attended:
    """Select pages as `sketch_routing.select` does, attend to all that are visible and merge with the windows, in one launch.

    A program selects one part of a kv head's pages (page p is of part p % parts), reads those it selected, and the last of a kv head's
    programs to finish merges. As launches that waited for each other, these took 4.9, 7.2 and 3.1 us, the bank's plan 3.2; together 10.7,
    with a bank 13.7 (H100, as above).

    bank: pages are looked for there first. One that is missing is read from `store`, used, and kept in a slot of its part (the slots are
    dealt out evenly): an empty one, else that of the page with the lowest stamp, if that is from before the last chunk (that of a page
    visible now never is); if there is none, it is only read. So a part keeps the pages that its requests, or votes, were last for, as many
    as it has slots. votes, vote_share: see `sketch_routing.sketch_routing`. stamps and bank: updated in place when donated.
    """
    parts, room = routing.list_shape(stamps.shape[1], capacity)
    selection = {"pages_per_chunk": pages_per_chunk, "threshold": threshold, "votes": votes, "vote_share": vote_share}
    if implementation == "xla":
        rules = selection | {"parts": parts, "room": room}
        return Attended(*xla.attend_selected(query, scanned.scores, scanned.windows.partial, stamps, middle, store, bank, scale, rules))
    if implementation != "pallas":
        raise ValueError(f"{implementation=}: choose pallas or xla")
    out, stamps, counts, unopened, *banked = kernel.attend_selected(
        query, scanned.scores, scanned.windows.partial, stamps, middle, store, scanned.finished, bank,
        parts=parts, rules=kernel.Rules(room, scale, selection), scan_config=scan_config or routing.Config(),
        config=config or attention.Config(), interpret=interpret,
    )  # fmt: skip
    hits, *arrays = banked or (None,)
    return Attended(out, stamps, counts, unopened, attention.Bank(*arrays) if arrays else None, hits)
