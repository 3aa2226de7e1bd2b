"""Three kernels: chunk scores, each head's choice (iterated maximum, then a rank count), the union of the heads' choices as a page list."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.paper_routing.config import Config


def _score_kernel(
    query_ref,  # [K, G, H] device
    sums_ref,  # [K, C, H] device
    middle_ref,  # [3] i32 device: first chunk of the routed middle, chunk after its last, own chunk
    scores_ref,  # [K, G, C] f32 device, out
    *,
    config: Config,
):
    k, first = pl.program_id(0), pl.program_id(1) * config.block_chunks
    heads, head_dim, chunks = query_ref.shape[1], query_ref.shape[2], sums_ref.shape[1]

    @pl.when(first < middle_ref[1])
    def _():
        row, dim = jnp.arange(max(16, pl.next_power_of_2(heads))), jnp.arange(pl.next_power_of_2(head_dim))
        real = (dim < head_dim)[None, :]
        chunk = first + jnp.arange(config.block_chunks)
        query = plgpu.load(query_ref.at[k, row[:, None], dim[None, :]], mask=(row < heads)[:, None] & real, other=0)
        sums = plgpu.load(sums_ref.at[k, chunk[:, None], dim[None, :]], mask=(chunk < chunks)[:, None] & real, other=0)
        if query.dtype == jnp.bfloat16 and sums.dtype == jnp.bfloat16:
            scores = plgpu.dot(query, sums, trans_b=True)  # products of bfloat16 are exact in the float32 accumulator
        else:
            scores = plgpu.dot(query.astype(jnp.float32), sums.astype(jnp.float32), trans_b=True, precision=lax.Precision.HIGHEST)
        where = (row < heads)[:, None] & (chunk < chunks)[None, :]
        plgpu.store(scores_ref.at[k, row[:, None], chunk[None, :]], scores, mask=where)


def _choose_kernel(
    query_ref,  # [K, G, H] device
    scores_ref,  # [K, G, C] f32 device
    groups_ref,  # [K, P, H] device
    middle_ref,  # [3] i32 device
    _,  # marks again
    marks_ref,  # [K, P + 1] i32 device, in place: bit n of a page is set where head n opens it; the last entry takes what nobody opens
    *,
    top_chunks: int,
    groups: int,
    forced: bool,
    interpret: bool,
):
    k, head = pl.program_id(0), pl.program_id(1)
    chunks, pages, head_dim = scores_ref.shape[2], groups_ref.shape[1], groups_ref.shape[2]
    pages_per_chunk = pages // chunks
    slots = pl.next_power_of_2(top_chunks)
    chunk, slot = jnp.arange(pl.next_power_of_2(chunks)), jnp.arange(slots)
    middle = (chunk >= middle_ref[0]) & (chunk < middle_ref[1])
    scores = plgpu.load(scores_ref.at[k, head, chunk], mask=middle, other=-jnp.inf)

    def pick(i, carry):
        scores, chosen = carry
        best = jnp.argmax(scores).astype(jnp.int32)  # the lowest index among equals
        found = jnp.max(scores) > -jnp.inf
        return jnp.where(chunk == best, -jnp.inf, scores), jnp.where((slot == i) & found, best, chosen)

    _, chosen = lax.fori_loop(0, top_chunks, pick, (scores, jnp.full((slots,), -1, jnp.int32)))
    if forced:
        before = middle_ref[2] - 1
        missing = (before >= middle_ref[0]) & (jnp.sum((chosen == before).astype(jnp.int32)) == 0)
        chosen = jnp.where(missing & (slot == top_chunks - 1), before, chosen)

    count = slots * pages_per_chunk
    inside = jnp.arange(pages_per_chunk)
    page = jnp.where(chosen[:, None] >= 0, chosen[:, None] * pages_per_chunk + inside[None, :], -1).reshape(count)
    dim = jnp.arange(pl.next_power_of_2(head_dim))
    real = dim < head_dim
    query = plgpu.load(query_ref.at[k, head, dim], mask=real, other=0).astype(jnp.float32)
    sums = plgpu.load(groups_ref.at[k, page[:, None], dim[None, :]], mask=(page >= 0)[:, None] & real[None, :], other=0)
    score = jnp.where(page >= 0, jnp.sum(sums.astype(jnp.float32) * query[None, :], axis=1), -jnp.inf)
    ahead = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (page[None, :] < page[:, None]))
    opened = (page >= 0) & (jnp.sum(ahead.astype(jnp.int32), axis=1) < groups)
    bit = jnp.broadcast_to(jnp.int32(1) << head, (count,))
    # Bits of different heads never meet, so "or" and "add" are the same. JAX lowers add of an integer vector as a float add (0.11.2), and
    # interpret mode has no "or".
    (plgpu.atomic_add if interpret else plgpu.atomic_or)(marks_ref, (k, jnp.where(opened, page, pages)), jnp.where(opened, bit, 0))


def _list_kernel(
    _,  # marks again
    middle_ref,  # [3] i32 device
    marks_ref,  # [K, P + 1] i32 device, in place: zeroed
    ids_ref,  # [K, M] i32 device, out
    heads_ref,  # [K, M] i32 device, out
    counts_ref,  # [K, 2] i32 device, out
    *,
    pages_per_chunk: int,
    config: Config,
):
    k, capacity = pl.program_id(0), ids_ref.shape[1]
    pages = marks_ref.shape[1] - 1
    step = min(config.list_pages, pl.next_power_of_2(pages))
    end = jnp.minimum(middle_ref[1] * pages_per_chunk, pages)

    def one(i, listed):
        page = i * step + jnp.arange(step)
        marks = plgpu.load(marks_ref.at[k, page], mask=page < end, other=0)
        visible = (marks != 0).astype(jnp.int32)
        rank = listed + jnp.cumsum(visible, axis=0) - 1
        put = (visible > 0) & (rank < capacity)
        plgpu.store(ids_ref.at[k, jnp.where(put, rank, capacity)], page, mask=put)
        plgpu.store(heads_ref.at[k, jnp.where(put, rank, capacity)], marks, mask=put)
        plgpu.store(marks_ref.at[k, page], jnp.zeros_like(marks), mask=visible > 0)
        return listed + jnp.sum(visible)

    listed = lax.fori_loop(0, (end + step - 1) // step, one, jnp.int32(0)) if pages > step else one(0, jnp.int32(0))
    counts_ref[k, 0] = jnp.minimum(listed, capacity)
    counts_ref[k, 1] = jnp.maximum(listed - capacity, 0)


def route(
    query: Float[Array, "K G H"],
    chunk_sums: Float[Array, "K C H"],
    group_sums: Float[Array, "K P H"],
    marks: Int[Array, "K P1"],
    middle: Int[Array, " 3"],
    *,
    top_chunks: int,
    groups: int,
    forced: bool,
    capacity: int,
    config: Config,
    interpret: bool,
) -> tuple[Int[Array, "K P1"], Int[Array, "K M"], Int[Array, "K M"], Int[Array, "K 2"]]:
    """(marks, ids, heads, counts); see api.Pages."""
    kv_heads, heads, _ = query.shape
    chunks, pages = chunk_sums.shape[1], group_sums.shape[1]
    check_offsets(chunk_sums=chunk_sums, group_sums=group_sums)
    if not power_of_two(pages // chunks):
        raise NotImplementedError(f"{pages // chunks} groups a chunk must be a power of two in the kernel: use implementation='xla'")
    scores = pl.pallas_call(
        partial(_score_kernel, config=config),
        grid=(kv_heads, -(-chunks // config.block_chunks)),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((kv_heads, heads, chunks), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paper_scores",
    )(query, chunk_sums, middle)
    marks = pl.pallas_call(
        partial(_choose_kernel, top_chunks=top_chunks, groups=groups, forced=forced, interpret=interpret),
        grid=(kv_heads, heads),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(marks.shape, jnp.int32),
        input_output_aliases={4: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.select_warps, num_stages=1),
        interpret=interpret,
        name="paper_choose",
    )(query, scores, group_sums, middle, marks)
    return pl.pallas_call(
        partial(_list_kernel, pages_per_chunk=pages // chunks, config=config),
        grid=(kv_heads,),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=[pl.no_block_spec] * 4,
        out_shape=[
            jax.ShapeDtypeStruct(marks.shape, jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, capacity), jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, capacity), jnp.int32),
            jax.ShapeDtypeStruct((kv_heads, 2), jnp.int32),
        ],
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.list_warps, num_stages=1),
        interpret=interpret,
        name="paper_list",
    )(marks, middle)
