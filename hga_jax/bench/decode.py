"""Attention of one decoded token, all layers in one program: routing, fetch, attention; beside dense decode and whole-layer copies.

Random keys. Sketch policy: stamps make the chosen number of pages visible, so that the work is what the options say. Paper policy: what 16
chunks and 64 groups open, whose union over random heads is wide; `tokens_listed` is counted in the checked layer. Every timed program is
checked first: its outputs against the XLA twin on the same arrays.
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
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from pallas_kernels import paper_routing, routed_decode_attention, sketch_routing
from pallas_kernels.routed_decode_attention import Bank

SHAPES = {  # layers, query heads, kv heads, head dim
    "qwen3-30b-a3b": (48, 32, 4, 128),
    "qwen3-0.6b": (28, 16, 8, 128),
    "smollm2-135m": (30, 9, 3, 64),
}
CHUNK, GROUP, SINKS, LOCAL = 64, 16, 2, 8
WINDOW_PAGES = (SINKS + LOCAL + 1) * CHUNK // GROUP


@dataclass(frozen=True)
class Case:
    """policy: sketch or paper. tier: device (whole history on the device), host, or bank (every page found in it).

    tokens: routed tokens a kv head.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    history: int
    tokens: int
    policy: str = "sketch"
    tier: str = "host"
    capacity: int = 1024
    route: bool = True
    attend: bool = True

    @property
    def group_heads(self) -> int:
        return self.heads // self.kv_heads

    @property
    def pages(self) -> int:
        return self.history // GROUP

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def sharding(kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def host_kind() -> str:
    return "pinned_host" if jax.default_backend() == "gpu" else "device"


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def make_layer(case: Case, seed: int, store: Any) -> dict[str, Any]:
    """One layer's arrays; `store` is shared when the caller wants fewer distinct histories than layers."""
    keys = jax.random.split(jax.random.key(seed), 8)
    k, h, pages, chunks = case.kv_heads, case.head_dim, case.pages, case.history // CHUNK
    own = chunks  # the token decoded opens a new chunk
    rng = np.random.default_rng(seed)
    ids = np.zeros((k, case.capacity), np.int32)
    middle = np.arange(SINKS * CHUNK // GROUP, (own - LOCAL) * CHUNK // GROUP)
    count = min(case.tokens // GROUP, len(middle))
    stamps = np.full((k, pages), -2, np.int32)
    for i in range(k):
        ids[i, :count] = np.sort(rng.permutation(middle)[:count])
        stamps[i, ids[i, :count]] = own - 1
    layer = {
        "window": _normal(keys[0], (k, WINDOW_PAGES, 2, GROUP, h), jnp.bfloat16),
        "ids": jnp.asarray(ids), "counts": jnp.full((k, 2), jnp.array([count, 0]), jnp.int32),
    }  # fmt: skip
    if case.policy == "sketch":
        layer |= {
            "means": _normal(keys[1], (k, chunks, h), jnp.bfloat16),
            "codes": jax.random.bits(keys[2], (k, case.history, h // 4), jnp.uint8),
            "scales": 0.1 * jnp.abs(_normal(keys[3], (k, case.history), jnp.bfloat16)),
        }
    else:
        layer |= {
            "chunk_sums": _normal(keys[1], (k, chunks, h), jnp.bfloat16),
            "group_sums": _normal(keys[2], (k, pages, h), jnp.bfloat16),
        }
    state = {"stamps": jnp.asarray(stamps)}
    if case.policy == "paper":
        state = {"marks": paper_routing.empty_marks(k, pages)}
    if case.tier == "bank":
        slots = max(2 * count, 16)
        page_slot, slot_page = np.full((k, pages), -1, np.int32), np.full((k, slots), -1, np.int32)
        for i in range(k):
            where = rng.permutation(slots)[:count]
            page_slot[i, ids[i, :count]], slot_page[i, where] = where, ids[i, :count]
        state["bank"] = Bank(_normal(keys[4], (k, slots, 2, GROUP, h), jnp.bfloat16), jnp.asarray(page_slot), jnp.asarray(slot_page))
    return {"const": layer, "state": state, "store": store}


def layer_step(case: Case, query, rotation, layer: dict, state: dict, store, configs: dict, implementation: str):
    """One layer's decode attention: (output [K, G, H], new state, [pages listed, refused] a kv head)."""
    attention = {"implementation": implementation, "config": configs["attention"]}
    own = jnp.int32(case.history // CHUNK)
    valid = jnp.where(jnp.arange(WINDOW_PAGES) == WINDOW_PAGES - CHUNK // GROUP, 1, GROUP) * (
        jnp.arange(WINDOW_PAGES) <= WINDOW_PAGES - CHUNK // GROUP
    )
    ids, counts, seen_by = layer["ids"], layer["counts"], None
    windows, columns, _ = routed_decode_attention.window_attention(
        query, layer["window"], valid, scale=case.scale, rotation=rotation if case.policy == "sketch" else None, **attention
    )
    if case.route and case.policy == "sketch":
        pages = sketch_routing.sketch_routing(
            columns, layer["means"], layer["codes"], layer["scales"], state["stamps"], windows.stats, own, sink_chunks=SINKS,
            local_chunks=LOCAL, group_size=GROUP, threshold=0.5, capacity=case.capacity, scale=case.scale,
            implementation=implementation, config=configs["sketch"],
        )  # fmt: skip
        state, ids, counts = state | {"stamps": pages.stamps}, pages.ids, pages.counts
    elif case.route:
        pages = paper_routing.paper_routing(
            query, layer["chunk_sums"], layer["group_sums"], state["marks"], own, sink_chunks=SINKS, local_chunks=LOCAL, top_chunks=16,
            top_groups=64, capacity=case.capacity, implementation=implementation, config=configs["paper"],
        )  # fmt: skip
        state, ids, counts, seen_by = state | {"marks": pages.marks}, pages.ids, pages.counts, pages.heads
    if not case.attend:
        return query, state, counts
    bank, plan = state.get("bank"), None
    if bank is not None:
        recency = state["stamps"] if case.policy == "sketch" else jnp.zeros((case.kv_heads, case.pages), jnp.int32)
        bank, plan = routed_decode_attention.plan_bank(bank, ids, counts, recency, own - 1, **attention)
    routed, bank = routed_decode_attention.page_attention(
        query, ids, counts, store, scale=case.scale, heads=seen_by, bank=bank, plan=plan, **attention
    )
    if bank is not None:
        state = state | {"bank": bank}
    return routed_decode_attention.merge([windows, routed], query.dtype, **attention), state, counts


def token_program(case: Case, configs: dict, steps: int, store_kind: str) -> Callable:
    """`steps` tokens in one program: each layer's output is the next layer's query, the last layer's the next token's."""
    store_sharding, device = sharding(store_kind), sharding("device")

    def tokens(query, rotation, consts, stores, states):
        def one(_, carry):
            query, states = carry
            new = []
            for const, store, state in zip(consts, stores, states, strict=True):
                query, state, _ = layer_step(case, query, rotation, const, state, store, configs, "pallas")
                new.append(state)
            return query, tuple(new)

        return one(0, (query, states)) if steps == 1 else lax.fori_loop(0, steps, one, (query, states))

    return jax.jit(tokens, donate_argnums=4, in_shardings=(device, device, device, store_sharding, device), out_shardings=device)


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


def measure(case: Case, layers: list[dict], configs: dict, *, steps: int = 8, repeats: int = 7, trace: bool = False) -> dict[str, Any]:
    """Check one layer against the XLA twin, then time the whole program."""
    kind = host_kind() if case.tier != "device" else "device"
    device = sharding("device")
    query = _normal(jax.random.key(99), (case.kv_heads, case.group_heads, case.head_dim), jnp.bfloat16)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((case.head_dim,) * 2))[0], jnp.float32)
    consts, stores = tuple(x["const"] for x in layers), tuple(x["store"] for x in layers)
    states = jax.tree.map(lambda x: x + 0, tuple(x["state"] for x in layers))
    first = jax.jit(
        lambda q, r, const, store, state, name: layer_step(case, q, r, const, state, store, configs, name)[::2],
        static_argnums=5, in_shardings=(device, device, device, sharding(kind), device), out_shardings=device,
    )  # fmt: skip
    out, counts = first(query, rotation, consts[0], stores[0], states[0], "pallas")
    out, listed = np.asarray(out, np.float32), float(np.mean(np.asarray(counts)[:, 0])) * GROUP
    store = jax.device_put(stores[0], device)
    twin = jax.jit(lambda q, r, const, store, state: layer_step(case, q, r, const, state, store, configs, "xla")[0])
    expected = np.asarray(twin(query, rotation, consts[0], store, states[0]), np.float32)
    error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
    program = token_program(case, configs, steps, kind)
    start = time.perf_counter()
    compiled = program.lower(query, rotation, consts, stores, states).compile()
    compile_seconds = time.perf_counter() - start
    box = {"query": query, "states": states}

    def call():
        box["query"], box["states"] = compiled(box["query"] * 0 + query, rotation, consts, stores, box["states"])
        return box["query"]

    for _ in range(2):
        jax.block_until_ready(call())
    seconds = median_seconds(call, repeats)
    result = {
        "tier": case.tier, "policy": case.policy, "history": case.history, "layers": case.layers, "tokens": case.tokens,
        "tokens_listed": listed,
        "ms_per_token": seconds / steps * 1e3, "us_per_layer": seconds / steps / case.layers * 1e6, "relative_error": error,
        "checked": error < 1e-2, "compile_seconds": compile_seconds,
    }  # fmt: skip
    if trace:
        times = kernel_times(call)
        result["kernels"] = {name: {"launches_per_token": n / steps, "us": us} for name, (n, us) in times.items()}
        result["launches_per_token"] = sum(n for n, _ in times.values()) / steps
    return result


def copy_ceilings() -> dict[str, float]:
    """GB/s: device memory (read plus write) and pinned host -> device, 512 MiB each."""
    x = jnp.ones((2**28,), jnp.bfloat16)
    double = jax.jit(lambda x: x * 2)
    double(x).block_until_ready()
    result = {"hbm_gb_s": 2 * x.nbytes / median_seconds(lambda: double(x), 9) / 1e9}
    if host_kind() == "pinned_host":
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
    result["attention_us"] = windows / hbm + (pages / pcie if case.tier == "host" else pages / hbm)
    result["ms_per_token"] = (result["routing_us"] + result["attention_us"]) * case.layers / 1e3
    return result


def make_stores(case: Case, count: int, kind: str) -> list[Any]:
    shape = (case.kv_heads, case.pages, 2, GROUP, case.head_dim)
    stores = []
    for i in range(count):
        stores.append(jax.device_put(_normal(jax.random.key(1000 + i), shape, jnp.bfloat16), sharding(kind)))
        stores[-1].block_until_ready()
    return stores


def default_configs() -> dict[str, Any]:
    return {
        "attention": routed_decode_attention.Config(),
        "sketch": sketch_routing.Config(),
        "paper": paper_routing.Config(),
    }


def environment() -> dict[str, str]:
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench decode", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--history", type=int, nargs="+", default=[65536], help="tokens of history")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1200], help="routed tokens a kv head, besides the windows' 704")
    parser.add_argument("--policy", nargs="+", choices=("sketch", "paper"), default=["sketch"])
    parser.add_argument("--tier", nargs="+", choices=("device", "bank", "host"), default=["device", "bank", "host"])
    parser.add_argument("--distinct", type=int, default=48, help="distinct layer histories; more layers share them")
    parser.add_argument("--steps", type=int, default=8, help="tokens in one program")
    parser.add_argument("--dense", action="store_true", help="also dense decode on the device, XLA and cuDNN")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    if "paper" in options.policy and "bank" in options.tier:
        parser.error(
            "--policy paper --tier bank: the bank is measured with the sketch policy's stamps; choose --tier device host for paper"
        )
    layers, heads, kv_heads, head_dim = SHAPES[options.shape]
    ceilings = copy_ceilings()
    print(environment(), {name: round(value) for name, value in ceilings.items()}, flush=True)
    report: dict[str, Any] = {"environment": environment(), "ceilings": ceilings, "shape": options.shape, "argv": argv, "results": []}
    for history in options.history:
        base = Case(layers, heads, kv_heads, head_dim, history, 0)
        for tiers in (("device",), ("bank", "host")):
            chosen = [tier for tier in options.tier if tier in tiers]
            if not chosen:
                continue
            stores = make_stores(base, min(layers, options.distinct), "device" if tiers == ("device",) else host_kind())
            for tier in chosen:
                for policy in options.policy:
                    for tokens in options.tokens:
                        case = Case(layers, heads, kv_heads, head_dim, history, tokens, policy, tier)
                        made = [make_layer(case, i, stores[i % len(stores)]) for i in range(layers)]
                        result = measure(case, made, default_configs(), steps=options.steps, trace=True)
                        result["floor"] = floors(case, result["tokens_listed"], ceilings)
                        report["results"].append(result)
                        print_result(result)
            del stores
        for name in ("xla", "cudnn") if options.dense else ():
            try:
                dense = dense_decode(base, name)
                report["results"].append({"tier": f"dense {name}", "history": history, **dense})
                print(f"history {history:7d} dense {name:6s} {dense['ms_per_token']:8.3f} ms/token  {dense['gb_s']:.0f} GB/s", flush=True)
            except Exception as error:  # a baseline that this JAX or GPU lacks must not lose the other figures
                print(f"history {history} dense {name}: {type(error).__name__} {str(error)[:200]}", flush=True)
        copied = history * kv_heads * head_dim * 4 * layers
        if "pcie_gb_s" in ceilings:
            print(
                f"history {history:7d} copying every layer's history each token: {copied / ceilings['pcie_gb_s'] / 1e6:.1f} ms/token",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


def print_result(result: dict[str, Any]) -> None:
    print(
        f"history {result['history']:7d} {result['policy']:6s} {result['tier']:6s} routed {result['tokens_listed']:5.0f}: "
        f"{result['ms_per_token']:7.3f} ms/token ({result['us_per_layer']:6.1f} us/layer, floor {result['floor']['ms_per_token']:.3f} ms), "
        f"{result.get('launches_per_token', 0):.0f} launches, "
        f"error {result['relative_error']:.1e} {'ok' if result['checked'] else 'WRONG'}, compiled in {result['compile_seconds']:.0f} s",
        flush=True,
    )
    for name, kernel in sorted(result.get("kernels", {}).items(), key=lambda item: -item[1]["us"] * item[1]["launches_per_token"])[:12]:
        print(f"    {name[:60]:60s} {kernel['launches_per_token']:6.1f} x {kernel['us']:7.2f} us", flush=True)
