"""Launches whose programs have different jobs, told by their numbers; the jobs' bodies are those of the operations' own kernels."""

from __future__ import annotations

from functools import partial

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.routed_decode_attention import Config as AttentionConfig
from pallas_kernels.routed_decode_attention.kernel import window_job, window_program
from pallas_kernels.sketch_routing import Config as ScanConfig
from pallas_kernels.sketch_routing.kernel import check_scan, scan_program, scan_shapes

SCANNED = 5  # arrays that the scan reads


def _scan_and_windows_kernel(
    *refs,  # those of the scan, those of the windows, the scan's results, the windows' results
    windows: int,
    group_size: int,
    scale: float,
    scan_config: ScanConfig,
    config: AttentionConfig,
    rules: dict,
):
    scan_in, refs = refs[:SCANNED], refs[SCANNED:]
    window_in, scan_out, window_out = refs[:windows], refs[windows : windows + 2], refs[windows + 2 :]
    k, program = pl.program_id(0), pl.program_id(1)
    splits = config.beside_splits

    @pl.when(program < splits)  # the windows' programs first: each goes through a few tiles while others scan
    def _():
        window_program(k, program, splits, config.beside_tile_pages, [*window_in, *window_out], scale=scale, **rules)

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
) -> tuple[list[jax.Array], list[jax.Array]]:  # fmt: skip
    """(scores and partial results of the scan, what window_attention returns)."""
    kv_heads, chunks, padded = prepared.chunk_scores.shape
    check_scan(codes, codes.shape[1] // chunks, group_size)
    job = window_job(query, window, valid, pages, fresh, config.beside_splits)
    arrays = [*prepared, codes, scales, middle, *job.arrays]
    shapes = [*scan_shapes(kv_heads, codes.shape[1] // group_size, padded, scan_config), *job.shapes]
    kernel = partial(
        _scan_and_windows_kernel, windows=len(job.arrays), group_size=group_size, scale=scale, scan_config=scan_config, config=config,
        rules=job.rules,
    )  # fmt: skip
    out = pl.pallas_call(
        kernel,
        grid=(kv_heads, config.beside_splits + scan_config.scan_programs),
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(shapes),
        out_shape=shapes,
        input_output_aliases={SCANNED + array: 2 + result for array, result in job.aliases.items()},
        compiler_params=plgpu.CompilerParams(num_warps=scan_config.scan_warps, num_stages=scan_config.scan_stages),
        interpret=interpret,
        name="scan_beside_windows",
    )(*arrays)
    return out[:2], out[2:]
