"""The FP8 weight kernels beside their ceilings: expert MLP in decode and prefill, decode matvecs, output head.

Weights are random e4m3 values with random block scales, of as many layers as keep them out of the caches. Every timed program is checked
first against float32 arithmetic on the dequantised weights. Decode programs run their layers many times inside one compiled loop, so that
the time of dispatching from the host stays out of the number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hga_jax.quantized import BlockScaled, dequantize
from pallas_kernels import fp8_matvec, moe_decode, moe_prefill
from pallas_kernels.moe_prefill.kernel import matmuls, operand_of

WIDTH, SIZE, EXPERTS, CHOICES = 2048, 768, 128, 8  # Qwen3-30B-A3B: D, F, experts, experts a token
PROJECTIONS = {"qkv": (5120, 2048), "o": (2048, 4096), "k": (512, 2048)}
VOCABULARY = 151936
ROUNDS = 10


def seconds(program: Callable, *arguments: Any, steps: int = 1, repeats: int = 7) -> float:
    """Median over repeats after warm-up, divided by the steps a call makes.

    A repeat queues enough calls for about 40 ms and waits once: waiting for each costs 0.3 to 2 ms on a virtual machine, which is no
    kernel's time.
    """
    jax.block_until_ready(program(*arguments))

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = program(*arguments)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    calls = max(1, min(100, round(0.04 / run(3))))
    return statistics.median(run(calls) for _ in range(repeats)) / steps


@partial(jax.jit, static_argnums=1)
def random_weight(key: Any, shape: tuple[int, ...]) -> BlockScaled:
    """Every finite e4m3 code below 32, scales that give outputs about the size of the inputs."""
    codes, scales = jax.random.split(key)
    code = jax.random.bits(codes, shape, jnp.uint8)
    code = jnp.where((code & 0x7F) >= 0x68, code & 0xBF, code)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = jax.random.uniform(scales, blocks, jnp.float32, 0.5, 2) / 10 / shape[-1] ** 0.5
    return BlockScaled(lax.bitcast_convert_type(code, jnp.float8_e4m3fn), scale)


def error(out: Any, expected: Any) -> float:
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))


def must_match(name: str, found: float, limit: float) -> float:
    if not found <= limit:
        raise SystemExit(f"{name}: relative error {found:.1e} against float32 exceeds {limit:.1e}; its time means nothing")
    return found


@jax.jit
def reference(x: Any, ids: Any, weights: Any, gate: BlockScaled, up: BlockScaled, down: BlockScaled) -> Any:
    """Float32 throughout, one (token, expert) pair at a time."""

    def pair(item: Any) -> Any:
        vector, expert, weight = item
        wide = [dequantize(matrix[expert], jnp.float32) for matrix in (gate, up, down)]
        dot = partial(jnp.matmul, precision="highest")
        return weight * dot(wide[2], jax.nn.silu(dot(wide[0], vector)) * dot(wide[1], vector))

    tokens, choices = ids.shape
    items = (jnp.repeat(x.astype(jnp.float32), choices, axis=0), ids.reshape(-1), weights.reshape(-1))
    return lax.map(pair, items).reshape(tokens, choices, -1).sum(1)


def ceilings(keys: Any) -> dict[str, float]:
    """Read rate of device memory (a row maximum over 4 GiB) and bfloat16 matmul rate (8192 cubed, random)."""
    big = jax.random.bits(next(keys), (2**17, 2**13), jnp.uint32)
    read = big.nbytes / seconds(jax.jit(lambda a: a.max(1)), big)
    del big
    a, b = (jax.random.normal(next(keys), (8192, 8192), jnp.bfloat16) for _ in range(2))
    return {"read_gb_s": read / 1e9, "bf16_tflop_s": 2 * 8192**3 / seconds(jax.jit(jnp.matmul), a, b) / 1e12}


def kernel_mlp(x: Any, ids: Any, weights: Any, layer: tuple[BlockScaled, ...]) -> Any:
    run = moe_decode.expert_mlp if x.shape[0] <= 4 else moe_prefill.expert_mlp
    return run(x, ids, weights, tuple(m.values for m in layer), tuple(m.scales for m in layer))


def bench_decode(keys: Any, ceiling: dict[str, float], layers: int) -> list[dict]:
    stack = [tuple(random_weight(next(keys), (EXPERTS, *s)) for s in ((SIZE, WIDTH), (SIZE, WIDTH), (WIDTH, SIZE))) for _ in range(layers)]
    rows = []
    for tokens in (1, 2, 4):
        draw = [jnp.stack([jax.random.permutation(next(keys), EXPERTS)[:CHOICES] for _ in range(tokens)]) for _ in range(layers)]
        weights = jax.random.uniform(next(keys), (tokens, CHOICES), jnp.float32, 0.5, 1)
        x = jax.random.normal(next(keys), (tokens, WIDTH), jnp.bfloat16)
        off = error(kernel_mlp(x, draw[0], weights, stack[0]), reference(x, draw[0], weights, *stack[0]))
        must_match("moe_decode", off, 4e-3)  # the result is rounded to bfloat16

        @jax.jit
        def program(x: Any, stack: Any, draw: Any, weights: Any) -> Any:
            def round_(_: Any, x: Any) -> Any:
                for layer, ids in zip(stack, draw, strict=True):
                    x = kernel_mlp(x, ids, weights, layer)
                return x

            return lax.fori_loop(0, ROUNDS, round_, x)

        read = statistics.mean(len(np.unique(np.asarray(ids))) for ids in draw) * 3 * SIZE * WIDTH
        took = seconds(program, x, stack, draw, weights, steps=layers * ROUNDS)
        rows.append(memory_row("moe decode", f"T={tokens}", took, read, ceiling, off))
    return rows


def bench_matvec(keys: Any, ceiling: dict[str, float]) -> list[dict]:
    rows = []
    for name, (outputs, inputs) in PROJECTIONS.items():
        stack = [random_weight(next(keys), (outputs, inputs)) for _ in range(16)]
        for tokens in (1, 4):
            x = jax.random.normal(next(keys), (tokens, inputs), jnp.bfloat16)
            out = fp8_matvec.matvec(x, stack[0].values, stack[0].scales, out_dtype=jnp.float32)
            expected = jnp.einsum("ti,oi->to", x.astype(jnp.float32), dequantize(stack[0], jnp.float32), precision="highest")
            off = must_match("fp8_matvec", error(out, expected), 1e-5)

            @jax.jit
            def program(x: Any, stack: Any) -> Any:
                def round_(_: Any, x: Any) -> Any:
                    ends = [fp8_matvec.matvec(x, w.values, w.scales)[0, 0] for w in stack]
                    return x + sum(ends) * jnp.bfloat16(1e-6)  # keeps each round's products from being computed once for all

                return lax.fori_loop(0, ROUNDS, round_, x)

            took = seconds(program, x, stack, steps=len(stack) * ROUNDS)
            rows.append(memory_row(f"matvec {name} fp8", f"T={tokens} [{outputs}, {inputs}]", took, outputs * inputs, ceiling, off))
    head = jax.random.normal(next(keys), (VOCABULARY, WIDTH), jnp.bfloat16)
    x = jax.random.normal(next(keys), (1, WIDTH), jnp.bfloat16)
    program = jax.jit(partial(fp8_matvec.matvec, out_dtype=jnp.float32))
    expected = jnp.einsum("ti,oi->to", x, head, preferred_element_type=jnp.float32)
    off = must_match("lm_head", error(program(x, head), expected), 1e-4)
    rows.append(memory_row("lm_head bf16", f"T=1 [{VOCABULARY}, {WIDTH}]", seconds(program, x, head), head.nbytes, ceiling, off))
    return rows


def bench_prefill(keys: Any, ceiling: dict[str, float], lengths: list[int]) -> list[dict]:
    layer = tuple(random_weight(next(keys), (EXPERTS, *shape)) for shape in ((SIZE, WIDTH), (SIZE, WIDTH), (WIDTH, SIZE)))
    program = jax.jit(kernel_mlp)
    rows = []
    for tokens in lengths:
        x = jax.random.normal(next(keys), (tokens, WIDTH), jnp.bfloat16)
        popular = jax.random.normal(next(keys), (1, EXPERTS)) / 2  # experts differ in load, as trained routers' do
        ids = lax.top_k(jax.random.normal(next(keys), (tokens, EXPERTS)) + popular, CHOICES)[1]
        weights = jax.random.uniform(next(keys), (tokens, CHOICES), jnp.float32, 0.05, 0.2)
        some = np.linspace(0, tokens - 1, 32).astype(int)
        off = error(program(x, ids, weights, layer)[some], reference(x[some], ids[some], weights[some], *layer))
        must_match("moe_prefill", off, 6e-3)  # 16-bit weights, hidden vector, expert outputs and result
        cases = {"moe prefill": seconds(program, x, ids, weights, layer, repeats=5)}
        if tokens <= moe_prefill.measured().tokens_per_pass:
            cases["its matmuls"] = seconds(*grouped_matmuls(x, ids, weights, layer), repeats=5)
        for what, took in cases.items():
            rate = 6 * tokens * CHOICES * SIZE * WIDTH / took / 1e12
            rows.append(
                {
                    "what": what,
                    "case": f"T={tokens}",
                    "microseconds": took * 1e6,
                    "tflop_s": rate,
                    "ceiling": ceiling["bf16_tflop_s"],
                    "fraction": rate / ceiling["bf16_tflop_s"],
                    "floor_microseconds": took * 1e6 * rate / ceiling["bf16_tflop_s"],
                    "relative_error": off,
                }
            )
    return rows


def grouped_matmuls(x: Any, ids: Any, weights: Any, layer: tuple[BlockScaled, ...]) -> tuple:
    """The two launches alone, without the sort by expert and the sum over experts, and their arguments."""
    config = moe_prefill.measured()

    @jax.jit
    def prepare(x: Any, ids: Any) -> tuple:
        order, first = moe_prefill.sort_by_expert(ids, EXPERTS)
        tables = tuple((order, *moe_prefill.tiles(first, ids.size, rows)) for rows in (config.gate_up.rows, config.down.rows))
        return tables, operand_of(x, jnp.float16)

    run = jax.jit(partial(matmuls, config=config))
    return run, *prepare(x, ids), weights, tuple(m.values for m in layer), tuple(m.scales for m in layer)


def memory_row(what: str, case: str, took: float, read: float, ceiling: dict[str, float], off: float) -> dict:
    rate = read / took / 1e9
    return {
        "what": what,
        "case": case,
        "microseconds": took * 1e6,
        "bytes": read,
        "gb_s": rate,
        "ceiling": ceiling["read_gb_s"],
        "fraction": rate / ceiling["read_gb_s"],
        "floor_microseconds": read / ceiling["read_gb_s"] / 1e3,
        "relative_error": off,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench moe", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="layers of expert weights the decode case rotates among (0.6 GB each)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536], help="prefill lengths")
    parser.add_argument("--json", help="also write the numbers there")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit("bench moe measures GPU kernels and this machine has no CUDA GPU")
    keys = iter(jax.random.split(jax.random.key(0), 4096))
    ceiling = ceilings(keys)
    read, matmul = ceiling["read_gb_s"], ceiling["bf16_tflop_s"]
    print(f"{device.device_kind}, jax {jax.__version__}: reads {read:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s")
    rows = bench_prefill(keys, ceiling, options.tokens) + bench_decode(keys, ceiling, options.layers) + bench_matvec(keys, ceiling)
    for row in rows:
        rate = f"{row['tflop_s']:7.0f} TFLOP/s" if "tflop_s" in row else f"{row['gb_s']:7.0f} GB/s   "
        print(
            f"{row['what']:18} {row['case']:22} {row['microseconds']:9.1f} us (floor {row['floor_microseconds']:8.1f}) {rate}"
            f" {row['fraction']:4.0%} of {row['ceiling']:.0f}, error {row['relative_error']:.0e}"
        )
    if options.json:
        command = " ".join(["python -m hga_jax.bench moe", *(argv or [])])
        shape = {"D": WIDTH, "F": SIZE, "E": EXPERTS, "k": CHOICES}
        report = {"command": command, "device": device.device_kind, "jax": jax.__version__, **ceiling, "shape": shape, "rows": rows}
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
