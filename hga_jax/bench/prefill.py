"""Prefill attention of one layer, summaries and routing included, against cuDNN's dense causal attention, length by length.

Made-up keys and queries with the default policy. Keys of a page share a direction, as they do in trained models; each block of queries
carries the directions of `--pages` pages of its routed middle and leans on the first token, so that the threshold opens those, those of
the block before and little else: `tokens_listed` counts what was opened. Outputs are checked against the XLA twin at the shortest length.
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
from jaxtyping import Array, Float

from hga_jax.attention import HGAAttention
from hga_jax.bench.decode import CHUNK, GROUP, LOCAL, SHAPES, SINKS, WINDOW_PAGES, environment, kernel_times, median_seconds
from hga_jax.blocks import attend, summarise_new
from hga_jax.config import HGAConfig
from hga_jax.policies import policy_for

PARTS = {  # of kernel names, in order of preference, and the part of the work they belong to
    "scan_windows": "window mass",
    "scan_pages": "full scan",
    "scan_requests": "requests among candidates",
    "scan_votes": "votes",
    "probe_mass": "screening",
    "refine_candidates": "refinement",
    "unsketch": "page keys",
    "listed_mass": "statistics",
    "prefill_page_lists": "lists",
    "routed_prefill_attention": "attention",
}


@partial(jax.jit, static_argnames=("tokens", "heads", "kv_heads", "head_dim", "opened"))
def made_up(
    tokens: int, heads: int, kv_heads: int, head_dim: int, opened: int
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Queries, keys and values, bfloat16. Scores: about 12 for the first token, 9.5 for a planted page, 0 +- 1.3 for the rest."""
    seeds = jax.random.split(jax.random.key(0), 6)
    ratio, pages, blocks = heads // kv_heads, tokens // GROUP, tokens // CHUNK
    direction = jax.random.normal(seeds[0], (kv_heads, pages, head_dim))
    keys = 0.7 * direction[:, :, None] + 0.7 * jax.random.normal(seeds[1], (kv_heads, pages, GROUP, head_dim))
    first = jax.random.normal(seeds[2], (kv_heads, head_dim))
    first *= head_dim**0.5 / jnp.linalg.norm(first, axis=-1, keepdims=True)
    keys = keys.at[:, 0, 0].set(3 * first).reshape(kv_heads, tokens, head_dim)
    begin, per_chunk = SINKS * CHUNK // GROUP, CHUNK // GROUP
    end = jnp.maximum(jnp.arange(blocks) - LOCAL, SINKS + 1) * per_chunk
    planted = (begin + jax.random.uniform(seeds[3], (kv_heads, blocks, opened)) * (end - begin)[:, None]).astype(jnp.int32)
    slot = (jnp.arange(CHUNK)[:, None] // 4 * ratio + jnp.arange(ratio)) % opened  # neighbouring queries want the same
    wanted = jax.vmap(lambda direction, page: direction[page])(direction, planted[:, :, slot])  # [K, B, Q, G, H]
    # A score is a dot product over sqrt(H): what 128 dimensions need at these sizes, fewer need a little more of.
    lean = (128 / head_dim) ** 0.5
    query = 0.5 * jax.random.normal(seeds[4], wanted.shape) + lean * (1.2 * wanted + 0.36 * first[:, None, None, None])
    query = query.transpose(1, 2, 0, 3, 4).reshape(tokens, heads, head_dim)
    values = jax.random.normal(seeds[5], (tokens, kv_heads, head_dim))
    return query.astype(jnp.bfloat16), keys.swapaxes(0, 1).astype(jnp.bfloat16), values.astype(jnp.bfloat16)


def hga_program(tokens: int, kv_heads: int, head_dim: int, config: HGAConfig) -> Callable:
    """One layer's prefill as the decoder calls it: keys and values stored, summarised, routed and attended to."""
    backend = HGAAttention(config)

    def prefill(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        out, _, stats = backend.prefill(q, k, v, backend.init_state(tokens, kv_heads, head_dim, q.dtype), jnp.int32(tokens))
        return out, stats

    return jax.jit(prefill)


def block_by_block(tokens: int, kv_heads: int, head_dim: int, config: HGAConfig) -> Callable:
    """The same in plain XLA, block by block; it never screens."""
    backend, scale = HGAAttention(config), head_dim**-0.5
    policy = policy_for(config, None, head_dim, scale)

    def prefill(q: Array, k: Array, v: Array) -> Array:
        state = backend.init_state(tokens, kv_heads, head_dim, q.dtype)
        count = jnp.int32(tokens)
        state = jax.tree.map(lambda x: x, state)
        history = state.history.append(k, v, count)
        state = summarise_new(type(state)(history, state.summaries, state.stamps), jnp.int32(0), tokens, config, policy)
        return attend(q, jnp.int32(0), count, state, config, policy, scale)[0]

    return jax.jit(prefill)


def dense_program(implementation: str) -> Callable:
    """Dense causal attention."""
    return jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation=implementation)[0]
    )


def parts_of(call: Callable[[], Any]) -> tuple[dict[str, float], int]:
    """Milliseconds by part of the work, and launches, of one call."""
    times = kernel_times(call)
    parts: dict[str, float] = {}
    for name, (launches, microseconds) in times.items():
        part = next((part for key, part in PARTS.items() if key in name), "summaries, storing and other XLA")
        parts[part] = parts.get(part, 0.0) + launches * microseconds / 1e3
    return parts, sum(launches for launches, _ in times.values())


def measure(tokens: int, shape: tuple[int, int, int], config: HGAConfig, opened: int, repeats: int, xla_up_to: int) -> dict[str, Any]:
    """Times of one length, milliseconds a layer."""
    heads, kv_heads, head_dim = shape
    arrays = jax.block_until_ready(made_up(tokens, heads, kv_heads, head_dim, opened))
    program = hga_program(tokens, kv_heads, head_dim, config)
    out, stats = jax.block_until_ready(program(*arrays))
    windows = WINDOW_PAGES * GROUP
    blocks = tokens // CHUNK
    fetched = float(stats.fetched_tokens) / blocks
    result: dict[str, Any] = {
        "length": tokens,
        "fetched_tokens": fetched,
        "tokens_listed": max(fetched - windows, 0.0),
        "attended_fraction": float(stats.attended) / tokens,
        "fetched_fraction": float(stats.fetched) / blocks,
        "refused": float(stats.refused),
        "unopened": float(stats.unopened) / tokens,
        "hga_ms": 1e3 * median_seconds(lambda: program(*arrays), repeats),
    }
    result["parts_ms"], result["launches"] = parts_of(lambda: program(*arrays))
    result["attention_tflops"] = 4e-9 * head_dim * heads * tokens * fetched / max(result["parts_ms"].get("attention", 0.0), 1e-9)
    if tokens <= xla_up_to:
        plain = block_by_block(tokens, kv_heads, head_dim, config)
        expected = np.asarray(jax.block_until_ready(plain(*arrays)), np.float32)
        result["xla_ms"] = 1e3 * median_seconds(lambda: plain(*arrays), 1)
        result["difference_from_full_scan"] = float(np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected))
    for implementation in ("cudnn",) if jax.default_backend() == "gpu" else ("xla",):
        try:
            dense = dense_program(implementation)
            jax.block_until_ready(dense(*arrays))
            seconds = median_seconds(lambda dense=dense: dense(*arrays), repeats)
            result |= {"dense": implementation, "dense_ms": 1e3 * seconds}
            result["dense_tflops"] = 2e-12 * head_dim * heads * tokens**2 / seconds
            result["speedup"] = result["dense_ms"] / result["hga_ms"]
        except Exception as error:  # a baseline that this JAX or GPU lacks must not lose the other figures
            print(f"{tokens}: dense {implementation}: {type(error).__name__} {str(error)[:200]}", flush=True)
    return result


def ceiling_tflops(size: int) -> float:
    """bf16 matmul [size, size] x [size, size], as XLA runs it."""
    x = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    return 2e-12 * size**3 / median_seconds(lambda: multiply(x), 5)


def crossover(results: list[dict[str, Any]]) -> int | None:
    """The shortest measured length from which HGA is always the faster."""
    faster = [r["length"] for r in results if r.get("speedup", 0.0) >= 1]
    slower = [r["length"] for r in results if "speedup" in r and r["speedup"] < 1]
    return min((n for n in faster if n > max(slower, default=0)), default=None)


def plot(results: list[dict[str, Any]], title: str, path: str) -> None:
    """Milliseconds against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for key, label in (("dense_ms", "dense"), ("hga_ms", "HGA"), ("xla_ms", "HGA in plain XLA")):
        points = [(r["length"], r[key]) for r in results if key in r]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", base=2, label=label)
    axes.set(xlabel="tokens", ylabel="ms a layer", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def auto_or_int(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench prefill", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072, 262144])
    parser.add_argument("--pages", type=int, default=40, help="pages planted in every block, which its successor sees too: 16 tokens each")
    parser.add_argument("--screening", choices=("on", "off"), default="off")
    parser.add_argument("--request-stride", type=int, default=HGAConfig().request_stride, help="every how manyth query requests pages")
    parser.add_argument("--scan-pairs", type=auto_or_int, default="auto", help="rotary pairs in which tokens are scanned, 0: sketches")
    parser.add_argument("--scan-stride", type=auto_or_int, default="auto", help="every how manyth query scans them")
    parser.add_argument("--votes", type=auto_or_int, default="auto", help="votes that keep a page open, 0: any request does")
    parser.add_argument("--vote-share", type=float, default=HGAConfig().vote_share, help="share of the threshold that makes a vote")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--xla-up-to", type=int, default=0, help="longest length at which the plain XLA path is run too")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--png", help="draw time against length here")
    options = parser.parse_args(argv)
    if bad := [n for n in options.lengths if n % CHUNK or n < 2 * (SINKS + LOCAL) * CHUNK]:
        parser.error(f"--lengths {bad}: multiples of {CHUNK} from {2 * (SINKS + LOCAL) * CHUNK} on")
    shape = SHAPES[options.shape][1:]
    names = ("screening", "request_stride", "scan_pairs", "scan_stride", "votes", "vote_share")
    config = HGAConfig(**{name: getattr(options, name) for name in names})
    ceiling = ceiling_tflops(8192 if jax.default_backend() == "gpu" else 512)
    print(environment(), f"matmul ceiling {ceiling:.3g} TFLOP/s", flush=True)
    report: dict[str, Any] = {"environment": environment(), "shape": options.shape, "argv": argv, "matmul_tflops": ceiling, "results": []}
    for tokens in sorted(options.lengths):
        result = measure(tokens, shape, config, options.pages, options.repeats, options.xla_up_to)
        report["results"].append(result)
        print_result(result)
    report["crossover"] = crossover(report["results"])
    print(f"HGA is faster from {report['crossover']} tokens on", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    if options.png:
        plot(report["results"], f"{options.shape}, one layer, {environment()['device']}", options.png)


def print_result(result: dict[str, Any]) -> None:
    dense = f", dense {result['dense_ms']:8.2f} ms ({result['dense_tflops']:.3g} TFLOP/s)" if "dense_ms" in result else ""
    print(
        f"{result['length']:7d} tokens: HGA {result['hga_ms']:8.2f} ms{dense}, {result.get('speedup', 0):.1f}x; "
        f"fetched {result['fetched_tokens']:.0f} tokens a block ({result['tokens_listed']:.0f} routed), "
        f"attended {result['attended_fraction']:.1%}, {result['launches']} launches",
        flush=True,
    )
    for name, milliseconds in sorted(result["parts_ms"].items(), key=lambda item: -item[1]):
        print(f"    {name:34s} {milliseconds:8.3f} ms", flush=True)
