"""From "first row that asks" to page lists: one program per (block, kv head), and no block waits for another."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.limits import check_offsets
from pallas_kernels.sketch_prefill_routing.config import Config, Rule
from pallas_kernels.votes import is_open, never


def _lists_kernel(
    bounds_ref,  # [2] i32: position of query row 0, live rows
    first_ref,  # [K, B, tiles, P]
    stamps_ref,  # [K, P] i32
    *refs,  # votes [K, B, their tiles, P] where they count, then out: ids, since [K, B, M] i32, counts [K, B, 2] i32: listed, refused
    rule: Rule,
    config: Config,
):
    *votes_refs, ids_ref, since_ref, counts_ref = refs
    block, k = pl.program_id(0), pl.program_id(1)
    tiles, pages, capacity, none = first_ref.shape[2], first_ref.shape[3], ids_ref.shape[2], rule.chunk_size
    own = bounds_ref[0] // rule.chunk_size + block
    first_page = rule.sink_chunks * rule.pages_per_chunk
    end = jnp.minimum(jnp.maximum(own - rule.local_chunks, rule.sink_chunks) * rule.pages_per_chunk, pages)
    live = (own * rule.chunk_size < bounds_ref[0] + bounds_ref[1]) & (bounds_ref[1] > 0)
    step = min(config.list_pages, pl.next_power_of_2(pages))

    def asked(b: Any, page: Any, until: Any) -> Array:
        """The first row of block b that asks for each page."""
        mask = (page >= first_page) & (page < until)
        best = jnp.full((step,), none, jnp.int32)
        for tile in range(tiles):
            best = jnp.minimum(best, plgpu.load(first_ref.at[outer(k, b, tile, page)], mask=mask, other=none).astype(jnp.int32))
        return jnp.where(mask, best, none)

    def cast(b: Any, page: Any, until: Any) -> Array:
        """The votes of block b for each page."""
        mask = (page >= first_page) & (page < until)
        [ref] = votes_refs
        votes = [plgpu.load(ref.at[outer(k, b, tile, page)], mask=mask, other=0).astype(jnp.int32) for tile in range(ref.shape[2])]
        return jnp.where(mask, sum(votes), 0)

    def look(i: Any) -> tuple[Array, Array, Array]:
        """Pages, whether the chunk before keeps them open, the first row that sees them (none: nobody)."""
        page = span(i * step, step)
        last, until = jnp.maximum(block - 1, 0), jnp.where(block > 0, end - rule.pages_per_chunk, 0)
        unknown = never(rule.votes)
        stamps = jnp.where(page < end, plgpu.load(stamps_ref.at[outer(k, page)], mask=page < end, other=unknown), unknown)
        if votes_refs:
            carried = is_open(stamps, own, rule.votes, cast(last, page, until))
        else:
            carried = is_open(stamps, own, 0) | (asked(last, page, until) < none)
        return page, carried, jnp.where(carried, 0, asked(block, page, end))

    def count_up_to(row: Any, i: Any, seen: Any) -> Array:
        _, carried, since = look(i)
        return seen + jnp.sum((~carried & (since < row)).astype(jnp.int32))

    steps = (end + step - 1) // step

    def write(room: Any, served: Any) -> tuple[Any, Any]:
        """List carried pages, then those asked for before row `served`, then as many of row `served` as there is room for."""

        def one(i: Any, carry: tuple) -> tuple:
            listed, partly = carry
            page, carried, since = look(i)
            here = (~carried & (since == served)).astype(jnp.int32)
            rank_here = partly + jnp.cumsum(here, axis=0)
            taken = carried | (since < served) | ((here > 0) & (rank_here <= room))
            slot = listed + jnp.cumsum(taken.astype(jnp.int32), axis=0) - 1
            put = taken & (slot < capacity)
            slot = jnp.where(put, slot, capacity)
            plgpu.store(ids_ref.at[outer(k, block, slot)], page, mask=put)
            plgpu.store(since_ref.at[outer(k, block, slot)], since, mask=put)
            return listed + jnp.sum(taken.astype(jnp.int32)), partly + jnp.sum(here)

        return lax.fori_loop(0, steps, one, (jnp.int32(0), jnp.int32(0)))

    @pl.when(live)
    def _():
        listed, _ = write(0, none)
        counts_ref[k, block, 0] = jnp.minimum(listed, capacity)
        counts_ref[k, block, 1] = jnp.maximum(listed - capacity, 0)

        @pl.when(listed > capacity)
        def _():
            fresh = lax.fori_loop(0, steps, partial(count_up_to, none), jnp.int32(0))
            room = jnp.maximum(capacity - (listed - fresh), 0)
            served = jnp.int32(0)  # the rows before it find room for all they ask
            for bit in reversed(range(none.bit_length())):
                longer = served + (1 << bit)
                fits = lax.fori_loop(0, steps, partial(count_up_to, longer), jnp.int32(0)) <= room
                served = jnp.where((longer <= none) & fits, longer, served)
            whole = lax.fori_loop(0, steps, partial(count_up_to, served), jnp.int32(0))
            write(room - whole, served)

    @pl.when(jnp.logical_not(live))
    def _():
        counts_ref[k, block, 0] = 0
        counts_ref[k, block, 1] = 0


def page_lists(
    first: Int[Array, "K B tiles P"],
    stamps: Int[Array, "K P"],
    bounds: Int[Array, " 2"],
    *,
    capacity: int,
    rule: Rule,
    config: Config,
    interpret: bool,
    votes: Int[Array, "K B voting P"] | None = None,
) -> tuple[Int[Array, "K B M"], Int[Array, "K B M"], Int[Array, "K B 2"]]:
    """(ids ascending, since, [listed, refused]) of each block; slots from `listed` on are not written."""
    kv_heads, blocks, _, _ = first.shape
    check_offsets(first=first)
    operands = [bounds, first, stamps] + ([] if votes is None else [votes])
    lists = jax.ShapeDtypeStruct((kv_heads, blocks, capacity), jnp.int32)
    return pl.pallas_call(
        partial(_lists_kernel, rule=rule, config=config),
        grid=(blocks, kv_heads),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * 3,
        out_shape=[lists, lists, jax.ShapeDtypeStruct((kv_heads, blocks, 2), jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=config.list_warps, num_stages=1),
        interpret=interpret,
        name="prefill_page_lists",
    )(*operands)
