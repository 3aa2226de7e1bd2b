"""Flash attention of chunks of queries over their windows and opened pages (Pallas, Triton lowering), in one launch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import span
from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.routed_prefill_attention.config import Config, default
from pallas_kernels.routed_prefill_attention.lists import NOBODY, SINCE_BITS, list_words
from pallas_kernels.routed_prefill_attention.tiles import LOG2_E, dot, exponential, load_tokens, pages_and_since, rows_of

LOWEST = -1e30  # below any score


def unsupported(query: Any, pages: Any, page_ids: Any, chunk_size: int) -> str | None:
    """Why the kernel cannot take these (arrays or shapes), or None."""
    heads, head_dim = query.shape[1:]
    kv_heads, held, _, group_size, _ = pages.shape
    if query.dtype != pages.dtype or query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"query is {query.dtype}, pages are {pages.dtype}: both float32, bfloat16 or float16"
    if not power_of_two(group_size):
        return f"{group_size=} is no power of two"
    if not power_of_two(chunk_size) or not 16 <= chunk_size < NOBODY:
        return f"{chunk_size=} is no power of two from 16 to 128"
    if head_dim > 256:
        return f"{head_dim=} exceeds 256"
    if held >= 2 ** (31 - SINCE_BITS):
        return f"{held} pages exceed {2 ** (31 - SINCE_BITS)}"
    if page_ids.shape[2] not in (1, heads // kv_heads):
        return f"{page_ids.shape[2]} lists a kv head: one, or one for each of its {heads // kv_heads} query heads"
    return None


def _attention_kernel(
    span_ref,  # i32[2] device: position of query row 0, live rows
    words_ref,  # i32[K, B, R, slots] device: page * 256 + first row that sees it
    used_ref,  # i32[K, B, R] device
    query_ref,  # [T, N, H] device
    pages_ref,  # [K, P, 2, g, H] device
    out_ref,  # [T, N, H] device
    lse_ref,  # f32[T, N] device
    *,
    chunk_size: int,
    scale: float,
    config: Config,
    interpret: bool,
):
    tile, block, k = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, heads, head_dim = query_ref.shape
    kv_heads, _, _, group_size, _ = pages_ref.shape
    lists = words_ref.shape[2]
    first_position, count = span_ref[0], span_ref[1]
    start = (first_position // chunk_size + block) * chunk_size  # of the own chunk
    flat = tile * config.rows + span(0, config.rows)
    rows = rows_of(flat, query_ref, k, heads // kv_heads, start, first_position, count, chunk_size)
    dim = span(0, pl.next_power_of_2(head_dim))
    inside = dim < head_dim
    where = (rows.index[:, None], rows.head[:, None], dim[None, :])

    @pl.when((start < first_position + count) & (start + chunk_size > first_position))
    def _():
        query = plt.load(query_ref.at[where], mask=rows.live[:, None] & inside[None, :], other=0)
        factor = scale * LOG2_E  # exp2 is the hardware's exponential

        def add(carry, keys, values, visible):
            peak, total, acc = carry
            scores = jnp.where(visible, dot(query, keys, trans_b=True), -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(1) * factor)
            weights = exponential(scores, factor, new_peak[:, None], interpret)
            shrink = exponential(peak, 1.0, new_peak, interpret)
            return new_peak, total * shrink + weights.sum(1), acc * shrink[:, None] + dot(weights.astype(values.dtype), values)

        # A finite start, so that rows that have seen nothing yet need no special case: their weights are exp2(-inf).
        carry = (
            jnp.full((config.rows,), LOWEST, jnp.float32),
            jnp.zeros((config.rows,), jnp.float32),
            jnp.zeros((config.rows, dim.shape[0]), jnp.float32),
        )
        step_pages = config.keys // group_size
        key = span(0, config.keys)
        which, slot = key // group_size, key % group_size
        list_index = 0 if lists == 1 else tile * config.rows // chunk_size
        # At least one step: a loop that might not run at all makes ptxas serialise the matrix products (its remark C7515).
        steps = jnp.maximum((used_ref[k, block, list_index] + step_pages - 1) // step_pages, 1)
        slots = words_ref.shape[3]

        def words_of(i):
            return tuple(words_ref[k, block, list_index, jnp.minimum(i * step_pages + j, slots - 1)] for j in range(step_pages))

        def step(i, carry):
            words, *carry = carry
            page, since = pages_and_since(words, which)
            keys, values = (load_tokens(pages_ref, k, page, slot, part, dim) for part in (0, 1))
            following = words_of(i + 1)  # a step ahead: the addresses of the next loads hang on them
            return following, *add(carry, keys, values, since[None, :] <= rows.row[:, None])

        _, *carry = lax.fori_loop(0, steps, step, (words_of(0), *carry))

        # The own chunk comes last: before the loop, its keys and values would stay in shared memory all through it.
        own = span(0, min(config.keys, chunk_size))
        for begin in range(0, chunk_size, own.shape[0]):
            token = start + begin + own
            held = token < first_position + count  # what lies beyond may be anything
            keys, values = (load_tokens(pages_ref, k, token // group_size, token % group_size, part, dim, held) for part in (0, 1))
            carry = add(carry, keys, values, begin + own[None, :] <= rows.row[:, None])
        peak, total, acc = carry
        out = jnp.where(rows.live[:, None], acc * (1 / total)[:, None], 0)
        plt.store(out_ref.at[where], out.astype(out_ref.dtype), mask=rows.here[:, None] & inside[None, :])
        lse = jnp.where(rows.live, peak / LOG2_E + jnp.log(total), 0)
        plt.store(lse_ref.at[rows.index, rows.head], lse, mask=rows.here)

    @pl.when((start >= first_position + count) | (start + chunk_size <= first_position))
    def _():
        zero = jnp.zeros((config.rows, dim.shape[0]), out_ref.dtype)
        plt.store(out_ref.at[where], zero, mask=rows.here[:, None] & inside[None, :])
        plt.store(lse_ref.at[rows.index, rows.head], jnp.zeros((config.rows,), jnp.float32), mask=rows.here)


def fit(config: Config, pages: Any, lists: int, ratio: int, chunk_size: int) -> Config:
    """The config with tiles that these sizes allow: whole pages, and rows of one list."""
    rows = min(config.rows, chunk_size if lists > 1 else pl.next_power_of_2(ratio * chunk_size))
    return replace(config, rows=rows, keys=max(config.keys, pages.shape[3]))


def routed_prefill_attention(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    first_position: Int[Array, ""],
    count: Int[Array, ""],
    page_ids: Int[Array, "K B R M"],
    since: Int[Array, "K B R M"],
    counts: Int[Array, "K B R"],
    *,
    chunk_size: int,
    sink_chunks: int,
    local_chunks: int,
    scale: float,
    config: Config | None,
    interpret: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """See api.py. Raises NotImplementedError for what the kernel cannot take."""
    if reason := unsupported(query, pages, page_ids, chunk_size):
        raise NotImplementedError(f"routed_prefill_attention: {reason}; use implementation='xla'")
    check_offsets(query=query, pages=pages)
    length, heads, head_dim = query.shape
    kv_heads, _, _, group_size, _ = pages.shape
    ratio, (_, blocks, lists, _) = heads // kv_heads, page_ids.shape
    config = fit(config or default(query.dtype, head_dim), pages, lists, ratio, chunk_size)
    own_chunk = first_position // chunk_size + jnp.arange(blocks, dtype=jnp.int32)
    words, used = list_words(
        pages, page_ids, since, counts, own_chunk, config.keys // group_size,
        chunk_size=chunk_size, sink_chunks=sink_chunks, local_chunks=local_chunks,
    )  # fmt: skip
    operands = (jnp.stack([first_position, count]).astype(jnp.int32), words, used, query, pages)
    return pl.pallas_call(
        partial(_attention_kernel, chunk_size=chunk_size, scale=scale, config=config, interpret=interpret),
        grid=(-(-ratio * chunk_size // config.rows), blocks, kv_heads),  # tiles of one list side by side: they read the same pages
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((length, heads), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="routed_prefill_attention",
    )(*operands)
