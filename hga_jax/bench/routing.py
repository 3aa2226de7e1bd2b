"""The full scan of prefill routing, one layer, under several settings of its kernels: which is the fastest, and do they agree?

Tokens are scanned as their sketches or, with `--scan-pairs`, in some rotary pairs. A setting is PAGESxWARPSxSTAGES of a program's steps,
with `:ROWS` behind it for another number of rows a program. Keys and queries as in `python -m hga_jax.bench prefill`. Printed:
milliseconds of the launches, the rate of the second, pages scored twice in a program (row tile of a block), and requests that differ
from the first setting's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hga_jax.bench.decode import CHUNK, GROUP, LOCAL, SHAPES, SINKS, environment, kernel_times, median_seconds
from hga_jax.bench.prefill import made_up
from hga_jax.cache import DeviceHistory
from hga_jax.config import HGAConfig
from hga_jax.policies import policy_for
from hga_jax.sketches import built_in_rotation
from pallas_kernels.sketch_prefill_routing import Config, Rule, Tile
from pallas_kernels.sketch_prefill_routing.api import some_rows
from pallas_kernels.sketch_prefill_routing.keys import page_keys
from pallas_kernels.sketch_prefill_routing.pairs import choose_pairs, pair_keys, pair_queries, query_energy
from pallas_kernels.sketch_prefill_routing.scan import mark, settle, votes

SETTINGS = ("64x8x3", "64x8x4", "32x8x3", "128x8x3", "64x16x3:256")


def parse(setting: str) -> Config:
    """Raises ValueError."""
    try:
        tile, *rows = setting.split(":")
        pages, warps, stages = (int(n) for n in tile.split("x"))
        return Config(tokens=Tile(pages, warps, stages), **({"rows": int(rows[0])} if rows else {}))
    except ValueError as error:
        raise ValueError(f"setting {setting!r}: {error}; write PAGESxWARPSxSTAGES, then :ROWS") from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench routing", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--pages", type=int, default=40, help="pages planted in every block")
    parser.add_argument("--scan-pairs", type=int, default=0, help="rotary pairs in which tokens are scanned, 0: sketches")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--candidates", type=int, default=Config().candidates, help="room of a program for pages scored twice")
    parser.add_argument("--votes", type=int, help="votes that keep a page open, counted too; 0: any request does (default: as HGAConfig)")
    parser.add_argument("--vote-share", type=float, default=HGAConfig().vote_share, help="share of the threshold that makes a vote")
    parser.add_argument("--vote-stride", type=int, default=HGAConfig().vote_stride, help="every how manyth query votes")
    parser.add_argument("--interpret", action="store_true", help="in Pallas' interpreter, without times")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    try:
        settings = {name: parse(name) for name in options.settings}
    except ValueError as error:
        parser.error(str(error))
    heads, kv_heads, head_dim = SHAPES[options.shape][1:]
    print(environment(), flush=True)

    query, keys, values = made_up(options.tokens, heads, kv_heads, head_dim, options.pages)
    needed = HGAConfig().votes_for(heads // kv_heads) if options.votes is None else options.votes
    config = HGAConfig(scan_pairs=options.scan_pairs, votes=needed)
    pages = DeviceHistory.holding(keys, values, GROUP, options.tokens).pages
    operands = (pairs_of if options.scan_pairs else sketches_of)(query, keys, pages, config, options)
    voting = {"votes": needed, "vote_share": options.vote_share, "vote_stride": options.vote_stride}
    rule = Rule(CHUNK, GROUP, SINKS, LOCAL, head_dim**-0.5, **voting)
    results: list[dict[str, Any]] = []
    expected = None
    for name, kernels in settings.items():
        try:
            result, first = measure(query, pages, operands, rule, config, kernels, options)
        except Exception as error:  # a setting that does not fit this GPU must not lose the others
            print(f"{name:18s} {type(error).__name__} {str(error)[:150]}", flush=True)
            continue
        expected = first if expected is None else expected
        asked = expected < CHUNK
        result |= {"setting": name, "requests": int(asked.sum()), "requests_changed": int((asked != (first < CHUNK)).sum())}
        results.append(result)
        print(
            f"{name:18s} windows {result['windows_ms']:6.2f}, pages {result['pages_ms']:6.2f} ({result['tera_operations']:5.0f} TOP/s), "
            f"requests {result['requests_ms']:6.2f}, votes {result['votes_ms']:6.2f} ms; "
            f"scored twice {result['candidates_mean']:.1f} (most {result['candidates_most']}, "
            f"{result['overflows']} of {result['programs']} without room); "
            f"requests changed {result['requests_changed']} of {result['requests']}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"environment": environment(), "argv": argv, "results": results}, file, indent=1)


def sketches_of(query: jax.Array, keys: jax.Array, pages: jax.Array, config: HGAConfig, options: argparse.Namespace) -> tuple[jax.Array]:
    """What queries are compared with: all tokens as sketches remember them."""
    head_dim = query.shape[2]
    keys = keys.swapaxes(0, 1)
    sketches = jax.jit(policy_for(config, None, head_dim, head_dim**-0.5).summarise)(keys, keys[:, : config.sink_chunks * CHUNK])
    arrays = [x if x.dtype == jnp.uint8 else x.astype(keys.dtype) for x in (sketches.means, sketches.codes, sketches.scales)]
    rotation, closed = jnp.asarray(built_in_rotation(head_dim), jnp.float32), jnp.int32(options.tokens // CHUNK)
    return (page_keys(*arrays, rotation, GROUP, closed, implementation="pallas", interpret=options.interpret).tokens,)


def pairs_of(query: jax.Array, keys: jax.Array, pages: jax.Array, config: HGAConfig, options: argparse.Namespace) -> tuple[jax.Array, ...]:
    """The same by rotary pairs: tokens' deviations, the queries' coordinates, page means."""

    @jax.jit
    def make(query: jax.Array, pages: jax.Array) -> tuple[jax.Array, ...]:
        energy = query_energy(query, len(pages), jnp.int32(0), jnp.int32(len(query)), config.unrouted)
        ratio, scale = query.shape[1] // len(pages), query.shape[2] ** -0.5
        found = pair_keys(pages, choose_pairs(energy, pages, config.unrouted // GROUP, config.scan_pairs, ratio, scale))
        return found.tokens, pair_queries(query, found, scale), found.means

    return make(query, pages)


def measure(
    query: jax.Array,
    pages: jax.Array,
    operands: tuple[jax.Array, ...],
    rule: Rule,
    config: HGAConfig,
    kernels: Config,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one setting, and the first rows that ask for pages [K, B, P] (chunk_size for none, and outside the routed middle)."""
    tokens, heads, head_dim = query.shape
    threshold = config.threshold_for(heads // len(pages))
    keys, *few = operands
    width = keys.shape[3]
    if few:
        threshold *= config.pairs_threshold_for(options.scan_pairs, head_dim)
        width += head_dim / GROUP
    bounds = jnp.array([0, tokens], jnp.int32)
    kernels = Config(**{**vars(kernels), "candidates": options.candidates})
    common = {"threshold": threshold, "rule": rule, "config": kernels, "interpret": options.interpret}
    marking = jax.jit(lambda q, b, p, k, *few: mark(q, b, p, k, *few, **common))
    settling = jax.jit(lambda q, b, k, mass, marks, *few: settle(q, b, k, mass, marks, *few, **common))

    def scan() -> tuple[jax.Array, jax.Array]:
        _, mass, marks = marking(query, bounds, pages, keys, *few)
        if rule.votes:
            jax.block_until_ready(counting(query, bounds, keys, mass, *few))
        return marks, settling(query, bounds, keys, mass, marks, *few)

    @jax.jit
    def counting(q: jax.Array, b: jax.Array, k: jax.Array, mass: jax.Array, *few: jax.Array) -> jax.Array:
        voters = dataclasses.replace(rule, stride=rule.vote_stride)
        settled = common | {"threshold": threshold * rule.vote_share, "rule": voters}
        return votes(q, b, k, some_rows(mass, rule, rule.vote_stride), *few, **settled)

    blocks = tokens // CHUNK
    page, first = np.arange(tokens // GROUP), SINKS * CHUNK // GROUP
    there = (page >= first) & (page < (np.arange(blocks)[:, None] - LOCAL) * (CHUNK // GROUP))  # [B, P]
    marks, rows = (np.asarray(x)[:, :blocks] for x in jax.block_until_ready(scan()))
    near = ((marks < CHUNK) & there[:, None]).sum(-1)[:, SINKS + LOCAL + 1 :]
    times = {} if options.interpret else kernel_times(lambda: [scan() for _ in range(2)])
    parts = {
        f"{name}_ms": sum(us for kernel, (_, us) in times.items() if f"scan_{name}" in kernel) / 1e3
        for name in ("windows", "pages", "requests", "votes")
    }
    operations = 2 * heads * CHUNK * width * int(there.sum()) * GROUP
    result = {
        **parts,
        "total_ms": 0.0 if options.interpret else 1e3 * median_seconds(scan, 3),
        "tera_operations": operations / parts["pages_ms"] / 1e9 if parts["pages_ms"] else 0.0,
        "candidates_mean": float(near.mean()),
        "candidates_most": int(near.max()),
        "overflows": int((near > options.candidates).sum()),
        "programs": near.size,
    }
    return result, np.where(there, rows.min(2), CHUNK)
