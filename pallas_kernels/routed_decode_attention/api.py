"""The public functions of decode attention; `implementation` picks the kernels or plain XLA.

A decode step is `window_attention` (its stats also feed routing), `page_attention` over the pages that stay open, routing,
`page_attention` over those the token opened, `merge`. `sketch_decode` has launches that do several of these, and those that use a bank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.routed_decode_attention import kernel, xla
from pallas_kernels.routed_decode_attention.config import Config

Implementation = Literal["pallas", "xla"]


class Partial(NamedTuple):
    """Attention over part of the keys.

    acc: unnormalised sums. stats[:, :, 0]: largest score, stats[:, :, 1]: sum of exp(score - largest).
    """

    acc: Float[Array, "K splits G H"]
    stats: Float[Array, "K splits 2 G"]


class Bank(NamedTuple):
    """Pages kept on the device, each kv head's slots its own; see sketch_decode.attend_selected.

    pages: K/V by slot; page_slot: slot of a page or -1; slot_page: page of a slot or -1.
    """

    pages: Float[Array, "K slots 2 g H"]
    page_slot: Int[Array, "K P"]
    slot_page: Int[Array, "K slots"]


def _pallas(implementation: str) -> bool:
    if implementation not in ("pallas", "xla"):
        raise ValueError(f"{implementation=}: choose pallas or xla")
    return implementation == "pallas"


class FreshToken(NamedTuple):
    """A token to put into its page while the windows are read. place: its page's place in the window, its row in the page."""

    key: Float[Array, "K H"]
    value: Float[Array, "K H"]
    place: Int[Array, " 2"]


class Windows(NamedTuple):
    """What window_attention returns: the partial result and the array with the token in it."""

    partial: Partial
    window: Float[Array, "K W 2 g H"]


def window_attention(
    query: Float[Array, "K G H"],
    window: Float[Array, "K W 2 g H"],
    valid: Int[Array, " places"],
    *,
    scale: float,
    pages: Int[Array, " places"] | None = None,
    fresh: FreshToken | None = None,
    implementation: Implementation,
    config: Config | None = None,
    interpret: bool = False,
) -> Windows:
    """Attend to window pages on the device (sinks, local window, open chunk, in any order), the first valid[w] tokens of each.

    pages: which pages of `window` these are (None: its first ones, in order), so that a store of the whole history serves as it is.
    fresh: the newest token, which `valid` already counts: written to its page, in place when `window` is donated.
    """
    if not _pallas(implementation):
        *part, window = xla.window_attention(query, window, valid, pages, fresh, scale=scale)
        return Windows(Partial(*part), window)
    acc, stats, *after = kernel.window_attention(
        query, window, valid, pages, fresh, scale=scale, config=config or Config(), interpret=interpret
    )
    return Windows(Partial(acc, stats), *after or (window,))


def page_attention(
    query: Float[Array, "K G H"],
    ids: Int[Array, "K M"],
    counts: Int[Array, "K _"],
    store: Float[Array, "K P 2 g H"],
    *,
    scale: float,
    parts: int = 1,
    heads: Int[Array, "K M"] | None = None,
    implementation: Implementation,
    config: Config | None = None,
    interpret: bool = False,
) -> Partial:
    """Attend to the listed pages, read in place from `store` (pinned host or device memory), once each.

    ids[k] holds `parts` lists of equal room, of which the first counts[k, part] entries are valid. heads: bit n set where query head n of
    the kv head sees the page (None: all do).
    """
    if not _pallas(implementation):
        return Partial(*xla.page_attention(query, ids, counts, store, heads, parts, scale=scale))
    return Partial(
        *kernel.page_attention(query, ids, counts, store, heads, parts, scale=scale, config=config or Config(), interpret=interpret)
    )


class Merged(NamedTuple):
    """out: attention outputs. targets: the arrays that something was handed over to."""

    out: Float[Array, "K G H"]
    targets: tuple[Int[Array, "K _"], ...]


def merge(
    parts: list[Partial],
    dtype,
    *,
    hand_over: tuple[tuple[Int[Array, "K _"], Int[Array, "K _"]], ...] = (),
    implementation: Implementation,
    config: Config | None = None,
    interpret: bool = False,
) -> Merged:
    """Combine partial results into attention outputs, exactly; a head that saw no key gets zeros.

    hand_over: pairs of small arrays (source, target) of equal shapes to copy in the same launch, the targets in place when donated: what
    the next token needs, written only when nothing of this token reads the old values any more.
    """
    if not _pallas(implementation):
        return Merged(xla.merge(parts, dtype), tuple(source for source, _ in hand_over))
    out, *targets = kernel.merge(parts, dtype, hand_over, config=config or Config(), interpret=interpret)
    return Merged(out, tuple(targets))


def copy_pages(
    target: Float[Array, "K P 2 g H"],
    source: Float[Array, "K n 2 g H"],
    *,
    target_page: Int[Array, ""],
    source_page: Int[Array, ""],
    count: Int[Array, ""],
    most: int,
    implementation: Implementation,
    interpret: bool = False,
) -> Float[Array, "K P 2 g H"]:
    """Copy `count` <= most neighbouring pages between any two memories, the target in place when it is donated.

    The caller sees to it that they lie inside both. Where the target is host memory, wrap the result in
    `jax.device_put(out, jax.memory.Space.Host)`: a kernel's output is typed as device memory although it stays where the donated array is.
    """
    where = jnp.stack([source_page, target_page, count]).astype(jnp.int32)
    if not _pallas(implementation):
        return xla.copy_pages(target, source, where, most)
    return kernel.copy_pages(target, source, where, most, interpret=interpret)
