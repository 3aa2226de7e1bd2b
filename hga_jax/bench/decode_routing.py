"""Decode routing, one layer, under several settings of its kernels: sketches scanned, windows attended to beside, pages selected.

A setting is CHUNKSxPROGRAMSxWARPSxSTAGESxSPLITS: chunks of sketches a scanning program works on at a time, such programs a kv head, their
warps, stages of their loop (sketch_routing.Config), programs for the windows. Sketches, queries and windows are random. Printed:
microseconds of each launch, the bytes of sketches that are read a second, and whether the pages are those of the first setting.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax.bench.decode import CHUNK, GROUP, LOCAL, SHAPES, SINKS, WINDOW_PAGES, environment, kernel_times
from hga_jax.sketches import built_in_rotation
from pallas_kernels.routed_decode_attention import Config as AttentionConfig
from pallas_kernels.sketch_decode import scan_beside_windows
from pallas_kernels.sketch_routing import Config, middle_of, prepare, select

SETTINGS = (
    "4x128x4x3x8", "4x128x4x2x8", "4x128x4x1x8", "4x64x4x3x8", "4x64x4x4x8", "4x64x4x1x8", "2x128x4x3x8", "2x128x4x3x4", "2x128x4x4x4",
    "2x128x4x1x4", "2x64x4x4x8", "2x256x4x3x8", "4x64x8x3x2", "4x64x8x3x8", "4x64x8x1x2", "8x64x8x3x2", "8x64x8x1x2", "2x256x2x3x8",
)  # fmt: skip
LAYERS = 6  # sketches of so many layers in turn, so that none is still in the cache


def parse(setting: str, **fixed: Any) -> tuple[Config, AttentionConfig]:
    """Raises ValueError."""
    try:
        chunks, programs, warps, stages, splits = (int(n) for n in setting.split("x"))
        scan = Config(block_chunks=chunks, scan_programs=programs, scan_warps=warps, scan_stages=stages, **fixed)
        return scan, AttentionConfig(beside_splits=splits)
    except ValueError as error:
        raise ValueError(f"setting {setting!r}: {error}; write CHUNKSxPROGRAMSxWARPSxSTAGESxSPLITS") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench decode_routing", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=65536)
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
    ratio, chunks = heads // kv_heads, options.tokens // CHUNK
    own = jnp.int32(chunks)  # an open chunk after those of the history
    query = jax.random.normal(jax.random.key(0), (kv_heads, ratio, head_dim)).astype(jnp.bfloat16)
    rotation = jnp.asarray(built_in_rotation(head_dim))
    middle = middle_of(own, own, SINKS, LOCAL)
    window = jax.random.normal(jax.random.key(1), (kv_heads, WINDOW_PAGES, 2, GROUP, head_dim)).astype(jnp.bfloat16)
    valid = jnp.full(WINDOW_PAGES, GROUP, jnp.int32)
    stamps = jnp.full((kv_heads, options.tokens // GROUP), -2, jnp.int32)

    def sketches(layer: int) -> tuple[jax.Array, ...]:
        seeds = jax.random.split(jax.random.key(layer), 3)
        means = jax.random.normal(seeds[0], (kv_heads, chunks, head_dim)).astype(jnp.bfloat16)
        codes = jax.random.bits(seeds[1], (kv_heads, options.tokens, head_dim // 4), jnp.uint8)
        return means, codes, (0.3 + jnp.abs(jax.random.normal(seeds[2], (kv_heads, options.tokens)))).astype(jnp.bfloat16)

    layers = [sketches(layer) for layer in range(1 if options.interpret else LAYERS)]
    scanned = sum(x.nbytes for x in layers[0])
    results: list[dict[str, Any]] = []
    expected = None
    for name, config in settings.items():

        def run(query: jax.Array, layers: list, config: tuple[Config, AttentionConfig] = config) -> list:
            how = {"implementation": "pallas", "interpret": options.interpret}
            rules = {"pages_per_chunk": CHUNK // GROUP, "threshold": 0.001 * ratio, "capacity": 1024}
            found = []
            for means, *sketch in layers:
                prepared = prepare(query, rotation, means, middle, **how)
                scores, (windows, _), _ = scan_beside_windows(
                    query, prepared, *sketch, middle, window, valid, scale=head_dim**-0.5, scan_config=config[0], config=config[1], **how
                )
                found.append(select(scores, windows.stats, stamps, middle, config=config[0], **rules, **how).stamps)
            return found

        try:
            program = jax.jit(run)
            pages = [np.asarray(x) for x in program(query, layers)]
            times = {} if options.interpret else kernel_times(lambda program=program: [program(query, layers) for _ in range(4)])
        except Exception as error:  # a setting that does not fit this GPU must not lose the others
            print(f"{name:10s} {type(error).__name__} {str(error)[:150]}", flush=True)
            continue
        expected = pages if expected is None else expected
        result: dict[str, Any] = {
            "setting": name,
            "opened": int((pages[0] >= 0).sum()),
            "same_pages": all(np.array_equal(a, b) for a, b in zip(pages, expected, strict=True)),
        }
        for kernel in ("sketch_prepare", "scan_beside_windows", "sketch_select"):
            result[f"{kernel}_us"] = next((us for found, (_, us) in times.items() if kernel in found), 0.0)
        rate = scanned / result["scan_beside_windows_us"] / 1e3 if times else 0.0
        results.append(result | {"scan_gigabytes_per_second": rate})
        print(
            f"{name:10s} prepare {result['sketch_prepare_us']:6.2f}, scan {result['scan_beside_windows_us']:6.2f} us ({rate:.0f} GB/s), "
            f"select {result['sketch_select_us']:6.2f}; {result['opened']} pages, {'the same' if result['same_pages'] else 'OTHERS'}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), "argv": argv, "results": results}, file, indent=1)
