"""Launches whose programs have different jobs, told by their numbers; the jobs' bodies are those of the operations' own kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.limits import check_offsets
from pallas_kernels.routed_decode_attention import Config as AttentionConfig
from pallas_kernels.routed_decode_attention.kernel import (
    attend_pages,
    check_store,
    load_query,
    merge,
    merge_all_heads,
    partial_shapes,
    window_job,
    window_program,
    write_partial,
)
from pallas_kernels.sketch_decode.bank import place_pages
from pallas_kernels.sketch_routing import Config as ScanConfig
from pallas_kernels.sketch_routing.kernel import Listing, check_scan, scan_program, scan_shapes, select_program
from pallas_kernels.votes import oldest_open

SCAN_READS = 5  # arrays


def _scan_and_windows_kernel(
    *refs,  # those of the scan, those of the windows, the scan's results, finished_ref [K] i32 (set to 0), the windows' results
    windows: int,
    group_size: int,
    scale: float,
    scan_config: ScanConfig,
    config: AttentionConfig,
    rules: dict,
):
    scan_in, refs = refs[:SCAN_READS], refs[SCAN_READS:]
    window_in, scan_out, finished_ref, window_out = refs[:windows], refs[windows : windows + 2], refs[windows + 2], refs[windows + 3 :]
    k, program = pl.program_id(0), pl.program_id(1)
    splits = config.beside_splits

    @pl.when(program < splits)  # the windows' programs first: each goes through a few tiles while others scan
    def _():
        window_program(k, program, splits, config.beside_tile_pages, [*window_in, *window_out], scale=scale, **rules)

    @pl.when(program == splits)
    def _():
        finished_ref[k] = jnp.int32(0)

    @pl.when(program >= splits)
    def _():
        heads = window_in[0].shape[1]
        scan_program(
            k, program - splits, scan_config.scan_programs, *scan_in, *scan_out, heads=heads, group_size=group_size, scale=scale,
            config=scan_config,
        )  # fmt: skip


def scan_beside_windows(
    query, prepared, codes, scales, middle, window, valid, pages, fresh, *,
    group_size: int, scale: float, scan_config: ScanConfig, config: AttentionConfig, interpret: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Scores and partial results of the scan, zeros for attend_selected to count in, what window_attention returns."""
    kv_heads, chunks, padded = prepared.chunk_scores.shape
    check_scan(codes, codes.shape[1] // chunks, group_size)
    job = window_job(query, window, valid, pages, fresh, config.beside_splits)
    arrays = [*prepared, codes, scales, middle, *job.arrays]
    shapes = [*scan_shapes(kv_heads, codes.shape[1] // group_size, padded, scan_config)]
    shapes += [jax.ShapeDtypeStruct((kv_heads,), jnp.int32), *job.shapes]
    kernel = partial(
        _scan_and_windows_kernel, windows=len(job.arrays), group_size=group_size, scale=scale, scan_config=scan_config, config=config,
        rules=job.rules,
    )  # fmt: skip
    found = pl.pallas_call(
        kernel,
        grid=(kv_heads, config.beside_splits + scan_config.scan_programs),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(shapes),
        out_shape=shapes,
        input_output_aliases={SCAN_READS + array: 3 + result for array, result in job.aliases.items()},
        compiler_params=plgpu.CompilerParams(num_warps=scan_config.scan_warps, num_stages=scan_config.scan_stages),
        interpret=interpret,
        name="sketch_scan_beside_windows",
    )(*arrays)
    return tuple(found)


BANK = 3  # arrays of a bank


class Rules(NamedTuple):
    """Sizes and numbers of the selection and attention kernel. selection: of `select_program`."""

    room: int
    scale: float
    selection: dict[str, Any]


def _attend_selected_kernel(
    query_ref,  # [K, G, H] device
    scores_ref, partial_ref, window_ref, stamps_ref, chunks_ref,  # as in select_program
    window_acc_ref,  # [K, splits, G, H] f32 device: attention over the windows; its stats are window_ref
    store_ref,  # [K, P, 2, g, H] pinned host, or device when the whole history is there
    finished_ref,  # [K] i32 device: programs of the kv head that are done, 0 to begin with
    *refs,  # with a bank: pages [K, slots, 2, g, H], page_slot [K, P] i32, slot_page [K, slots] i32, device; then out, device:
    # out [K, G, H]; stamps; ids [K, parts * room] i32, count [K, parts] i32; counts, unopened; acc [K, parts, G, H], stats [K, parts, 2, G]
    # f32; finished, in place; with a bank hits [K, parts], source and victims [K, parts * room] i32, and the bank, in place
    banked: bool,
    rules: Rules,
    scan_config: ScanConfig,
    config: AttentionConfig,
    interpret: bool,
):  # fmt: skip
    refs = refs[BANK:] if banked else refs
    out_ref, stamps_out_ref, ids_ref, count_ref, counts_ref, unopened_ref, acc_ref, stats_ref, finished_out_ref, *bank_refs = refs
    k, part = pl.program_id(0), pl.program_id(1)
    parts = count_ref.shape[1]
    begin = part * rules.room

    def wait():  # until all threads of the program see what each wrote; the interpreter runs a program's lines one after the other
        if not interpret:
            plgpu.debug_barrier()

    listed = select_program(
        k, part, scores_ref, partial_ref, window_ref, stamps_ref, chunks_ref, stamps_out_ref, counts_ref, unopened_ref,
        Listing(ids_ref, count_ref), **rules.selection, config=scan_config,
    )  # fmt: skip
    wait()
    through_bank = {}
    if banked:
        hits_ref, source_ref, victims_ref, bank_ref, page_slot_ref, slot_page_ref = bank_refs
        place_pages(
            k, part, begin, listed, rules.room, oldest_open(chunks_ref[2], rules.selection["votes"]), ids_ref, stamps_out_ref, hits_ref,
            source_ref, victims_ref, page_slot_ref, slot_page_ref, wait,
        )  # fmt: skip
        wait()
        through_bank = {"source_ref": source_ref, "bank_ref": bank_ref}
    query = load_query(query_ref, k, rules.scale)
    found = attend_pages(query, k, begin, listed, 0, 1, config.selected_tile_pages, ids_ref, store_ref, **through_bank)
    write_partial(acc_ref, stats_ref, k, part, found)
    if not config.merge_in_launch:
        return

    # The last of the kv head's programs to get here merges what all of them wrote, and sees all of it, as a grid barrier does: a program's
    # writes, its barrier (bar.sync), one thread's addition (atom.acq_rel.gpu: the compiler puts a fence before it and invalidates the
    # first-level cache after it), the barrier by which its result is handed to all threads, their reads. Which program is the last
    # changes no bit of the sum: it is taken in the order of the parts.
    wait()
    before = plgpu.atomic_add(finished_out_ref, (k,), jnp.int32(1))

    @pl.when(before == parts - 1)
    def _():
        merge_all_heads(k, [(window_acc_ref, window_ref), (acc_ref, stats_ref)], out_ref)


def attend_selected(
    query, scores, windows, stamps, chunks, store, finished, bank, *,
    parts: int, rules: Rules, scan_config: ScanConfig, config: AttentionConfig, interpret: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """out, stamps, counts, unopened (, hits, the bank's arrays)."""
    kv_heads, heads, head_dim = query.shape
    check_store(store)
    arrays = [query, *scores, windows.stats, stamps, chunks, windows.acc, store, finished, *(bank or ())]
    numbers = [stamps.shape, (kv_heads, parts * rules.room), (kv_heads, parts), (kv_heads, parts, 2)]
    shapes = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers),
        jax.ShapeDtypeStruct((kv_heads, parts, heads), jnp.float32),
        *partial_shapes(kv_heads, parts, heads, head_dim),
        jax.ShapeDtypeStruct(finished.shape, jnp.int32),
    ]
    aliases = {4: 1, 8: 8}
    if bank is not None:
        check_offsets(bank=bank[0])
        aliases |= {9 + i: len(shapes) + 3 + i for i in range(BANK)}
        shapes += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((kv_heads, parts), *[(kv_heads, parts * rules.room)] * 2)]
        shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in bank]
    kernel = partial(
        _attend_selected_kernel, banked=bank is not None, rules=rules, scan_config=scan_config, config=config, interpret=interpret
    )
    out, stamps, _, _, counts, unopened, acc, stats, _, *banked = pl.pallas_call(
        kernel,
        grid=(kv_heads, parts),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(shapes),
        out_shape=shapes,
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=config.selected_warps, num_stages=1),
        interpret=interpret,
        name="attend_selected",
    )(*arrays)
    if not config.merge_in_launch:
        [out] = merge([windows, (acc, stats)], query.dtype, (), config=config, interpret=interpret)
    return out, stamps, counts, unopened, *(banked[:1] + banked[3:])
