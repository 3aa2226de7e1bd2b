"""The public function of the paper policy's decode routing; `implementation` picks the kernels or plain XLA. Source: arXiv 2606.30709."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paper_routing import kernel, xla
from pallas_kernels.paper_routing.config import Config


class Pages(NamedTuple):
    """ids [K, M]: pages any head of the kv head opens, ascending, the first counts[:, 0] valid.

    heads: bit n set where head n opens the page.
    counts [K, 2]: pages listed, pages left out for lack of room. marks: scratch, all zero again."""

    marks: Int[Array, "K P1"]
    ids: Int[Array, "K M"]
    heads: Int[Array, "K M"]
    counts: Int[Array, "K 2"]


def empty_marks(kv_heads: int, pages: int) -> Int[Array, "K P1"]:
    """Scratch that the kernels need and leave zeroed: made once, handed on from step to step."""
    return jnp.zeros((kv_heads, pages + 1), jnp.int32)


def paper_routing(
    query: Float[Array, "K G H"],
    chunk_sums: Float[Array, "K C H"],
    group_sums: Float[Array, "K P H"],
    marks: Int[Array, "K P1"],
    own_chunk: Int[Array, ""],
    *,
    sink_chunks: int,
    local_chunks: int,
    top_chunks: int,
    top_groups: int,
    capacity: int,
    implementation: Literal["pallas", "xla"],
    config: Config | None = None,
    interpret: bool = False,
) -> Pages:
    """Each query head's `top_chunks` best chunks of the routed middle, then its `top_groups // 2` best groups among them.

    Ties go to the lowest index, as in lax.top_k. With local_chunks=0 the chunk before the own one is always among the chunks.
    marks: from `empty_marks`, updated in place when donated.
    """
    if query.shape[1] > 31:
        raise ValueError(f"{query.shape[1]} query heads a kv head: the page masks hold 31")
    if group_sums.shape[1] % chunk_sums.shape[1]:
        raise ValueError(f"{group_sums.shape[1]} groups are not a whole number for each of {chunk_sums.shape[1]} chunks")
    middle = jnp.stack([jnp.int32(sink_chunks), jnp.maximum(own_chunk - local_chunks, sink_chunks), own_chunk]).astype(jnp.int32)
    forced = local_chunks == 0
    rules = {"top_chunks": min(top_chunks, chunk_sums.shape[1]), "groups": top_groups // 2, "forced": forced, "capacity": capacity}
    if implementation == "xla":
        return Pages(marks, *xla.route(query, chunk_sums, group_sums, middle, **rules))
    if implementation != "pallas":
        raise ValueError(f"{implementation=}: choose pallas or xla")
    return Pages(*kernel.route(query, chunk_sums, group_sums, marks, middle, config=config or Config(), interpret=interpret, **rules))
