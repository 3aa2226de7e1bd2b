"""Attention of one decoded token, all layers in one program: routing, fetch, attention; beside dense decode and whole-layer copies.

What runs is the backend that generation runs, over random keys and sketches. Regimes: `device` (the history on the device), `host` (every
routed page from the host, none kept), `bank` (every page found in the device's bank), `drift` (a bank, and new random queries for every
token, each of which opens about one page a kv head that no earlier one asked for). Where queries stand still, stamps make the chosen number
of pages visible. Sketch policy; paper policy: what 16 chunks and 64 groups open, with heads of a kv head so alike that their union is about
the 1,200 tokens of the other (device, host). A layer's output is checked against the XLA operations on the same arrays before anything is
timed.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from hga_jax.attention import HGAAttention
from hga_jax.blocks import LayerState
from hga_jax.cache import HostHistory
from hga_jax.cache.host import put_on_host
from hga_jax.config import HGAConfig, ModelConfig, RopeConfig
from hga_jax.decoding import How, decode_token
from hga_jax.programs import concurrent_launches
from pallas_kernels.dispatch import on_cuda
from pallas_kernels.votes import stamp_of

SHAPES = {  # layers, query heads, kv heads, head dim
    "qwen3-30b-a3b": (48, 32, 4, 128),
    "qwen3-0.6b": (28, 16, 8, 128),
    "smollm2-135m": (30, 9, 3, 64),
}
REGIMES = ("device", "bank", "host", "drift")
CHUNK, GROUP, SINKS, LOCAL = 64, 16, 2, 8
WINDOW_PAGES = (SINKS + LOCAL + 1) * CHUNK // GROUP
WARM_TOKENS = 128  # drift: two chunks, after which as many pages expire as open
DRIFT_TOKENS = 1024  # drift: room for what is decoded
REPEATS = 7
ALIKE = 0.2  # paper: standard deviation of a head's query from that of its kv head


@dataclass(frozen=True)
class Case:
    """policy: sketch or paper. regime: see above. tokens: routed tokens a kv head (sketch policy)."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    history: int
    tokens: int
    policy: str = "sketch"
    regime: str = "host"

    @property
    def pages(self) -> int:
        return self.history // GROUP

    @property
    def listed(self) -> int:
        """Routed pages a kv head."""
        return min(self.tokens // GROUP, self.pages - WINDOW_PAGES)

    @property
    def capacity(self) -> int:
        """Room for the tokens that drift adds."""
        return self.history + DRIFT_TOKENS

    @property
    def backend(self) -> HGAAttention:
        # Random sketches give Gaussian scores: at a share of 0.5 no page passes; drift opens about one page a token, see `drift_threshold`.
        threshold = 0.5 if self.regime != "drift" else drift_threshold(self)
        config = HGAConfig(sink_chunks=SINKS, local_chunks=LOCAL, policy=self.policy, threshold=threshold)
        bank = 2 * max(self.listed, 128) if self.regime in ("bank", "drift") else 0
        return HGAAttention(config, RopeConfig(theta=1e6), tier="device" if self.regime == "device" else "host", bank_pages=bank)


def drift_threshold(case: Case) -> float:
    """The share of mass that one page a token and kv head passes when scores are unit Gaussians, as the made-up sketches' are.

    A page's score is the largest of GROUP; there are `heads` of them. Mass is summed over all pages.
    """
    scores = np.random.default_rng(0).standard_normal((64, case.pages, GROUP)).max(-1)
    share = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    wanted = 1 / (case.heads // case.kv_heads)
    return float(np.quantile(share, 1 - wanted / case.pages))


def sharding(kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def make_state(case: Case, seed: int) -> LayerState:
    """One layer's made-up history. Sketches: means are zero and scales such that scores of unit queries are unit Gaussians."""
    return case.backend.before_decoding((_made_up(case, seed),))[0]


def _made_up(case: Case, seed: int) -> LayerState:
    backend, keys = case.backend, jax.random.split(jax.random.key(seed), 4)
    state = backend.init_state(case.capacity, case.kv_heads, case.head_dim, jnp.bfloat16)
    pages = _normal(keys[0], state.history.pages.shape, jnp.bfloat16)
    history = replace(state.history, length=jnp.int32(case.history))
    if isinstance(history, HostHistory):
        history = replace(history, pages=put_on_host(pages), window=_normal(keys[1], history.window.shape, jnp.bfloat16))
    else:
        history = replace(history, pages=pages)
    state = replace(state, history=history)
    if case.policy == "paper":
        sums = state.summaries
        chunks, groups = (_normal(key, x.shape, jnp.bfloat16) for key, x in zip(keys[2:], (sums.chunks, sums.groups), strict=True))
        return replace(state, summaries=replace(sums, chunks=chunks, groups=groups))
    sketches = state.summaries
    codes = jax.random.bits(keys[2], sketches.codes.shape, jnp.uint8)
    scales = jnp.full(sketches.scales.shape, 0.9, jnp.bfloat16)  # 1 / rms of the four levels, equally often
    stamps = np.array(state.stamps)
    if case.regime != "drift":
        rng, own = np.random.default_rng(seed), case.history // CHUNK
        votes = backend.config.votes_for(case.heads // case.kv_heads)
        opened = int(stamp_of(own, True, 0, votes)) if votes else own
        middle = np.arange(SINKS * CHUNK // GROUP, (own - LOCAL) * CHUNK // GROUP)
        for row in stamps:
            row[rng.permutation(middle)[: case.listed]] = opened
    return replace(state, summaries=replace(sketches, codes=codes, scales=scales), stamps=jnp.asarray(stamps))


def token_program(case: Case, steps: int) -> Callable:
    """`steps` tokens in one program: each layer's output is the next layer's query (drift, paper: added to a new one)."""
    backend, moving, mixing = case.backend, case.regime == "drift", case.regime == "drift" or case.policy == "paper"

    def tokens(queries, key, value, states, position):
        states = tuple(backend.start_decoding(state, position) for state in states)

        def one(i, carry):
            query, states, hits, wanted = carry
            done = []
            for layer, state in enumerate(states):
                fresh = queries[(position + i + layer) % len(queries)]
                query = fresh + 1e-3 * query if mixing else query
                query, state, stats = backend.decode(query, key, value, state, position + i if moving else position)
                hits, wanted = (hits + stats.bank_hits, wanted + stats.bank_requests) if moving else (hits, wanted)
                done.append(state)
            return query, tuple(done), hits, wanted

        nothing = jnp.float32(0)
        query, states, hits, wanted = lax.fori_loop(0, steps, one, (queries[0], states, nothing, nothing))
        return query, tuple(backend.finish_decoding(state, position) for state in states), hits, wanted

    return jax.jit(tokens, donate_argnums=3, compiler_options=concurrent_launches(on_cuda()))


def measure(case: Case, *, steps: int = 64, repeats: int = REPEATS, trace: bool = True) -> dict[str, Any]:
    """Check one layer against the XLA operations, then time the whole program."""
    queries = _normal(jax.random.key(99), (WARM_TOKENS, case.heads, case.head_dim), jnp.bfloat16)
    if case.policy == "paper":
        shared = _normal(jax.random.key(96), (WARM_TOKENS, case.kv_heads, case.head_dim), jnp.bfloat16)
        queries = jnp.repeat(shared, case.heads // case.kv_heads, axis=1) + ALIKE * queries
    key, value = (_normal(jax.random.key(i), (case.kv_heads, case.head_dim), jnp.bfloat16) for i in (97, 98))
    position = case.history
    before = jax.devices()[0].memory_stats() or {}
    states = tuple(make_state(case, i) for i in range(case.layers))
    jax.block_until_ready(states)
    error, listed = _check(case, queries[0], key, value, position)
    program = token_program(case, steps)
    start = time.perf_counter()
    compiled = program.lower(queries, key, value, states, jnp.int32(position)).compile()
    compile_seconds = time.perf_counter() - start
    box: dict[str, Any] = {"states": states, "position": position, "hits": 0.0, "wanted": 0.0}
    del states

    def call():
        out, box["states"], hits, wanted = compiled(queries, key, value, box["states"], jnp.int32(box["position"]))
        if case.regime == "drift":
            box["position"] += steps
            box["hits"], box["wanted"] = box["hits"] + hits, box["wanted"] + wanted
        return out

    for _ in range(2 if case.regime != "drift" else WARM_TOKENS // steps):
        jax.block_until_ready(call())
    box |= {"hits": 0.0, "wanted": 0.0}
    seconds = median_seconds(call, repeats)
    after = jax.devices()[0].memory_stats() or {}
    result = {
        "regime": case.regime, "policy": case.policy, "history": case.history, "layers": case.layers, "tokens_listed": listed,
        "ms_per_token": seconds / steps * 1e3, "us_per_layer": seconds / steps / case.layers * 1e6, "relative_error": error,
        "checked": error < 1e-2, "compile_seconds": compile_seconds,
        "device_bytes": after.get("bytes_in_use", 0) - before.get("bytes_in_use", 0), "device_peak_bytes": after.get("peak_bytes_in_use"),
    }  # fmt: skip
    if case.regime == "drift":
        tokens = repeats * steps * case.layers * case.kv_heads
        result |= {
            "bank_hit_rate": float(box["hits"]) / max(float(box["wanted"]), 1),
            "tokens_listed": float(box["wanted"]) / tokens * GROUP,
            "pages_fetched_per_token": float(box["wanted"] - box["hits"]) / tokens,
        }
    if trace:
        times = kernel_times(call)
        result["kernels"] = {name: {"launches_per_token": n / steps, "us": us} for name, (n, us) in times.items()}
        result["launches_per_token"] = sum(n for n, _ in times.values()) / steps
    return result


def _check(case: Case, query: Any, key: Any, value: Any, position: int) -> tuple[float, float]:
    """(relative error of a layer's output against the XLA operations, routed tokens a kv head)."""
    backend, state = case.backend, make_state(case, 0)
    on_device = replace(state, history=replace(state.history, pages=jax.device_put(state.history.pages, sharding("device"))))
    out, _, stats = jax.jit(backend.decode)(query, key, value, state)
    twin = jax.jit(
        lambda query, state: decode_token(query, key, value, state, jnp.int32(position), backend.config, case.head_dim**-0.5, How("xla"))[0]
    )
    expected = np.asarray(twin(query, on_device), np.float32)
    windows = min(WINDOW_PAGES - CHUNK // GROUP, case.pages) * GROUP + 1
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    return float(error), float(stats.fetched_tokens) - windows


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kernel_times(call: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and median microseconds of each kernel name of one call, from the profiler's trace; empty when there is none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        found = glob.glob(os.path.join(folder, "**", "*.trace.json.gz"), recursive=True)
        if not found:
            return {}
        with gzip.open(found[0]) as file:
            events = json.load(file)["traceEvents"]
    devices = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"]["name"]}
    streams = {
        (e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and e["pid"] in devices and "Stream" in e["args"]["name"]
    }
    durations: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            durations.setdefault(event["name"], []).append(event["dur"])
    return {name: (len(all_), statistics.median(all_)) for name, all_ in durations.items()}


def copy_ceilings() -> dict[str, float]:
    """GB/s: device memory (read plus write) and pinned host -> device, 512 MiB each."""
    x = jnp.ones((2**28,), jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    double(x).block_until_ready()
    result = {"hbm_gb_s": 2 * x.nbytes / median_seconds(lambda: double(x), 9) / 1e9}
    if on_cuda():
        host = jax.device_put(x, sharding("pinned_host"))
        fetch = jax.jit(
            lambda x: jax.device_put(x, jax.memory.Space.Device), in_shardings=sharding("pinned_host"), out_shardings=sharding("device")
        )
        fetch(host).block_until_ready()
        result["pcie_gb_s"] = x.nbytes / median_seconds(lambda: fetch(host), 9) / 1e9
    return result


def dense_decode(case: Case, implementation: str, steps: int = 8) -> dict[str, Any]:
    """Dense decode attention with all K/V on the device, over as many distinct layers as keep the cache cold."""
    distinct = min(case.layers, 6)
    k = [_normal(jax.random.key(i), (1, case.history, case.kv_heads, case.head_dim), jnp.bfloat16) for i in range(2 * distinct)]

    def tokens(query, caches):
        def one(_, query):
            for i in range(case.layers):
                keys, values = caches[2 * (i % distinct)], caches[2 * (i % distinct) + 1]
                query = jax.nn.dot_product_attention(query, keys, values, implementation=implementation)
            return query

        return lax.fori_loop(0, steps, one, query)

    query = _normal(jax.random.key(9), (1, 1, case.heads, case.head_dim), jnp.bfloat16)
    program = jax.jit(tokens)
    jax.block_until_ready(program(query, k))
    seconds = median_seconds(lambda: program(query, k), 5) / steps
    moved = case.layers * case.history * case.kv_heads * case.head_dim * 4
    return {"ms_per_token": seconds * 1e3, "us_per_layer": seconds / case.layers * 1e6, "gb_s": moved / seconds / 1e9}


def floors(case: Case, tokens: float, ceilings: dict[str, float]) -> dict[str, float]:
    """Bytes a layer must move to attend to `tokens` routed tokens a kv head, and the microseconds that takes at the measured ceilings.

    Device reads are taken at the copy's read + write rate.
    """
    k, h = case.kv_heads, case.head_dim
    routing = k * (case.history * (h // 4 + 2) + case.history // CHUNK * h * 2)
    if case.policy == "paper":
        routing = k * (case.history // CHUNK) * h * 2 + case.heads * 64 * h * 2
    windows, pages = k * WINDOW_PAGES * GROUP * h * 4, k * tokens * h * 4
    result = {"routing_bytes": routing, "window_bytes": windows, "page_bytes": pages}
    hbm, pcie = ceilings["hbm_gb_s"] * 1e3, ceilings.get("pcie_gb_s", float("nan")) * 1e3
    result["routing_us"] = routing / hbm
    result["attention_us"] = windows / hbm + (pages / pcie if case.regime == "host" else pages / hbm)
    result["ms_per_token"] = (result["routing_us"] + result["attention_us"]) * case.layers / 1e3
    return result


def read_shape(name: str) -> tuple[int, int, int, int]:
    """(layers, query heads, kv heads, head dim) of a name or of a config.json."""
    if name in SHAPES:
        return SHAPES[name]
    config = ModelConfig.from_hf(json.loads(Path(name).read_text()))
    return config.layers, config.heads, config.kv_heads, config.head_dim


def environment() -> dict[str, str]:
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench decode", description=__doc__)
    parser.add_argument("--shape", default="qwen3-30b-a3b", help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for long histories")
    parser.add_argument("--history", type=int, nargs="+", default=[65536], help="tokens of history")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1200], help="routed tokens a kv head, besides the windows' 704")
    parser.add_argument("--policy", nargs="+", choices=("sketch", "paper"), default=["sketch"])
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=["device", "bank", "host"])
    parser.add_argument("--steps", type=int, default=64, help="tokens in one program: its launch costs what tens of launches inside do")
    parser.add_argument("--dense", action="store_true", help="also dense decode on the device, XLA and cuDNN")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    try:
        layers, heads, kv_heads, head_dim = read_shape(options.shape)
    except (OSError, ValueError) as error:
        parser.error(f"--shape {options.shape}: {error}")
    if "drift" in options.regime and WARM_TOKENS + (REPEATS + 1) * options.steps > DRIFT_TOKENS:
        parser.error(f"--steps {options.steps}: drift has room for {(DRIFT_TOKENS - WARM_TOKENS) // (REPEATS + 1)} tokens in a program")
    layers = options.layers or layers
    ceilings = copy_ceilings()
    print(environment(), {name: round(value) for name, value in ceilings.items()}, flush=True)
    report: dict[str, Any] = {"environment": environment(), "ceilings": ceilings, "shape": options.shape, "argv": argv, "results": []}
    for history in options.history:
        for policy in options.policy:
            for regime in options.regime:
                if policy == "paper" and regime in ("bank", "drift"):
                    continue  # the bank lives by the sketch policy's stamps
                for tokens in options.tokens:
                    case = Case(layers, heads, kv_heads, head_dim, history, tokens, policy, regime)
                    result = measure(case, steps=options.steps)
                    result["floor"] = floors(case, result["tokens_listed"], ceilings)
                    report["results"].append(result)
                    print_result(result)
        for name in ("xla", "cudnn") if options.dense else ():
            try:
                dense = dense_decode(Case(layers, heads, kv_heads, head_dim, history, 0), name)
                report["results"].append({"regime": f"dense {name}", "history": history, **dense})
                print(f"history {history:7d} dense {name:6s} {dense['ms_per_token']:8.3f} ms/token  {dense['gb_s']:.0f} GB/s", flush=True)
            except Exception as error:  # a baseline that this JAX or GPU lacks must not lose the other figures
                print(f"history {history} dense {name}: {type(error).__name__} {str(error)[:200]}", flush=True)
        copied = history * kv_heads * head_dim * 4 * layers
        if "pcie_gb_s" in ceilings:
            seconds = copied / ceilings["pcie_gb_s"] / 1e9
            report["results"].append({"regime": "copy every layer", "history": history, "ms_per_token": seconds * 1e3})
            print(
                f"history {history:7d} copying every layer's history each token, at the copy's rate: {seconds * 1e3:.1f} ms/token",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def print_result(result: dict[str, Any]) -> None:
    bank = f"bank hits {result['bank_hit_rate']:.3f}, " if "bank_hit_rate" in result else ""
    print(
        f"history {result['history']:7d} {result['policy']:6s} {result['regime']:6s} routed {result['tokens_listed']:5.0f}: "
        f"{result['ms_per_token']:7.3f} ms/token ({result['us_per_layer']:6.1f} us/layer, floor {result['floor']['ms_per_token']:.3f} ms), "
        f"{result.get('launches_per_token', 0):.0f} launches, {bank}device {result['device_bytes'] / 2**20:.0f} MiB, "
        f"error {result['relative_error']:.1e} {'ok' if result['checked'] else 'WRONG'}, compiled in {result['compile_seconds']:.0f} s",
        flush=True,
    )
    for name, kernel in sorted(result.get("kernels", {}).items(), key=lambda item: -item[1]["us"] * item[1]["launches_per_token"])[:12]:
        print(f"    {name[:60]:60s} {kernel['launches_per_token']:6.1f} x {kernel['us']:7.2f} us", flush=True)
