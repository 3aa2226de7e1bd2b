"""The public functions of the sketch policy's decode routing; `implementation` picks the kernels or plain XLA."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.sketch_routing import kernel, xla
from pallas_kernels.sketch_routing.config import Config
from pallas_kernels.votes import is_open

LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)  # Lloyd-Max quantiser of a unit Gaussian; codes 0..3 ascending
THRESHOLDS = (-0.9816, 0.0, 0.9816)
PARTS = 32  # lists a kv head: with 4 kv heads a program for each multiprocessor of an H100, each with few pages to read


class PageList(NamedTuple):
    """Pages of each kv head in `parts` lists of equal room: page p can only be in list p % parts, and lists are made side by side.

    ids: the lists one after the other, each ascending. count: how many of each are valid.
    """

    ids: Int[Array, "K M"]
    count: Int[Array, "K parts"]


def list_shape(pages: int, capacity: int) -> tuple[int, int]:
    """(parts, room of each) for lists of at most `capacity` of so many pages.

    Twice the room that an even share would need: pages are dealt out in turn, so lists fill evenly, and running out of room in one list
    while others have some is rarer than running out altogether.
    """
    parts = min(PARTS, pages)
    return parts, min(-(-pages // parts), -(-2 * capacity // parts))


class Pages(NamedTuple):
    """stamps [K, P]: the last chunk in which a page was requested, or what pallas_kernels.votes says.

    fresh: pages that this token opened, in addition to those that `carried_pages` gave. carried: those open for the next token.
    counts [K, parts, 2]: pages visible to this token, requests refused for lack of room.
    unopened [K, parts, G]: share of each head's attention mass that lies in pages not visible, by the same estimate."""

    stamps: Int[Array, "K P"]
    fresh: PageList
    carried: PageList
    counts: Int[Array, "K parts 2"]
    unopened: Float[Array, "K parts G"]


class ScanQuery(NamedTuple):
    """What the scan wants of a token's queries; Gp: query heads of a kv head rounded up to a power of two, at least 8, zero beyond G.

    rotated: query @ rotation as float16, high halves of every head, then low halves (high + low is float32-exact to 2^-22).
    chunk_scores: query . mean, unscaled; anything beyond the routed middle.
    """

    rotated: Float[Array, "K 2*Gp H"]
    chunk_scores: Float[Array, "K C Gp"]


def middle_of(
    own_chunk: Int[Array, ""], next_chunk: Int[Array, ""], sink_chunks: int, local_chunks: int, voting: Bool[Array, ""] | bool = True
) -> Int[Array, " 5"]:
    """First and end of the routed middle for a token of `own_chunk`, that chunk, the next token's chunk, and, where votes count, 1 if the
    token has one: what the kernels read."""
    end = jnp.maximum(own_chunk - local_chunks, sink_chunks)
    return jnp.stack([jnp.int32(sink_chunks), end, own_chunk, next_chunk, jnp.int32(voting)]).astype(jnp.int32)


def prepare(
    query: Float[Array, "K G H"],
    rotation: Float[Array, "H H"],
    means: Float[Array, "K C H"],
    middle: Int[Array, " 5"],
    *,
    implementation: Literal["pallas", "xla"] = "xla",
    interpret: bool = False,
) -> ScanQuery:
    """What the scan reads of the queries. means: of the unrotated keys of each chunk. middle: from `middle_of`."""
    if implementation == "pallas":
        return ScanQuery(*kernel.prepare(query, rotation, means, middle, interpret=interpret))
    heads = query.shape[1]
    query = jnp.pad(query.astype(jnp.float32), ((0, 0), (0, max(8, 1 << (heads - 1).bit_length()) - heads), (0, 0)))
    exact = {"precision": lax.Precision.HIGHEST}
    rotated = jnp.einsum("kgh,hd->kgd", query, rotation.astype(jnp.float32), **exact)
    high = rotated.astype(jnp.float16)
    low = (rotated - high.astype(jnp.float32)).astype(jnp.float16)
    return ScanQuery(jnp.concatenate([high, low], axis=1), jnp.einsum("kgh,kch->kcg", query, means.astype(jnp.float32), **exact))


def carried_pages(
    stamps: Int[Array, "K P"],
    own_chunk: Int[Array, ""],
    *,
    capacity: int,
    votes: int = 0,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> PageList:
    """The pages that earlier requests leave open for a token of `own_chunk`: known before its queries are."""
    parts, room = list_shape(stamps.shape[1], capacity)
    if implementation == "xla":
        return PageList(*xla.page_list(is_open(stamps, own_chunk, votes), parts, room))
    rules = {"parts": parts, "room": room, "votes": votes}
    return PageList(
        *kernel.carried_pages(stamps, own_chunk[None].astype(jnp.int32), **rules, config=config or Config(), interpret=interpret)
    )


def pack_codes(codes: Int[Array, "*n H"]) -> UInt8[Array, "*n B"]:
    """Codes 0..3 -> bytes: byte b holds dimensions b, B+b, 2B+b, 3B+b (B = H/4), lowest bits first."""
    if codes.shape[-1] % 4:
        raise ValueError(f"head_dim={codes.shape[-1]} must be a multiple of 4 for packed 2-bit codes")
    quarters = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], 4, -1)
    return quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6


def unpack_codes(packed: UInt8[Array, "*n B"]) -> UInt8[Array, "*n H"]:
    """The inverse of `pack_codes`."""
    return jnp.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)


def sketch_chunks(
    keys: Float[Array, "K S H"], rotation: Float[Array, "H H"], chunk_size: int
) -> tuple[Float[Array, "K C H"], UInt8[Array, "K S B"], Float[Array, "K S"]]:
    """Means, packed codes and least-squares scales of whole chunks of post-RoPE keys; float32."""
    kv_heads, tokens, head_dim = keys.shape
    chunks = keys.astype(jnp.float32).reshape(kv_heads, -1, chunk_size, head_dim)
    means = chunks.mean(2)
    residual = jnp.einsum("kcsh,hd->kcsd", chunks - means[:, :, None], rotation.astype(jnp.float32), precision="highest")
    size = jnp.sqrt(jnp.mean(residual**2, axis=-1, keepdims=True))
    unit = residual / jnp.where(size > 0, size, 1)
    codes = sum((unit >= bound).astype(jnp.int32) for bound in THRESHOLDS)
    levels = jnp.asarray(LEVELS, jnp.float32)[codes]
    scales = (residual * levels).sum(-1) / (levels**2).sum(-1)
    return means, pack_codes(codes.reshape(kv_heads, tokens, head_dim)), scales.reshape(kv_heads, tokens)


def append_sketch(
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    keys: Float[Array, "K chunk H"],
    rotation: Float[Array, "H H"],
    chunk: Int[Array, ""],
) -> tuple[Float[Array, "K C H"], UInt8[Array, "K S B"], Float[Array, "K S"]]:
    """Write the sketch of a chunk that has closed into its place. Once in many tokens, so plain XLA; in place when donated."""
    size = keys.shape[1]
    mean, code, scale = sketch_chunks(keys, rotation, size)
    return (
        lax.dynamic_update_slice(means, mean.astype(means.dtype), (0, chunk, 0)),
        lax.dynamic_update_slice(codes, code, (0, chunk * size, 0)),
        lax.dynamic_update_slice(scales, scale.astype(scales.dtype), (0, chunk * size)),
    )


def check_sketch(chunks: int, tokens: int, group_size: int) -> None:
    """Raises ValueError for codes that are not of so many chunks of whole groups."""
    if tokens % chunks or tokens // chunks % group_size:
        raise ValueError(f"{tokens} tokens of codes do not make {chunks} chunks of whole groups of {group_size}")


def sketch_routing(
    query: Float[Array, "K G H"],
    rotation: Float[Array, "H H"],
    means: Float[Array, "K C H"],
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    stamps: Int[Array, "K P"],
    window: Float[Array, "K splits 2 G"],
    own_chunk: Int[Array, ""],
    next_chunk: Int[Array, ""],
    *,
    sink_chunks: int,
    local_chunks: int,
    group_size: int,
    threshold: float,
    capacity: int,
    scale: float,
    votes: int = 0,
    vote_share: float = 1.0,
    voting: Bool[Array, ""] | bool = True,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> Pages:
    """Route one token's queries: request every group of the routed middle with estimated mass >= threshold for any head of its kv head.

    next_chunk: that of the next token, for the list handed on to it. means are of the unrotated keys; codes and scales describe their
    rotated residuals. window[:, :, 0] and [:, :, 1]: largest exact score and sum of exp(score - largest) of each split of the windows, from
    `routed_decode_attention.window_attention`. stamps: updated in place when donated. votes: 0, and requests stay open to the end of the
    next chunk; otherwise to the end of their own, and pages to which so many (query, head) pairs of a chunk give vote_share * threshold of
    their mass (a share of 1 at most) stay open to all of the next; voting: whether this token's count. Source: README, the sketch
    policy.
    """
    check_sketch(means.shape[1], codes.shape[1], group_size)
    middle = middle_of(own_chunk, next_chunk, sink_chunks, local_chunks, voting)
    prepared = prepare(query, rotation, means, middle, implementation=implementation, interpret=interpret)
    heads, chunk_size = query.shape[1], codes.shape[1] // means.shape[1]
    how = {"implementation": implementation, "config": config, "interpret": interpret}
    scores = scan(prepared, codes, scales, middle, heads=heads, group_size=group_size, scale=scale, **how)
    rules = {"pages_per_chunk": chunk_size // group_size, "threshold": threshold, "votes": votes, "vote_share": vote_share}
    return select(scores, window, stamps, middle, capacity=capacity, **rules, **how)


class Scores(NamedTuple):
    """scores: of each group, estimated, scaled; -inf or anything outside the routed middle. partials: like `window` of sketch_routing, from
    each scanning program."""

    scores: Float[Array, "K P Gp"]
    partials: Float[Array, "K programs 2 Gp"]


def scan(
    prepared: ScanQuery,
    codes: UInt8[Array, "K S B"],
    scales: Float[Array, "K S"],
    middle: Int[Array, " 5"],
    *,
    heads: int,
    group_size: int,
    scale: float,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> Scores:
    """Estimated scores of the groups of the routed middle for the first `heads` heads."""
    rules = {"heads": heads, "group_size": group_size, "scale": scale}
    if implementation == "xla":
        return Scores(*xla.scan(*prepared, codes, scales, middle, **rules))
    if implementation != "pallas":
        raise ValueError(f"{implementation=}: choose pallas or xla")
    return Scores(*kernel.scan(*prepared, codes, scales, middle, config=config or Config(), interpret=interpret, **rules))


def select(
    scores: Scores,
    window: Float[Array, "K splits 2 G"],
    stamps: Int[Array, "K P"],
    middle: Int[Array, " 5"],
    *,
    pages_per_chunk: int,
    threshold: float,
    capacity: int,
    votes: int = 0,
    vote_share: float = 1.0,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> Pages:
    """The pages that the scores ask for; arguments as for `sketch_routing`."""
    parts, room = list_shape(stamps.shape[1], capacity)
    rules = {
        "pages_per_chunk": pages_per_chunk,
        "threshold": threshold,
        "parts": parts,
        "room": room,
        "votes": votes,
        "vote_share": vote_share,
    }
    if implementation == "xla":
        return _pages(*xla.select(*scores, window, stamps, middle, **rules))
    return _pages(*kernel.select(*scores, window, stamps, middle, config=config or Config(), interpret=interpret, **rules))


def _pages(stamps: Array, fresh: Array, fresh_count: Array, carried: Array, carried_count: Array, counts: Array, unopened: Array) -> Pages:
    return Pages(stamps, PageList(fresh, fresh_count), PageList(carried, carried_count), counts, unopened)
