"""Kernels of T=1 attention: windows, routed pages (splits of the page list), exact merge, page copies."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.limits import check_offsets, power_of_two
from pallas_kernels.routed_decode_attention.config import Config

# Rows of a masked scatter that are off point past the end: interpret mode writes them back too, and must not hit a row that is on.
ROWS = 16  # query rows of a matrix product: the smallest the tensor cores take; heads beyond G are zero


def _rows(heads: int) -> int:
    return max(ROWS, pl.next_power_of_2(heads))


def load_query(query_ref, k, scale):
    """[rows, Hp], scaled, in the storage dtype."""
    heads, head_dim = query_ref.shape[1:]
    row, dim = jnp.arange(_rows(heads)), jnp.arange(pl.next_power_of_2(head_dim))
    mask = (row < heads)[:, None] & (dim < head_dim)[None, :]
    query = plgpu.load(query_ref.at[k, row[:, None], dim[None, :]], mask=mask, other=0)
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _add(carry, query, keys, values, visible):
    """One step of the online softmax: keys and values [R, Hp], visible [rows, R]."""
    peak, total, acc = carry
    scores = plgpu.dot(query, keys, trans_b=True, precision=_precision(query.dtype))
    scores = jnp.where(visible, scores, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(1))
    safe = jnp.where(new_peak > -jnp.inf, new_peak, 0)
    weights = jnp.exp(scores - safe[:, None])
    shrink = jnp.exp(peak - safe)
    mixed = plgpu.dot(weights.astype(values.dtype), values, precision=_precision(values.dtype))
    return new_peak, total * shrink + weights.sum(1), acc * shrink[:, None] + mixed


def _empty(rows, width):
    return jnp.full((rows,), -jnp.inf, jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.zeros((rows, width), jnp.float32)


def write_partial(acc_ref, stats_ref, k, split, carry):
    peak, total, acc = carry
    heads, head_dim = acc_ref.shape[2:]
    row, dim = jnp.arange(acc.shape[0]), jnp.arange(acc.shape[1])
    plgpu.store(acc_ref.at[k, split, row[:, None], dim[None, :]], acc, mask=(row < heads)[:, None] & (dim < head_dim)[None, :])
    plgpu.store(stats_ref.at[k, split, 0, row], peak, mask=row < heads)
    plgpu.store(stats_ref.at[k, split, 1, row], total, mask=row < heads)


def partial_shapes(kv_heads: int, splits: int, heads: int, head_dim: int) -> list[jax.ShapeDtypeStruct]:
    """Of acc and stats of so many splits."""
    shapes = (kv_heads, splits, heads, head_dim), (kv_heads, splits, 2, heads)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def window_program(
    k,  # kv head
    split,  # of so many splits of this kv head's windows
    splits: int,
    tile_pages: int,
    refs,  # query [K, G, H], window [K, W or P, 2, g, H], valid [W] i32 (tokens of each window page that count, the first ones), then where
    # they apply: pages [W] i32 (page of the array at each place of the window); with a fresh token key, value [K, H] and place [2] i32 (its
    # place in the window, its row in the page); then out: acc [K, splits, G, H] f32, stats [K, splits, 2, G] f32 (, the window array again,
    # in place); all device
    *,
    scale: float,
    listed: bool,
    fresh: bool,
):
    """Tiles split, split + splits, ... of the windows: the body of a program that attends to them, for the launches that do."""
    query_ref, window_ref, valid_ref, *refs = refs
    pages_ref = refs.pop(0) if listed else None
    key_ref, value_ref, place_ref = (refs.pop(0) for _ in range(3)) if fresh else (None, None, None)
    acc_ref, stats_ref = refs.pop(0), refs.pop(0)
    window_out_ref = refs.pop(0) if fresh else None
    places, held_pages, group_size, head_dim = valid_ref.shape[0], window_ref.shape[1], window_ref.shape[3], window_ref.shape[4]
    query = load_query(query_ref, k, scale)
    row = jnp.arange(tile_pages * group_size)
    dim = jnp.arange(query.shape[1])
    inside = (dim < head_dim)[None, :]
    tiles = -(-places // tile_pages)

    def step(i, carry):
        place = (split + i * splits) * tile_pages + row // group_size
        held = plgpu.load(valid_ref.at[place], mask=place < places, other=0)
        live = row % group_size < held
        page = plgpu.load(pages_ref.at[place], mask=live, other=0) if listed else place
        mask = live[:, None] & inside
        tile = [
            plgpu.load(window_ref.at[k, page[:, None], part, (row % group_size)[:, None], dim[None, :]], mask=mask, other=0)
            for part in (0, 1)
        ]
        if fresh:  # the token's own row is used and written here, so that no launch of its own is needed
            new = (place == place_ref[0]) & (row % group_size == place_ref[1])
            there = (jnp.where(new, page, held_pages)[:, None], (row % group_size)[:, None], dim[None, :])
            for part, ref in enumerate((key_ref, value_ref)):
                token = plgpu.load(ref.at[k, dim], mask=dim < head_dim, other=0).astype(window_ref.dtype)
                tile[part] = jnp.where(new[:, None], token[None, :], tile[part])
                plgpu.store(window_out_ref.at[k, there[0], part, *there[1:]], tile[part], mask=new[:, None] & inside)
        return _add(carry, query, *tile, live[None, :])

    turns = (tiles - split + splits - 1) // splits
    write_partial(acc_ref, stats_ref, k, split, lax.fori_loop(0, turns, step, _empty(*query.shape)))


def _window_kernel(*refs, config: Config, **rules):
    window_program(pl.program_id(0), pl.program_id(1), config.window_splits, config.window_tile_pages, refs, **rules)


class WindowJob(NamedTuple):
    """A launch's part that attends to windows. rules: of `window_program`. arrays: its inputs, shapes: its outputs; aliases: array number
    -> output number of what is updated in place."""

    rules: dict[str, Any]
    arrays: list[Array]
    shapes: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]


def window_job(query, window, valid, pages, fresh, splits: int) -> WindowJob:
    """Arguments as `window_attention` has them."""
    kv_heads, heads, head_dim = query.shape
    check_offsets(window=window)
    if not power_of_two(window.shape[3]):
        raise NotImplementedError(f"group_size={window.shape[3]} must be a power of two in the kernel: use implementation='xla'")
    shapes = partial_shapes(kv_heads, splits, heads, head_dim)
    arrays, aliases = [query, window, valid, *([] if pages is None else [pages]), *(fresh or ())], {}
    if fresh is not None:
        aliases = {1: len(shapes)}
        shapes.append(jax.ShapeDtypeStruct(window.shape, window.dtype))
    return WindowJob({"listed": pages is not None, "fresh": fresh is not None}, arrays, shapes, aliases)


def window_attention(query, window, valid, pages, fresh, *, scale: float, config: Config, interpret: bool):
    """Partial attention over window pages; with `fresh` (key, value, place) also the window array with the token in it."""
    job = window_job(query, window, valid, pages, fresh, config.window_splits)
    return pl.pallas_call(
        partial(_window_kernel, scale=scale, config=config, **job.rules),
        grid=(query.shape[0], config.window_splits),
        in_specs=[pl.no_block_spec] * len(job.arrays),
        out_specs=[pl.no_block_spec] * len(job.shapes),
        out_shape=job.shapes,
        input_output_aliases=job.aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.window_warps, num_stages=1),
        interpret=interpret,
        name="window_attention",
    )(*job.arrays)


def attend_pages(
    query,  # [rows, Hp], from load_query
    k,  # kv head
    begin,  # the list: its first place in ids
    listed,  # and how many pages it has
    split,  # of so many splits of the list
    splits: int,
    tile_pages: int,
    ids_ref,  # [K, M] i32 device
    store_ref,  # [K, P, 2, g, H] pinned host or device
    heads_ref=None,  # [K, M] i32 device: bit n: head n sees the page; None: all do
    source_ref=None,  # [K, M] i32 device, from sketch_decode.bank.place_pages; None: no bank
    bank_ref=None,  # [K, slots, 2, g, H] device, in place
):
    """Tiles split, split + splits, ... of a list of pages: (peak, total, acc) of the online softmax. A page that is not in the bank comes
    from the store, once, and goes into the slot found for it."""
    group_size, head_dim = store_ref.shape[3:]
    row = jnp.arange(tile_pages * group_size)
    dim, head = jnp.arange(query.shape[1]), jnp.arange(query.shape[0])
    token, real = (row % group_size)[:, None], (dim < head_dim)[None, :]
    tiles = (listed + tile_pages - 1) // tile_pages

    def step(i, carry):
        rank = begin + (split + i * splits) * tile_pages + row // group_size
        live = rank < begin + listed
        page = plgpu.load(ids_ref.at[k, rank], mask=live, other=0)
        missed = live
        if bank_ref is not None:
            source = plgpu.load(source_ref.at[k, rank], mask=live, other=0)
            hit, missed = live & (source >= 0), live & (source < 0)
        tile = []
        for part in (0, 1):
            x = plgpu.load(store_ref.at[k, page[:, None], part, token, dim[None, :]], mask=missed[:, None] & real, other=0)
            if bank_ref is not None:
                slot = jnp.where(hit, source, 0)
                kept = plgpu.load(bank_ref.at[k, slot[:, None], part, token, dim[None, :]], mask=hit[:, None] & real, other=0)
                x = jnp.where(hit[:, None], kept, x)
            tile.append(x)
        if bank_ref is not None:
            filled = missed & (source < -1)
            slot = jnp.where(filled, -2 - source, bank_ref.shape[1])
            for part in (0, 1):
                plgpu.store(bank_ref.at[k, slot[:, None], part, token, dim[None, :]], tile[part], mask=filled[:, None] & real)
        visible = live[None, :]
        if heads_ref is not None:
            bits = plgpu.load(heads_ref.at[k, rank], mask=live, other=0)
            visible = visible & (((bits[None, :] >> head[:, None]) & 1) > 0)
        return _add(carry, query, *tile, visible)

    turns = jnp.maximum(tiles - split + splits - 1, 0) // splits
    return lax.fori_loop(0, turns, step, _empty(*query.shape))


def _page_kernel(
    query_ref,  # [K, G, H] device
    ids_ref,  # [K, M] i32 device
    counts_ref,  # [K, parts or more] i32 device: how many pages each part of ids lists
    store_ref,  # [K, P, 2, g, H] pinned host, or device when the whole history is there
    *refs,  # when masked, heads_ref [K, M] i32 device (bit n: head n sees the page); then out: acc [K, splits, G, H] f32,
    # stats [K, splits, 2, G] f32 device
    scale: float,
    parts: int,
    config: Config,
):
    *heads_ref, acc_ref, stats_ref = refs
    k, part, split = pl.program_id(0), pl.program_id(1) % parts, pl.program_id(1) // parts
    begin, splits = part * (ids_ref.shape[1] // parts), acc_ref.shape[1] // parts
    query = load_query(query_ref, k, scale)
    found = attend_pages(query, k, begin, counts_ref[k, part], split, splits, config.tile_pages, ids_ref, store_ref, *heads_ref)
    write_partial(acc_ref, stats_ref, k, pl.program_id(1), found)


def check_store(store: Array) -> None:
    """Raises what attention to pages of this store would run into."""
    check_offsets(store=store)
    if not power_of_two(store.shape[3]):
        raise NotImplementedError(f"group_size={store.shape[3]} must be a power of two in the kernel: use implementation='xla'")


def page_attention(query, ids, counts, store, heads_mask, parts, *, scale: float, config: Config, interpret: bool):
    """Partial attention over the listed pages."""
    kv_heads, heads, head_dim = query.shape
    check_store(store)
    splits = -(-config.splits // parts) * parts
    arrays = [query, ids, counts, store, *([] if heads_mask is None else [heads_mask])]
    return pl.pallas_call(
        partial(_page_kernel, scale=scale, parts=parts, config=config),
        grid=(kv_heads, splits),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * 2,
        out_shape=partial_shapes(kv_heads, splits, heads, head_dim),
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="page_attention",
    )(*arrays)


MERGED_AT_ONCE = 2**15  # elements of partial results in a program's registers: 128 for each of 256 threads


def merge_all_heads(k, parts, out_ref):
    """`merge_heads` for all query heads of a kv head, as many at a time as fit."""
    heads, head_dim = (pl.next_power_of_2(n) for n in out_ref.shape[1:])
    splits = max(pl.next_power_of_2(acc_ref.shape[1]) for acc_ref, _ in parts)
    together = min(heads, max(1, MERGED_AT_ONCE // (splits * head_dim)))

    @pl.loop(0, heads // together)
    def _(i):
        merge_heads(k, i * together + jnp.arange(together), parts, out_ref)


def merge_heads(k, head, parts, out_ref):
    """Combine the partial results (acc_ref, stats_ref) of kv head k for the query heads `head` (an array of numbers) and write the outputs;
    heads that saw nothing get zeros."""
    heads, head_dim = out_ref.shape[1:]
    dim = jnp.arange(pl.next_power_of_2(head_dim))
    here = head < heads
    wide = here[None, :, None] & (dim < head_dim)[None, None, :]
    loaded = []
    for acc_ref, stats_ref in parts:
        splits = acc_ref.shape[1]
        split = jnp.arange(pl.next_power_of_2(splits))
        live = (split < splits)[:, None] & here[None, :]
        peaks = plgpu.load(stats_ref.at[k, split[:, None], 0, head[None, :]], mask=live, other=-jnp.inf)
        totals = plgpu.load(stats_ref.at[k, split[:, None], 1, head[None, :]], mask=live, other=0)
        where = (k, split[:, None, None], head[None, :, None], dim[None, None, :])
        loaded.append((peaks, totals, plgpu.load(acc_ref.at[where], mask=live[:, :, None] & wide, other=0)))
    peak = loaded[0][0].max(0)
    for peaks, _, _ in loaded[1:]:
        peak = jnp.maximum(peak, peaks.max(0))
    safe = jnp.where(peak > -jnp.inf, peak, 0)
    total, out = jnp.zeros(head.shape, jnp.float32), jnp.zeros((head.shape[0], dim.shape[0]), jnp.float32)
    for peaks, totals, acc in loaded:
        weight = jnp.exp(peaks - safe[None, :])
        total += (totals * weight).sum(0)
        out += (acc * weight[:, :, None]).sum(0)
    out = out / jnp.where(total > 0, total, 1)[:, None]
    where = here[:, None] & (dim < head_dim)[None, :]
    plgpu.store(out_ref.at[k, head[:, None], dim[None, :]], out.astype(out_ref.dtype), mask=where)


def _merge_kernel(
    *refs,  # acc [K, splits, G, H] f32, stats [K, splits, 2, G] f32 for each part; then, handed over, a source and a target [K, n] each;
    # out [K, G, H], then the targets again, in place; all device
    parts: int,
    handed: int,
):
    copies = list(zip(refs[2 * parts : 2 * (parts + handed) : 2], refs[2 * (parts + handed) + 1 :], strict=True))
    out_ref, parts = refs[2 * (parts + handed)], refs[: 2 * parts]
    k, n = pl.program_id(0), pl.program_id(1)
    merge_heads(k, n + jnp.arange(1), list(zip(parts[::2], parts[1::2], strict=True)), out_ref)
    for source_ref, target_ref in copies:
        share = -(-source_ref.shape[1] // out_ref.shape[1])
        column = n * share + jnp.arange(pl.next_power_of_2(share))
        mine = (column < (n + 1) * share) & (column < source_ref.shape[1])
        copied = plgpu.load(source_ref.at[k, column], mask=mine, other=0)
        plgpu.store(target_ref.at[k, jnp.where(mine, column, source_ref.shape[1])], copied, mask=mine)


def merge(parts, dtype, handed, *, config: Config, interpret: bool) -> tuple[Array, ...]:
    """Combine partial results (acc, stats) exactly; heads that saw nothing get zeros. handed: pairs of small arrays (source, target) to
    copy in the same launch; the targets come back, in place when donated."""
    kv_heads, _, heads, head_dim = parts[0][0].shape
    arrays = [x for part in (*parts, *handed) for x in part]
    targets = [target for _, target in handed]
    out = pl.pallas_call(
        partial(_merge_kernel, parts=len(parts), handed=len(handed)),
        grid=(kv_heads, heads),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * (1 + len(handed)),
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, heads, head_dim), dtype),
            *(jax.ShapeDtypeStruct(target.shape, target.dtype) for target in targets),
        ],
        input_output_aliases={2 * (len(parts) + i) + 1: 1 + i for i in range(len(handed))},
        compiler_params=plgpu.CompilerParams(num_warps=config.merge_warps, num_stages=1),
        interpret=interpret,
        name="merge_attention",
    )(*arrays)
    return tuple(out)


def _copy_kernel(
    where_ref,  # [3] i32 device: first page of the source, first page of the target, pages to copy
    source_ref,  # [K, n, 2, g, H] pinned host or device
    _,  # the target again
    target_ref,  # [K, P, 2, g, H] pinned host or device, in place
):
    i, k, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group_size, head_dim = target_ref.shape[3:]

    @pl.when(i < where_ref[2])
    def _():
        row, dim = jnp.arange(pl.next_power_of_2(group_size))[:, None], jnp.arange(pl.next_power_of_2(head_dim))[None, :]
        mask = (row < group_size) & (dim < head_dim)
        x = plgpu.load(source_ref.at[k, where_ref[0] + i, part, row, dim], mask=mask, other=0)
        plgpu.store(target_ref.at[k, where_ref[1] + i, part, row, dim], x.astype(target_ref.dtype), mask=mask)


def copy_pages(
    target: Float[Array, "K P 2 g H"], source: Float[Array, "K n 2 g H"], where: Int[Array, " 3"], most: int, *, interpret: bool
) -> Float[Array, "K P 2 g H"]:
    """Copy where[2] <= most neighbouring pages of every kv head into the target, in place when it is donated."""
    check_offsets(target=target, source=source)
    return pl.pallas_call(
        _copy_kernel,
        grid=(most, source.shape[0], 2),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        input_output_aliases={2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="copy_pages",
    )(where, source, target)
