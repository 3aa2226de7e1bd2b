"""Gradients of routed prefill attention for fixed lists (Pallas, Triton lowering): weights are made again from the log-sum-exp.

Two kernels: one a tile of rows (gradient of the queries), one a tile of keys of one block (gradient of keys and values, added up over the
blocks that opened the page with float atomics, so the order of the sum, and its last bits, change from run to run).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import span
from pallas_kernels.limits import check_offsets
from pallas_kernels.routed_prefill_attention.config import Config, default_backward
from pallas_kernels.routed_prefill_attention.kernel import fit
from pallas_kernels.routed_prefill_attention.lists import NOBODY, list_words
from pallas_kernels.routed_prefill_attention.tiles import LOG2_E, dot, exponential, load_tokens, pages_and_since, rows_of


def _query_kernel(
    span_ref,  # i32[2] device: position of query row 0, live rows
    words_ref,  # i32[K, B, R, slots] device
    used_ref,  # i32[K, B, R] device
    query_ref,  # [T, N, H] device
    pages_ref,  # [K, P, 2, g, H] device
    lse_ref,  # f32[T, N] device
    delta_ref,  # f32[T, N] device: out . d_out - d_lse
    d_out_ref,  # [T, N, H] device
    d_query_ref,  # [T, N, H] device
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
    start = (first_position // chunk_size + block) * chunk_size
    flat = tile * config.rows + span(0, config.rows)
    rows = rows_of(flat, query_ref, k, heads // kv_heads, start, first_position, count, chunk_size)
    dim = span(0, pl.next_power_of_2(head_dim))
    where = (rows.index[:, None], rows.head[:, None], dim[None, :])
    mask = rows.live[:, None] & (dim < head_dim)[None, :]
    alive = (start < first_position + count) & (start + chunk_size > first_position)
    query, d_out = (plt.load(ref.at[where], mask=mask, other=0) for ref in (query_ref, d_out_ref))
    peak, delta = (plt.load(ref.at[rows.index, rows.head], mask=rows.live, other=0) for ref in (lse_ref, delta_ref))
    peak = peak * LOG2_E

    def add(acc, keys, values, visible):
        scores = jnp.where(visible, dot(query, keys, trans_b=True), -jnp.inf)
        weights = exponential(scores, scale * LOG2_E, peak[:, None], interpret)
        d_scores = weights * (dot(d_out, values, trans_b=True) - delta[:, None])
        return acc + dot(d_scores.astype(keys.dtype), keys)

    step_pages = config.keys // group_size
    key = span(0, config.keys)
    which, slot = key // group_size, key % group_size
    list_index = 0 if lists == 1 else tile * config.rows // chunk_size
    steps = jnp.maximum(jnp.where(alive, (used_ref[k, block, list_index] + step_pages - 1) // step_pages, 1), 1)  # as in the forward kernel
    slots = words_ref.shape[3]

    def words_of(i):
        return tuple(words_ref[k, block, list_index, jnp.minimum(i * step_pages + j, slots - 1)] for j in range(step_pages))

    def step(i, carry):
        words, acc = carry
        page, since = pages_and_since(words, which)
        keys, values = (load_tokens(pages_ref, k, page, slot, part, dim) for part in (0, 1))
        return words_of(i + 1), add(acc, keys, values, since[None, :] <= rows.row[:, None])

    _, acc = lax.fori_loop(0, steps, step, (words_of(0), jnp.zeros(query.shape, jnp.float32)))
    own = span(0, min(config.keys, chunk_size))
    for begin in range(0, chunk_size, own.shape[0]):
        token = start + begin + own
        held = token < first_position + count
        keys, values = (load_tokens(pages_ref, k, token // group_size, token % group_size, part, dim, held) for part in (0, 1))
        acc = add(acc, keys, values, begin + own[None, :] <= rows.row[:, None])
    acc = jnp.where(rows.live[:, None], acc * scale, 0)
    plt.store(d_query_ref.at[where], acc.astype(d_query_ref.dtype), mask=rows.here[:, None] & (dim < head_dim)[None, :])


def _pages_kernel(
    span_ref,  # i32[2] device: position of query row 0, live rows
    words_ref,  # i32[K, B, R, slots] device
    query_ref,  # [T, N, H] device
    pages_ref,  # [K, P, 2, g, H] device
    lse_ref,  # f32[T, N] device
    delta_ref,  # f32[T, N] device
    d_out_ref,  # [T, N, H] device
    _,  # the next, as it comes in
    d_pages_ref,  # f32[K, P + 1, 2, g, Hp] device: page P takes what belongs nowhere
    *,
    chunk_size: int,
    scale: float,
    config: Config,
    interpret: bool,
):
    tile, block, lists = pl.program_id(0), pl.program_id(1), words_ref.shape[2]
    k, list_index = pl.program_id(2) // lists, pl.program_id(2) % lists
    _, heads, head_dim = query_ref.shape
    kv_heads, held_pages, _, group_size, _ = pages_ref.shape
    first_position, count = span_ref[0], span_ref[1]
    start = (first_position // chunk_size + block) * chunk_size
    own_tiles, step_pages = pl.cdiv(chunk_size, config.keys), config.keys // group_size
    is_own = tile < own_tiles  # the first tiles are the own chunk's, the others the list's
    first_slot = jnp.maximum(tile - own_tiles, 0) * step_pages
    words = [words_ref[k, block, list_index, first_slot + j] for j in range(step_pages)]
    wanted = is_own
    for word in words:
        wanted |= word != NOBODY

    @pl.when(wanted & (start < first_position + count) & (start + chunk_size > first_position))
    def _():
        key = span(0, config.keys)
        page, since = pages_and_since(words, key // group_size)
        own = tile * config.keys + key
        page = jnp.where(is_own, (start + own) // group_size, page)
        since = jnp.where(is_own, own, since)
        held = jnp.where(is_own, start + own < first_position + count, since < NOBODY)
        slot = key % group_size
        dim = span(0, pl.next_power_of_2(head_dim))
        keys, values = (load_tokens(pages_ref, k, page, slot, part, dim, held) for part in (0, 1))
        inside = (dim < head_dim)[None, :]

        def step(i, carry):
            d_keys, d_values = carry
            flat = list_index * chunk_size + i * config.rows + span(0, config.rows)
            rows = rows_of(flat, query_ref, k, heads // kv_heads, start, first_position, count, chunk_size)
            where = (rows.index[:, None], rows.head[:, None], dim[None, :])
            query, d_out = (plt.load(ref.at[where], mask=rows.live[:, None] & inside, other=0) for ref in (query_ref, d_out_ref))
            peak, delta = (plt.load(ref.at[rows.index, rows.head], mask=rows.live, other=0) for ref in (lse_ref, delta_ref))
            scores = jnp.where(since[:, None] <= rows.row[None, :], dot(keys, query, trans_b=True), -jnp.inf)
            weights = exponential(scores, scale * LOG2_E, (peak * LOG2_E)[None, :], interpret)
            d_values = d_values + dot(weights.astype(d_out.dtype), d_out)
            d_scores = weights * (dot(values, d_out, trans_b=True) - delta[None, :])
            return d_keys + dot(d_scores.astype(query.dtype), query), d_values

        zero = jnp.zeros(keys.shape, jnp.float32)
        row_tiles = pl.cdiv((heads // kv_heads if lists == 1 else 1) * chunk_size, config.rows)
        d_keys, d_values = lax.fori_loop(0, row_tiles, step, (zero, zero))
        target = jnp.where(held, page, held_pages)
        for part, gradient in ((0, d_keys * scale), (1, d_values)):
            plt.atomic_add(d_pages_ref, (k, target[:, None], part, slot[:, None], dim[None, :]), gradient)


def gradients(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    first_position: Int[Array, ""],
    count: Int[Array, ""],
    page_ids: Int[Array, "K B R M"],
    since: Int[Array, "K B R M"],
    counts: Int[Array, "K B R"],
    out: Float[Array, "T N H"],
    lse: Float[Array, "T N"],
    d_out: Float[Array, "T N H"],
    d_lse: Float[Array, "T N"],
    *,
    chunk_size: int,
    sink_chunks: int,
    local_chunks: int,
    scale: float,
    config: Config | None,
    interpret: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "K P 2 g H"]]:
    """(gradient of the queries, gradient of the pages) from those of the outputs; sums in float32."""
    heads, head_dim = query.shape[1:]
    kv_heads, held, _, group_size, _ = pages.shape
    ratio, (_, blocks, lists, _) = heads // kv_heads, page_ids.shape
    config = fit(config or default_backward(query.dtype, head_dim), pages, lists, ratio, chunk_size)
    own_chunk = first_position // chunk_size + jnp.arange(blocks, dtype=jnp.int32)
    words, used = list_words(
        pages, page_ids, since, counts, own_chunk, config.keys // group_size,
        chunk_size=chunk_size, sink_chunks=sink_chunks, local_chunks=local_chunks,
    )  # fmt: skip
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    bounds = jnp.stack([first_position, count]).astype(jnp.int32)
    tensors = (query, pages, lse, delta, d_out.astype(query.dtype))
    settings = {"chunk_size": chunk_size, "scale": scale, "config": config, "interpret": interpret}
    compiler = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    d_query = pl.pallas_call(
        partial(_query_kernel, **settings),
        grid=(pl.cdiv(ratio * chunk_size, config.rows), blocks, kv_heads),
        in_specs=[pl.no_block_spec] * (3 + len(tensors)),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=compiler,
        interpret=interpret,
        name="routed_prefill_query_gradient",
    )(bounds, words, used, *tensors)
    # Rows padded to what a program holds, and a page for what belongs nowhere: the interpreter knows no masked atomics.
    total = jnp.zeros((kv_heads, held + 1, 2, group_size, pl.next_power_of_2(head_dim)), jnp.float32)
    check_offsets(page_gradients=total)
    d_pages = pl.pallas_call(
        partial(_pages_kernel, **settings),
        grid=(pl.cdiv(chunk_size, config.keys) + words.shape[3] * group_size // config.keys, blocks, kv_heads * lists),
        in_specs=[pl.no_block_spec] * (3 + len(tensors)),
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={2 + len(tensors): 0},
        compiler_params=compiler,
        interpret=interpret,
        name="routed_prefill_page_gradient",
    )(bounds, words, *tensors, total)
    return d_query, d_pages[:, :held, ..., :head_dim].astype(pages.dtype)
