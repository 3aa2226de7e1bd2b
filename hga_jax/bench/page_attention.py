"""Attention of prefill over given page lists, alone: settings of the kernel, and a training step's forward and backward, against cuDNN.

Lists are random pages of the routed middle, the same number for every block that has so many; a fifth of them is seen from a later row of
the block on. TFLOP/s count 4 * H operations a query row and listed token (2.5 times that for the backward pass), masked or not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hga_jax.bench.decode import CHUNK, GROUP, LOCAL, SHAPES, SINKS, environment, median_seconds
from pallas_kernels.routed_prefill_attention import Config, routed_prefill_attention

IN_A_ROW = 4  # calls between two looks at the clock: a launch from Python costs as much as a short kernel


def settings(text: str) -> Config:
    """128x64x4x2 as rows, keys, warps, stages."""
    return Config(*(int(part) for part in text.split("x")))


def random_lists(
    blocks: int, kv_heads: int, lists: int, listed: int
) -> tuple[Int[Array, "K B R M"], Int[Array, "K B R M"], Int[Array, "K B R"]]:
    """(page_ids, since, counts)."""
    rng = np.random.default_rng(0)
    shape, first = (kv_heads, blocks, lists, max(listed, 1)), SINKS * CHUNK // GROUP
    middle = np.maximum(np.arange(blocks) - LOCAL - SINKS, 0) * (CHUNK // GROUP)
    # Evenly spaced with a random start: no page twice.
    place = (np.arange(shape[-1]) / shape[-1] + rng.random(shape)) % 1.0
    pages = first + np.floor(place * middle[:, None, None]).astype(np.int32)
    since = np.where(rng.random(shape) < 0.2, rng.integers(1, CHUNK, shape), 0).astype(np.int32)
    counts = np.broadcast_to(np.minimum(listed, middle)[:, None], shape[:3]).astype(np.int32)
    return jnp.asarray(pages), jnp.asarray(since), jnp.asarray(counts)


def listed_tokens(counts: Int[Array, "K B R"]) -> float:
    """Tokens a block and list, windows included, averaged over blocks."""
    own = np.arange(counts.shape[1])
    local = np.maximum(own - LOCAL, 0)
    windows = (np.minimum(SINKS, local) + own - local + 1) * CHUNK
    return float((windows + np.asarray(counts).mean((0, 2)) * GROUP).mean())


def seconds_a_call(call: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(call())  # compiles
    return median_seconds(lambda: [call() for _ in range(IN_A_ROW)], repeats) / IN_A_ROW


def step(attention: Callable, inputs: tuple[Array, ...], d_out: Float[Array, "*T N H"]) -> Callable[[], Any]:
    """A call of the forward and backward passes."""

    def both(inputs: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
        out, backward = jax.vjp(attention, *inputs)
        return out, backward(d_out)

    program = jax.jit(both)
    return lambda: program(inputs, d_out)


def measure(tokens: int, shape: tuple[int, int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one length; a setting that the device refuses leaves its error in the row."""
    heads, kv_heads, head_dim = shape
    seeds = jax.random.split(jax.random.key(0), 4)
    lists = random_lists(tokens // CHUNK, kv_heads, heads // kv_heads if options.per_head else 1, options.pages)
    query = jax.random.normal(seeds[0], (tokens, heads, head_dim), jnp.bfloat16)
    pages = jax.random.normal(seeds[1], (kv_heads, tokens // GROUP, 2, GROUP, head_dim), jnp.bfloat16)
    d_out = jax.random.normal(seeds[2], query.shape, jnp.bfloat16)
    operations = 4 * head_dim * heads * tokens * listed_tokens(lists[2])

    def attention(config: Config | None, backward: Config | None, query: Array, pages: Array, *lists: Array) -> Array:
        return routed_prefill_attention(
            query, pages, jnp.int32(0), jnp.int32(tokens), *lists, chunk_size=CHUNK, sink_chunks=SINKS, local_chunks=LOCAL,
            scale=head_dim**-0.5, implementation=options.implementation, config=config, backward_config=backward,
        )[0]  # fmt: skip

    rows = []

    def add(kind: str, name: str, call: Callable[[], Any], operations: float) -> None:
        row: dict[str, Any] = {"length": tokens, "tokens": listed_tokens(lists[2]), "kind": kind, "settings": name}
        try:
            seconds = seconds_a_call(call, options.repeats)
            row |= {"ms": 1e3 * seconds, "tflops": 1e-12 * operations / seconds}
        except Exception as error:  # one setting that does not fit must not lose the other figures
            row["error"] = f"{type(error).__name__} {str(error)[:200]}"
        rows.append(row)
        print(" ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)

    for name in options.configs or [None]:
        program = jax.jit(partial(attention, settings(name) if name else None, None))
        add("forward", name or "default", partial(program, query, pages, *lists), operations)
    for name in options.gradients if options.gradients is not None else []:
        chosen = None if name == "default" else settings(name)
        call = step(lambda q, p, chosen=chosen: attention(None, chosen, q, p, *lists), (query, pages), d_out)
        add("forward and backward", name, call, 3.5 * operations)
    dense = options.dense or ("cudnn" if jax.default_backend() == "gpu" else "xla")
    if dense != "none":
        key, value = (jax.random.normal(seed, (tokens, kv_heads, head_dim), jnp.bfloat16) for seed in seeds[2:])
        full = partial(jax.nn.dot_product_attention, is_causal=True, implementation=dense)
        program = jax.jit(full)
        inputs = (query[None], key[None], value[None])
        add("forward", f"dense {dense}", partial(program, *inputs), 2 * head_dim * heads * tokens**2)
        if options.gradients is not None:
            add("forward and backward", f"dense {dense}", step(full, inputs, d_out[None]), 7 * head_dim * heads * tokens**2)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench page_attention", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--pages", type=int, default=81, help="pages listed for a block (81: about 2,000 tokens with the windows)")
    parser.add_argument("--per-head", action="store_true", help="a list for every query head, as the paper policy makes them")
    parser.add_argument("--configs", nargs="+", metavar="ROWSxKEYSxWARPSxSTAGES", help="settings of the forward kernel (the default one)")
    parser.add_argument("--gradients", nargs="*", metavar="ROWSxKEYSxWARPSxSTAGES", help="also forward and backward: settings, or default")
    parser.add_argument("--implementation", choices=("pallas", "xla"), default="pallas" if jax.default_backend() == "gpu" else "xla")
    parser.add_argument("--dense", choices=("cudnn", "xla", "none"), help="what to compare with")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    if bad := [n for n in options.lengths if n % CHUNK or n <= 0]:
        parser.error(f"--lengths {bad}: multiples of {CHUNK}")
    if options.gradients == []:
        options.gradients = ["default"]
    print(environment(), flush=True)
    report = {
        "environment": environment(),
        "argv": argv,
        "results": [row for n in options.lengths for row in measure(n, SHAPES[options.shape][1:], options)],
    }
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
