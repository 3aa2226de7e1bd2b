"""Kernels of T=1 attention: windows, routed pages (splits of the page list), exact merge, bank planning, page copies."""

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


def _load_query(query_ref, k, scale):
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


def _write_partial(acc_ref, stats_ref, k, split, carry):
    peak, total, acc = carry
    heads, head_dim = acc_ref.shape[2:]
    row, dim = jnp.arange(acc.shape[0]), jnp.arange(acc.shape[1])
    plgpu.store(acc_ref.at[k, split, row[:, None], dim[None, :]], acc, mask=(row < heads)[:, None] & (dim < head_dim)[None, :])
    plgpu.store(stats_ref.at[k, split, 0, row], peak, mask=row < heads)
    plgpu.store(stats_ref.at[k, split, 1, row], total, mask=row < heads)


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
    query = _load_query(query_ref, k, scale)
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
    _write_partial(acc_ref, stats_ref, k, split, lax.fori_loop(0, turns, step, _empty(*query.shape)))


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
    shapes = [(kv_heads, splits, heads, head_dim), (kv_heads, splits, 2, heads)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
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


def _page_kernel(
    query_ref,  # [K, G, H] device
    ids_ref,  # [K, M] i32 device
    counts_ref,  # [K, parts or more] i32 device: how many pages each part of ids lists
    store_ref,  # [K, P, 2, g, H] pinned host, or device when the whole history is there
    *refs,  # with two lists, ids and counts of the second; when masked, heads_ref [K, M] i32 device (bit n: head n sees the page); then
    # with a bank, in and out: source [K, lists * M] i32, victims [K, lists * M] i32, bank [K, slots, 2, g, H], page_slot [K, P] i32,
    # slot_page [K, slots] i32, all device;
    # then out: acc [K, splits, G, H] f32, stats [K, splits, 2, G] f32 device (, bank, page_slot, slot_page: the same buffers)
    scale: float,
    parts: int,
    lists: int,
    masked: bool,
    banked: bool,
    config: Config,
):
    refs = list(refs)
    listings = [(ids_ref, counts_ref), *([(refs.pop(0), refs.pop(0))] if lists == 2 else [])]
    heads_ref = refs.pop(0) if masked else None
    if banked:
        source_ref, victims_ref, _, _, _, acc_ref, stats_ref, bank_ref, page_slot_ref, slot_page_ref = refs
    else:
        acc_ref, stats_ref = refs
    k, part_of, split = pl.program_id(0), pl.program_id(1) % (lists * parts), pl.program_id(1) // (lists * parts)
    which, part_of = part_of // parts, part_of % parts
    splits, capacity = acc_ref.shape[1] // (lists * parts), ids_ref.shape[1]
    begin = part_of * (capacity // parts)
    group_size, head_dim = store_ref.shape[3:]
    query = _load_query(query_ref, k, scale)
    row = jnp.arange(config.tile_pages * group_size)
    dim = jnp.arange(query.shape[1])
    head = jnp.arange(query.shape[0])
    listed = counts_ref[k, part_of]
    for n, (_, more_ref) in enumerate(listings[1:], 1):
        listed = jnp.where(which == n, more_ref[k, part_of], listed)
    tiles = (listed + config.tile_pages - 1) // config.tile_pages

    def step(i, carry):
        rank = begin + (split + i * splits) * config.tile_pages + row // group_size
        live = rank < begin + listed
        page = _listed_pages(listings, k, rank, which, live)
        rank += which * capacity  # in the bank's plan and the masks, one list after the other
        token = (row % group_size)[:, None]
        real = (dim < head_dim)[None, :]
        if banked:
            source = plgpu.load(source_ref.at[k, rank], mask=live, other=0)
            hit = live & (source >= 0)
            slot = jnp.where(hit, source, 0)
            missed = live & ~hit
        else:
            missed = live
        tile = []
        for part in (0, 1):
            x = plgpu.load(store_ref.at[k, page[:, None], part, token, dim[None, :]], mask=missed[:, None] & real, other=0)
            if banked:
                kept = plgpu.load(bank_ref.at[k, slot[:, None], part, token, dim[None, :]], mask=hit[:, None] & real, other=0)
                x = jnp.where(hit[:, None], kept, x)
            tile.append(x)
        if banked:
            # A missed page goes to the slot planned for it: read from the host once, used, and kept.
            miss_rank = -1 - source
            filled = missed & (miss_rank < victims_ref.shape[1])
            target = plgpu.load(victims_ref.at[k, jnp.where(filled, miss_rank, 0)], mask=filled, other=-1)
            filled = filled & (target >= 0)
            for part in (0, 1):
                plgpu.store(
                    bank_ref.at[k, jnp.where(filled, target, bank_ref.shape[1])[:, None], part, token, dim[None, :]],
                    tile[part],
                    mask=filled[:, None] & real,
                )
            once = filled & (row % group_size == 0)
            plgpu.store(page_slot_ref.at[k, jnp.where(once, page, page_slot_ref.shape[1])], target, mask=once)
            plgpu.store(slot_page_ref.at[k, jnp.where(once, target, slot_page_ref.shape[1])], page, mask=once)
        visible = live[None, :]
        if masked:
            bits = plgpu.load(heads_ref.at[k, rank], mask=live, other=0)
            visible = visible & (((bits[None, :] >> head[:, None]) & 1) > 0)
        return _add(carry, query, *tile, visible)

    turns = jnp.maximum(tiles - split + splits - 1, 0) // splits
    _write_partial(acc_ref, stats_ref, k, pl.program_id(1), lax.fori_loop(0, turns, step, _empty(*query.shape)))


def _listed_pages(listings, k, rank, which, live):
    """Pages by their ranks in list number `which`, one number or one for each; 0 where not live."""
    page = jnp.zeros(rank.shape, jnp.int32)
    for n, (ids_ref, _) in enumerate(listings):
        mine = live & (which == n)
        page = jnp.where(mine, plgpu.load(ids_ref.at[k, jnp.where(mine, rank, 0)], mask=mine, other=0), page)
    return page


def page_attention(query, lists, store, heads_mask, bank, plan, parts, *, scale: float, config: Config, interpret: bool):
    """Partial attention over the listed pages. lists: one or two (ids, counts) of equal shapes. bank: (pages, page_slot, slot_page) or
    None; plan: (source, victims)."""
    kv_heads, heads, head_dim = query.shape
    check_offsets(store=store)
    if not power_of_two(store.shape[3]):
        raise NotImplementedError(f"group_size={store.shape[3]} must be a power of two in the kernel: use implementation='xla'")
    (ids, counts), *more = lists
    splits = len(lists) * -(-config.splits // parts) * parts
    arrays = [query, ids, counts, store, *(x for listing in more for x in listing)]
    if heads_mask is not None:
        arrays.append(heads_mask)
    shapes = [
        jax.ShapeDtypeStruct((kv_heads, splits, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((kv_heads, splits, 2, heads), jnp.float32),
    ]
    aliases = {}
    if bank is not None:
        check_offsets(bank=bank[0])
        arrays += [*plan, *bank]
        aliases = {len(arrays) - 3 + i: 2 + i for i in range(3)}
        shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in bank]
    return pl.pallas_call(
        partial(
            _page_kernel, scale=scale, parts=parts, lists=len(lists), masked=heads_mask is not None, banked=bank is not None, config=config
        ),
        grid=(kv_heads, splits),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(shapes),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="page_attention",
    )(*arrays)


def _merge_kernel(
    *refs,  # acc [K, splits, G, H] f32, stats [K, splits, 2, G] f32 for each part; then, handed over, a source and a target [K, n] each;
    # out [K, G, H], then the targets again, in place; all device
    parts: int,
    handed: int,
):
    copies = list(zip(refs[2 * parts : 2 * (parts + handed) : 2], refs[2 * (parts + handed) + 1 :], strict=True))
    out_ref, parts = refs[2 * (parts + handed)], refs[: 2 * parts]
    k, n = pl.program_id(0), pl.program_id(1)
    head_dim = out_ref.shape[2]
    dim = jnp.arange(pl.next_power_of_2(head_dim))
    loaded = []
    for acc_ref, stats_ref in zip(parts[::2], parts[1::2], strict=True):
        splits = acc_ref.shape[1]
        split = jnp.arange(pl.next_power_of_2(splits))
        peaks = plgpu.load(stats_ref.at[k, split, 0, n], mask=split < splits, other=-jnp.inf)
        totals = plgpu.load(stats_ref.at[k, split, 1, n], mask=split < splits, other=0)
        acc = plgpu.load(
            acc_ref.at[k, split[:, None], n, dim[None, :]], mask=(peaks > -jnp.inf)[:, None] & (dim < head_dim)[None, :], other=0
        )
        loaded.append((peaks, totals, acc))
    peak = loaded[0][0].max(0)
    for peaks, _, _ in loaded[1:]:
        peak = jnp.maximum(peak, peaks.max(0))
    safe = jnp.where(peak > -jnp.inf, peak, 0)
    total, out = jnp.float32(0), jnp.zeros((dim.shape[0],), jnp.float32)
    for peaks, totals, acc in loaded:
        weight = jnp.exp(peaks - safe)
        total += (totals * weight).sum(0)
        out += (acc * weight[:, None]).sum(0)
    out = out / jnp.where(total > 0, total, 1)
    plgpu.store(out_ref.at[k, n, dim], out.astype(out_ref.dtype), mask=dim < head_dim)
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


def _plan_kernel(
    *refs,  # ids [K, M] i32 and counts [K, parts or more] i32 of each list, device; then, device:
    # page_slot [K, P] i32: -1 where the page has no slot
    # slot_page [K, slots] i32: -1 where the slot is empty
    # recency [K, P] i32: when the page was last requested
    # needed [1] i32: pages at least this recent are needed now
    # out: page_slot, the same buffer: pages that lose their slot get -1
    # source [K, lists * M] i32: slot of a page in the bank, -1 - (rank among the missed) of one that is not
    # victims [K, lists * M] i32: slot for each missed page, -1 where none is free
    # hits [K] i32
    parts: int,
    lists: int,
):
    listings = list(zip(refs[: 2 * lists : 2], refs[1 : 2 * lists : 2], strict=True))
    page_slot_ref, slot_page_ref, recency_ref, needed_ref, page_slot_out_ref, source_ref, victims_ref, hits_ref = refs[2 * lists :]
    k = pl.program_id(0)
    each, slots = listings[0][0].shape[1], slot_page_ref.shape[1]
    capacity = lists * each
    needed = needed_ref[0]
    rank, room = jnp.arange(pl.next_power_of_2(capacity)), each // parts
    which, place = rank // each, rank % each
    listed = jnp.zeros(rank.shape, jnp.int32)
    for n, (_, counts_ref) in enumerate(listings):
        mine = which == n
        listed = jnp.where(mine, plgpu.load(counts_ref.at[k, jnp.where(mine, place // room, 0)], mask=mine, other=0), listed)
    live = place % room < listed
    page = _listed_pages(listings, k, place, which, live)
    slot = plgpu.load(page_slot_ref.at[k, page], mask=live, other=-1)
    missed = (live & (slot < 0)).astype(jnp.int32)
    misses = jnp.sum(missed)
    miss_rank = jnp.cumsum(missed, axis=0) - 1
    plgpu.store(source_ref.at[k, rank], jnp.where(missed > 0, -1 - miss_rank, slot), mask=rank < capacity)
    hits_ref[k] = jnp.sum(live.astype(jnp.int32)) - misses

    @pl.when(misses > 0)
    def _():
        index = jnp.arange(pl.next_power_of_2(slots))
        held = plgpu.load(slot_page_ref.at[k, index], mask=index < slots, other=-1)
        recency = plgpu.load(recency_ref.at[k, jnp.maximum(held, 0)], mask=held >= 0, other=-(2**30))
        free = (index < slots) & (recency < needed)
        recency = jnp.where(free, recency, 2**30)
        wanted = jnp.minimum(misses, jnp.sum(free.astype(jnp.int32)))

        # The smallest age bound with enough slots at or below it: empty slots and the oldest pages go first.
        def narrow(bounds):
            low, high = bounds
            middle = low + (high - low) // 2
            enough = jnp.sum((recency <= middle).astype(jnp.int32)) >= wanted
            return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

        oldest = jnp.maximum(jnp.min(recency), -4)
        bound, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], narrow, (oldest - 1, jnp.maximum(needed, oldest)))
        older, equal = (recency < bound).astype(jnp.int32), (recency == bound).astype(jnp.int32)
        spare = wanted - jnp.sum(older)
        chosen = older + equal * (jnp.cumsum(equal, axis=0) <= spare).astype(jnp.int32)
        place = jnp.cumsum(chosen, axis=0) - 1
        chosen = (chosen > 0) & (place < wanted)
        evicted = chosen & (held >= 0)
        plgpu.store(page_slot_out_ref.at[k, jnp.where(evicted, held, page_slot_ref.shape[1])], jnp.full_like(held, -1), mask=evicted)
        put = chosen & (place < capacity)
        plgpu.store(victims_ref.at[k, jnp.where(put, place, capacity)], index, mask=put)
        plgpu.store(victims_ref.at[k, rank], jnp.full_like(rank, -1), mask=(rank >= wanted) & (rank < capacity))


def plan_bank(lists, page_slot, slot_page, recency, needed, parts, *, config: Config, interpret: bool):
    """Where each page of one or two lists (ids, counts) is or will be: (page_slot without the evicted, source, victims, hits)."""
    kv_heads, capacity = lists[0][0].shape[0], len(lists) * lists[0][0].shape[1]
    arrays = [x for listing in lists for x in listing]
    check_offsets(recency=recency)
    return pl.pallas_call(
        partial(_plan_kernel, parts=parts, lists=len(lists)),
        grid=(kv_heads,),
        in_specs=[pl.no_block_spec] * (len(arrays) + 4),
        out_specs=[pl.no_block_spec] * 4,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (page_slot.shape, (kv_heads, capacity), (kv_heads, capacity), (kv_heads,))
        ],
        input_output_aliases={len(arrays): 0},
        compiler_params=plgpu.CompilerParams(num_warps=config.bank_warps, num_stages=1),
        interpret=interpret,
        name="plan_bank",
    )(*arrays, page_slot, slot_page, recency, needed)


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
