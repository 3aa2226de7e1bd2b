"""Flash attention of chunks of queries over their windows and opened pages (Pallas, Triton lowering): one launch, no temporaries but the lists."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.indexing import span
from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.routed_prefill_attention.config import Config, default

LOG2_E = math.log2(math.e)
SINCE_BITS = 8  # of a list word: the first row of the chunk that sees the page; the other bits are the page
NOBODY = 2**SINCE_BITS - 1


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


def window_pages(
    own_chunk: Int[Array, " B"], *, chunk_size: int, group_size: int, sink_chunks: int, local_chunks: int
) -> tuple[Int[Array, "B W"], Bool[Array, "B W"]]:
    """(pages, live) of the sinks and the local window of each block, W slots."""
    each = chunk_size // group_size
    local = jnp.maximum(own_chunk - local_chunks, 0)[:, None]
    sink, near = jnp.arange(sink_chunks * each), jnp.arange(local_chunks * each)
    pages = jnp.concatenate([jnp.broadcast_to(sink, (own_chunk.shape[0], sink.shape[0])), local * each + near], axis=1)
    live = jnp.concatenate([sink < local * each, local * each + near < own_chunk[:, None] * each], axis=1)
    return pages.astype(jnp.int32), live


def list_words(
    pages: Any, page_ids: Int[Array, "K B R M"], since: Int[Array, "K B R M"], counts: Int[Array, "K B R"],
    own_chunk: Int[Array, " B"], multiple: int, *, chunk_size: int, sink_chunks: int, local_chunks: int,
) -> tuple[Int[Array, "K B R slots"], Int[Array, "K B R"]]:  # fmt: skip
    """One word a page, page * 256 + first row that sees it, windows first; and the words in use. Slots are a multiple of `multiple`."""
    held, group_size = pages.shape[1], pages.shape[3]
    near, live = window_pages(
        own_chunk, chunk_size=chunk_size, group_size=group_size, sink_chunks=sink_chunks, local_chunks=local_chunks
    )
    window = jnp.where(live, near << SINCE_BITS, NOBODY)
    seen = (jnp.arange(page_ids.shape[3]) < counts[..., None]) & (since < chunk_size) & (page_ids >= 0) & (page_ids < held)
    listed = jnp.where(seen, (page_ids << SINCE_BITS) + jnp.maximum(since, 0), NOBODY)
    words = jnp.concatenate([jnp.broadcast_to(window[None, :, None], (*listed.shape[:3], window.shape[1])), listed], axis=-1)
    slots = max(pl.cdiv(words.shape[-1], multiple), 1) * multiple
    words = jnp.pad(words, ((0, 0), (0, 0), (0, 0), (0, slots - words.shape[-1])), constant_values=NOBODY)
    return words.astype(jnp.int32), (window.shape[1] + jnp.minimum(counts, page_ids.shape[3])).astype(jnp.int32)


def _dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
    return plt.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _of_page(words: list[Any], index: Array) -> Array:
    """words[index] for an index vector whose entries the compiler knows: the choice costs nothing at run time."""
    out = jnp.full(index.shape, words[0], jnp.int32)
    for j, word in enumerate(words[1:], 1):
        out = jnp.where(index == j, word, out)
    return out


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
):
    tile, block, k = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, heads, head_dim = query_ref.shape
    kv_heads, _, _, group_size, _ = pages_ref.shape
    ratio, lists = heads // kv_heads, words_ref.shape[2]
    first_position, count = span_ref[0], span_ref[1]
    start = (first_position // chunk_size + block) * chunk_size  # of the own chunk
    flat = tile * config.rows + span(0, config.rows)
    head, row = flat // chunk_size, flat % chunk_size
    index = start + row - first_position  # of the query
    here = (index >= 0) & (index < length) & (head < ratio)
    live = here & (index < count)
    dim = span(0, pl.next_power_of_2(head_dim))
    inside = dim < head_dim
    # Rows that are off point past the end: the interpreter writes masked rows back too, and must not hit one that is on.
    target, query_head = jnp.where(here, index, length), k * ratio + jnp.minimum(head, ratio - 1)
    where = (target[:, None], query_head[:, None], dim[None, :])
    padded = dim.shape[0] != head_dim

    @pl.when((start < first_position + count) & (start + chunk_size > first_position))
    def _():
        query = plt.load(query_ref.at[where], mask=live[:, None] & inside[None, :], other=0)
        factor = scale * LOG2_E  # exp2 is the hardware's exponential

        def load(page, slot, part, mask=None):
            at = (k, page[:, None], part, slot[:, None], dim[None, :])
            if padded:
                mask = inside[None, :] & (True if mask is None else mask[:, None])
            elif mask is not None:
                mask = jnp.broadcast_to(mask[:, None], (mask.shape[0], dim.shape[0]))
            return plt.load(pages_ref.at[at], mask=mask, other=None if mask is None else 0)

        def add(carry, keys, values, visible):
            peak, total, acc = carry
            scores = jnp.where(visible, _dot(query, keys, trans_b=True), -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(1) * factor)
            weights = jnp.exp2(scores * factor - new_peak[:, None])
            shrink = jnp.exp2(peak - new_peak)
            return new_peak, total * shrink + weights.sum(1), acc * shrink[:, None] + _dot(weights.astype(values.dtype), values)

        # The own chunk comes first: every row sees at least its token 0, and the running maximum is finite from there on.
        carry = (
            jnp.full((config.rows,), -jnp.inf, jnp.float32),
            jnp.zeros((config.rows,), jnp.float32),
            jnp.zeros((config.rows, dim.shape[0]), jnp.float32),
        )
        own = span(0, min(config.keys, chunk_size))
        for begin in range(0, chunk_size, own.shape[0]):
            token = start + begin + own
            held = token < first_position + count  # what lies beyond may be anything
            keys, values = (load(token // group_size, token % group_size, part, held) for part in (0, 1))
            carry = add(carry, keys, values, begin + own[None, :] <= row[:, None])

        step_pages = config.keys // group_size
        key = span(0, config.keys)
        which, slot = key // group_size, key % group_size
        list_index = 0 if lists == 1 else tile * config.rows // chunk_size
        steps = (used_ref[k, block, list_index] + step_pages - 1) // step_pages
        slots = words_ref.shape[3]

        def words_of(i):
            return tuple(words_ref[k, block, list_index, jnp.minimum(i * step_pages + j, slots - 1)] for j in range(step_pages))

        def step(i, carry):
            words, *carry = carry
            page = _of_page([word >> SINCE_BITS for word in words], which)
            since = _of_page([word & NOBODY for word in words], which)
            keys, values = (load(page, slot, part) for part in (0, 1))
            following = words_of(i + 1)  # a step ahead: the addresses of the next loads hang on them
            return following, *add(carry, keys, values, since[None, :] <= row[:, None])

        _, peak, total, acc = lax.fori_loop(0, steps, step, (words_of(0), *carry))
        out = jnp.where(live[:, None], acc / total[:, None], 0)
        plt.store(out_ref.at[where], out.astype(out_ref.dtype), mask=here[:, None] & inside[None, :])
        lse = jnp.where(live, peak / LOG2_E + jnp.log(total), 0)
        plt.store(lse_ref.at[target, query_head], lse, mask=here)

    @pl.when((start >= first_position + count) | (start + chunk_size <= first_position))
    def _():
        zero = jnp.zeros((config.rows, dim.shape[0]), out_ref.dtype)
        plt.store(out_ref.at[where], zero, mask=here[:, None] & inside[None, :])
        plt.store(lse_ref.at[target, query_head], jnp.zeros((config.rows,), jnp.float32), mask=here)


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
    config = config or default(query.dtype, head_dim)
    rows = min(config.rows, chunk_size if lists > 1 else pl.next_power_of_2(ratio * chunk_size))
    config = replace(config, rows=rows, keys=max(config.keys, group_size))
    own_chunk = first_position // chunk_size + jnp.arange(blocks, dtype=jnp.int32)
    words, used = list_words(
        pages, page_ids, since, counts, own_chunk, config.keys // group_size,
        chunk_size=chunk_size, sink_chunks=sink_chunks, local_chunks=local_chunks,
    )  # fmt: skip
    operands = (jnp.stack([first_position, count]).astype(jnp.int32), words, used, query, pages)
    return pl.pallas_call(
        partial(_attention_kernel, chunk_size=chunk_size, scale=scale, config=config),
        grid=(-(-ratio * chunk_size // rows), blocks, kv_heads),  # tiles of one list side by side: they read the same pages
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((length, heads), jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="routed_prefill_attention",
    )(*operands)
