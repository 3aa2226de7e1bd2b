"""Attention of one layer in training: forward, and forward with gradients of q, k and v, against cuDNN's dense causal attention.

The queries and keys of `bench prefill`, whose routing opens about what the default policy opens on text. At the shortest length the
gradients are compared with those that XLA computes chunk by chunk from the same selection.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from hga_jax.attention import hga_attention
from hga_jax.bench.decode import CHUNK, LOCAL, SHAPES, SINKS, environment, median_seconds
from hga_jax.bench.prefill import made_up
from hga_jax.config import HGAConfig


def programs(attention: Callable[..., Array]) -> dict[str, Callable]:
    """Forward, and forward with gradients, of one sequence with outputs' gradient d_out."""

    def step(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    return {"forward": jax.jit(lambda q, k, v, d_out: attention(q, k, v)), "step": jax.jit(step)}


def measure(tokens: int, shape: tuple[int, int, int], config: HGAConfig, opened: int, repeats: int, check: bool) -> dict[str, Any]:
    """Milliseconds of one length; `check` adds the gradients' relative difference from XLA's."""
    arrays = tuple(x[None] for x in made_up(tokens, *shape, opened))
    arrays += (jax.random.normal(jax.random.key(1), arrays[0].shape, arrays[0].dtype),)
    routed = partial(hga_attention, config=config)
    stats = jax.jit(partial(routed, return_stats=True))(*arrays[:3])[1].totals
    result: dict[str, Any] = {"length": tokens, "fetched_tokens": float(stats.fetched_tokens[0] / stats.blocks[0])}
    dense = "cudnn" if jax.default_backend() == "gpu" else "xla"
    contestants = {"hga": routed, "dense": partial(jax.nn.dot_product_attention, is_causal=True, implementation=dense)}
    for name, attention in contestants.items():
        for kind, program in programs(attention).items():
            jax.block_until_ready(program(*arrays))
            result[f"{name}_{kind}_ms"] = 1e3 * median_seconds(lambda program=program: program(*arrays), repeats)
    if check:  # every query routes: the comparison is one of gradients, not of selections
        routed = partial(hga_attention, config=config)
        outputs, expected = (programs(partial(routed, implementation=name))["step"](*arrays) for name in (None, "xla"))
        pairs = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in zip(outputs, expected, strict=True)]
        differences = [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]
        result["difference_from_xla"] = dict(zip(("out", "d_query", "d_key", "d_value"), differences, strict=True))
    for kind in ("forward", "step"):
        result[f"{kind}_speedup"] = result[f"dense_{kind}_ms"] / result[f"hga_{kind}_ms"]
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench train", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[12288, 32768])
    parser.add_argument("--pages", type=int, default=40, help="pages planted in every block, which its successor sees too: 16 tokens each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison of the gradients with XLA's")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    if bad := [n for n in options.lengths if n % CHUNK or n < 2 * (SINKS + LOCAL) * CHUNK]:
        parser.error(f"--lengths {bad}: multiples of {CHUNK} from {2 * (SINKS + LOCAL) * CHUNK} on")
    config, lengths = HGAConfig(), sorted(options.lengths)
    print(environment(), flush=True)
    report: dict[str, Any] = {"environment": environment(), "shape": options.shape, "argv": argv, "results": []}
    for tokens in lengths:
        result = measure(
            tokens, SHAPES[options.shape][1:], config, options.pages, options.repeats, tokens == lengths[0] and not options.no_check
        )
        report["results"].append(result)
        print(
            f"{tokens:7d} tokens, {result['fetched_tokens']:.0f} fetched a block: forward HGA {result['hga_forward_ms']:.2f} ms, dense "
            f"{result['dense_forward_ms']:.2f} ms ({result['forward_speedup']:.2f}x); with gradients HGA {result['hga_step_ms']:.2f} ms, "
            f"dense {result['dense_step_ms']:.2f} ms ({result['step_speedup']:.2f}x)",
            flush=True,
        )
        if "difference_from_xla" in result:
            print("    relative difference from XLA:", ", ".join(f"{k} {v:.1e}" for k, v in result["difference_from_xla"].items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
