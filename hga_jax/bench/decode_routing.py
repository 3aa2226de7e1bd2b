"""Attention of one decoded token, sketch policy, history on the device, under several settings of its three launches.

A setting is SCAN/READ. SCAN: CHUNKSxPROGRAMSxWARPSxSTAGESxSPLITS, chunks of sketches that a scanning program works on at a time, such
programs a kv head, their warps, stages of their loop, programs a kv head for the windows beside them. READ: PAGESxWARPS, pages that a
selecting program reads at once, its warps; PAGESxWARPSxlaunch: with the partial results merged by a launch after it. Sketches, pages, query
and windows are random; pages that earlier requests keep open make up the number asked for. Printed: microseconds of each launch, the bytes
of sketches read a second, and whether pages and outputs are those of the first setting.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax.bench.decode import CHUNK, GROUP, LOCAL, SHAPES, SINKS, WINDOW_PAGES, environment, kernel_times
from hga_jax.config import HGAConfig
from hga_jax.sketches import built_in_rotation
from pallas_kernels.routed_decode_attention import Config as AttentionConfig
from pallas_kernels.sketch_decode import attend_selected, scan_beside_windows
from pallas_kernels.sketch_routing import Config as ScanConfig
from pallas_kernels.sketch_routing import middle_of, prepare
from pallas_kernels.votes import NEVER, stamp_of

SCANS = (
    "2x128x4x3x4", "2x128x4x3x8", "2x128x4x3x16", "2x128x4x3x32", "2x128x4x4x16", "2x128x4x1x16", "4x128x4x3x16", "4x128x4x1x16",
    "4x64x4x3x16", "2x64x4x4x16", "2x256x4x3x16", "4x64x8x3x16", "8x64x8x1x16", "1x128x2x3x16", "2x256x2x3x16",
)  # fmt: skip
READS = ("4x8", "4x8xlaunch", "4x4", "2x8", "2x4", "2x4xlaunch", "1x4", "8x8")
SETTINGS = (*(f"{scan}/{READS[0]}" for scan in SCANS), *(f"{SCANS[0]}/{read}" for read in READS[1:]))
LAUNCHES = ("sketch_prepare", "sketch_scan_beside_windows", "attend_selected", "merge_attention")
LAYERS = 12  # so many layers in turn, so that nothing of one is still in the cache


def parse(setting: str, **fixed: Any) -> tuple[ScanConfig, AttentionConfig]:
    """Raises ValueError."""
    try:
        scan, read = (part.split("x", 4) for part in setting.split("/"))
        chunks, programs, warps, stages, splits = (int(n) for n in scan)
        pages, reading_warps, *launch = read
        if launch not in ([], ["launch"]):
            raise ValueError("what follows the warps can only be launch")
        return (
            ScanConfig(block_chunks=chunks, scan_programs=programs, scan_warps=warps, scan_stages=stages, **fixed),
            AttentionConfig(
                beside_splits=splits, selected_tile_pages=int(pages), selected_warps=int(reading_warps), merge_in_launch=not launch
            ),
        )
    except ValueError as error:
        raise ValueError(f"setting {setting!r}: {error}; write one like {SETTINGS[0]}") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench decode_routing", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--routed", type=int, default=1200, help="tokens a kv head in pages that are open")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter, without times")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    fixed = {"unpack": "arithmetic"} if options.interpret else {}
    try:
        settings = {name: parse(name, **fixed) for name in options.settings}
    except ValueError as error:
        parser.error(str(error))
    print(environment(), flush=True)

    heads, kv_heads, head_dim = SHAPES[options.shape][1:]
    ratio, chunks, pages = heads // kv_heads, options.tokens // CHUNK, options.tokens // GROUP
    hga = HGAConfig()
    votes = hga.votes_for(ratio)
    query = jax.random.normal(jax.random.key(0), (kv_heads, ratio, head_dim)).astype(jnp.bfloat16)
    rotation = jnp.asarray(built_in_rotation(head_dim))
    middle = middle_of(jnp.int32(chunks), jnp.int32(chunks), SINKS, LOCAL)  # the open chunk comes after those of the history
    valid = jnp.full(WINDOW_PAGES, GROUP, jnp.int32)

    @jax.jit
    def layer(seed: int) -> tuple[jax.Array, ...]:
        seeds = jax.random.split(jax.random.key(seed + 2), 5)
        means = jax.random.normal(seeds[0], (kv_heads, chunks, head_dim)).astype(jnp.bfloat16)
        codes = jax.random.bits(seeds[1], (kv_heads, options.tokens, head_dim // 4), jnp.uint8)
        scales = (0.3 + jnp.abs(jax.random.normal(seeds[2], (kv_heads, options.tokens)))).astype(jnp.bfloat16)
        open_to_it = jax.random.uniform(seeds[3], (kv_heads, pages)) < options.routed / options.tokens
        store = jax.random.normal(seeds[4], (kv_heads, pages, 2, GROUP, head_dim), jnp.bfloat16)
        return means, codes, scales, jnp.where(open_to_it, stamp_of(chunks, True, 0, votes), NEVER), store, store[:, :WINDOW_PAGES]

    layers = [layer(seed) for seed in range(1 if options.interpret else LAYERS)]
    scanned = sum(x.nbytes for x in layers[0][:3])
    rules = {"pages_per_chunk": CHUNK // GROUP, "threshold": hga.threshold_for(ratio), "capacity": min(hga.page_capacity, pages)}
    rules |= {"votes": votes, "vote_share": hga.vote_share}
    how = {"implementation": "pallas", "interpret": options.interpret}

    @partial(jax.jit, static_argnames=("scan_config", "config"))
    def run(query: jax.Array, layer: tuple, scan_config: ScanConfig, config: AttentionConfig) -> tuple[jax.Array, ...]:
        means, codes, scales, stamps, store, window = layer
        settled = how | {"scale": head_dim**-0.5, "scan_config": scan_config, "config": config}
        prepared = prepare(query, rotation, means, middle, **how)
        scores = scan_beside_windows(query, prepared, codes, scales, middle, window, valid, **settled)
        return attend_selected(query, scores, stamps, middle, store, **rules, **settled)[:3]

    def compiled(setting: tuple[ScanConfig, AttentionConfig]) -> Any:
        return run.lower(query, layers[0], *setting).compile()

    with ThreadPoolExecutor(8) as pool:
        programs = {name: pool.submit(compiled, setting) for name, setting in settings.items()}
    results: list[dict[str, Any]] = []
    expected = None
    for name, waiting in programs.items():
        try:
            program = waiting.result()
            outs, stamps, counts = (
                np.stack([np.asarray(x, np.float32) for x in each]) for each in zip(*(program(query, x) for x in layers), strict=True)
            )
            times = {} if options.interpret else kernel_times(lambda program=program: [program(query, x) for x in layers * 3])
        except Exception as error:  # a setting that does not fit this GPU must not lose the others
            print(f"{name:20s} {type(error).__name__} {str(error)[:150]}", flush=True)
            continue
        expected = (outs, stamps) if expected is None else expected
        same = np.array_equal(stamps, expected[1]) and np.allclose(outs, expected[0], atol=1e-2)
        result: dict[str, Any] = {"setting": name, "visible": float(counts[..., 0].sum()) / (len(layers) * kv_heads), "same": bool(same)}
        for launch in LAUNCHES:
            result[f"{launch}_us"] = next((us for kernel, (_, us) in times.items() if launch in kernel), 0.0)
        result["scan_gigabytes_per_second"] = scanned / result["sketch_scan_beside_windows_us"] / 1e3 if times else 0.0
        results.append(result)
        print(
            f"{name:20s} {', '.join(f'{launch} {result[f"{launch}_us"]:6.2f}' for launch in LAUNCHES)} us; "
            f"scan {result['scan_gigabytes_per_second']:.0f} GB/s; {result['visible']:.1f} pages, {'the same' if same else 'OTHERS'}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), "argv": argv, "results": results}, file, indent=1)
