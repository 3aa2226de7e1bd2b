"""A whole model through `generate`: prefill of a prompt of random tokens, then decode; seconds, parts of a layer, bytes and ceilings.

The model is a checkpoint directory, or random weights of a known shape made on the device. Everything runs twice before it is timed or
traced, so that nothing is compiled then. The RTX 5090's figures are estimates from this breakdown, not measurements.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convert import load_decoder, read_config
from convert.load import with_weights
from convert.synthetic import MODELS, make_config
from hga_jax.bench._tracing import Kernel, KernelTrace
from hga_jax.bench.decode import copy_ceilings, environment
from hga_jax.bench.moe import ceilings
from hga_jax.config import HGAConfig, ModelConfig, parse_threshold
from hga_jax.language_model import LanguageModel, make_backend
from hga_jax.model import Decoder, weight_leaves
from hga_jax.placement import default_placement
from hga_jax.plan import layers_to_host, place_history
from hga_jax.quantized import AbstractWeight, BlockScaled, Weight

# Which part of a layer a kernel belongs to, by the first pattern its name contains.
PARTS = (
    ("experts", r"moe_(decode|prefill)"),
    ("router", r"moe_routing|fp8_matvec_128x"),
    ("head", r"fp8_matvec_151936x"),
    ("projections", r"fp8_matvec|gemm|nvjet|cutlass|cublas"),
    ("routing", r"sketch|paper|rout|request|screen|list|refine|stamp"),
    ("attention", r"window|page|merge|attend|bank|flash"),
    ("embedding", r"host_rows"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy"),
    ("other", r""),
)
RTX_5090 = {"hbm_gb_s": 1792.0, "pcie_gb_s": 55.0}  # data sheet; PCIe 5 x16 as on the machine measured
TRACED_TOKENS = 33  # the first after the prompt alone, then a dispatch of 32
LAUNCH_MICROSECONDS = 2.3  # an empty launch in a command buffer, measured on an H100: no faster memory shortens it


@dataclass(frozen=True)
class Case:
    prompt_tokens: int
    new_tokens: int
    tier: str
    attention: str
    hga: HGAConfig
    rope_scaling: str = "none"

    @property
    def room(self) -> int:
        """Tokens for the answer; the warm-up makes some too."""
        return max(self.new_tokens, 64)

    def within(self, native: int) -> Case:
        """The case with a prompt that leaves room for the answer in a native context of so many tokens, unless the rope is stretched."""
        if self.rope_scaling != "none":
            return self
        return replace(self, prompt_tokens=min(self.prompt_tokens, native - self.room))


@partial(jax.jit, static_argnums=1)
def _codes(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """Finite e4m3 codes of magnitude below 32."""
    code = jax.random.bits(key, shape, jnp.uint8)
    return lax.bitcast_convert_type(jnp.where((code & 0x7F) >= 0x68, code & 0xBF, code), jnp.float8_e4m3fn)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) / shape[-1] ** 0.5).astype(dtype)


def random_decoder(config: ModelConfig, dtype: Any, host_experts: int = 0) -> Decoder:
    """Random weights on the device, such that activations stay of order one; FP8 where the config says so."""
    abstract = Decoder.abstract(config, dtype)
    place = default_placement(config, jax.devices()[0], host_experts)
    keys = iter(jax.random.split(jax.random.key(0), 4096))

    def make(path: str, leaf: AbstractWeight) -> Weight:
        if isinstance(leaf, BlockScaled):
            # The codes' rms is 7.6, and the products' variance must be that of their inputs.
            scales = jnp.full(leaf.scales.shape, 1 / 7.6 / leaf.shape[-1] ** 0.5, leaf.scales.dtype)
            return jax.device_put(BlockScaled(_codes(next(keys), leaf.shape), scales, leaf.block), place(path))
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype) if path.endswith("norm.weight") else jnp.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(_normal(next(keys), leaf.shape, leaf.dtype), place(path))

    return with_weights(abstract, {path: make(path, leaf) for path, leaf in weight_leaves(abstract).items()})


def open_model(options: argparse.Namespace, hga: HGAConfig) -> LanguageModel:
    """The checkpoint or the random model; without end tokens, so that it makes as many as it is asked for."""
    dtype = jnp.dtype(options.dtype)
    if options.model is None:
        config = ModelConfig.from_hf(make_config(options.shape + ("-fp8" if options.random_fp8 else ""), options.layers))
    else:
        config = read_config(options.model)
    hosted = options.host_experts
    if hosted is None:
        longest = Case(max(options.ctx), options.new_tokens, "auto", options.attention, hga, options.rope_scaling).within(
            config.native_context
        )
        backend = make_backend(options.attention, config, hga)
        hosted = layers_to_host(config, backend, longest.prompt_tokens + longest.room, dtype, options.tier[-1])
    if options.model is None:
        decoder, name = random_decoder(config, dtype, hosted), f"random {options.shape}, {config.layers} layers"
    else:
        decoder, config = load_decoder(options.model, dtype=dtype, host_experts=hosted)
        name = str(options.model)
    if hosted:
        name += f", experts of {hosted} layers in host memory"
    return LanguageModel(decoder, replace(config, eos_token_ids=()), None, name)


def measure(model: LanguageModel, case: Case, *, trace: bool = True) -> dict[str, Any]:
    """One prompt: times of the second run, kernels of the third."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, case.prompt_tokens, dtype=np.int32)
    ctx = case.prompt_tokens + case.room
    backend = make_backend(case.attention, model.config, case.hga)
    plan = place_history(model.config, backend, ctx, model.dtype, case.tier, host_experts=model.host_experts)[1]
    run = partial(model.generate, ids, ctx=ctx, kv_store=case.tier, attention=case.attention, hga=case.hga, rope_scaling=case.rope_scaling)
    run(max_new_tokens=40)
    result = run(max_new_tokens=case.new_tokens)
    figures = asdict(result)
    for name in ("text", "tokens", "model", "rope_scaling"):
        figures.pop(name)
    figures["plan"] = plan.as_json()
    if trace:
        with KernelTrace() as prefill:
            prefill.start()
            run(max_new_tokens=1)
        with KernelTrace() as decode:
            run(max_new_tokens=1 + TRACED_TOKENS, on_prefill=lambda done, total: decode.start() if done >= total else None)
        figures["prefill_parts"] = parts(prefill.kernels, model.config.layers)
        figures["decode_parts"] = parts(decode.kernels, model.config.layers * TRACED_TOKENS)
        figures["prefill_kernels"], figures["decode_kernels"] = largest(prefill.kernels), largest(decode.kernels)
    return figures


def largest(kernels: dict[str, Kernel], most: int = 60) -> dict[str, Kernel]:
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["total_us"])[:most])


def measured_ceilings() -> dict[str, float]:
    """What the device reads, copies from the host and multiplies, in the same process; nan off a GPU, where nobody needs them."""
    if jax.default_backend() != "gpu":
        return dict.fromkeys(("hbm_gb_s", "bf16_tflop_s", "pcie_gb_s"), float("nan"))
    rates = ceilings(iter(jax.random.split(jax.random.key(1), 64)))
    return {"hbm_gb_s": rates["read_gb_s"], "bf16_tflop_s": rates["bf16_tflop_s"], "pcie_gb_s": copy_ceilings()["pcie_gb_s"]}


def parts(kernels: dict[str, Kernel], count: int) -> dict[str, dict[str, float]]:
    """Microseconds and launches of each part, divided by `count` (layers, or layers times tokens)."""
    found: dict[str, dict[str, float]] = {}
    for name, kernel in kernels.items():
        part = next(part for part, pattern in PARTS if re.search(pattern, name))
        total = found.setdefault(part, {"us": 0.0, "launches": 0.0})
        total["us"] += kernel["total_us"] / count
        total["launches"] += kernel["launches"] / count
    return found


def decode_bytes(config: ModelConfig, figures: dict[str, Any], context: int) -> dict[str, tuple[str, float]]:
    """What each part must read for one token in one layer: (from where, bytes). The head counts once a token: its share of a layer."""
    width, kv = config.hidden_size, config.kv_heads * config.head_dim
    weight = 1 if config.fp8_block else 2
    projections = 2.0 * weight * width * (config.heads * config.head_dim + kv)
    pages = figures["decode_fetched_fraction"] * context * kv * 2 * 2
    misses = pages * (1 - (figures["bank_hit_rate"] or 0))
    bus = "pcie_gb_s" if figures["history_tier"] == "host" else "hbm_gb_s"
    return {
        "experts": ("hbm_gb_s", 3.0 * weight * config.experts_per_token * config.expert_size * width),
        "projections": ("hbm_gb_s", projections),
        "router": ("hbm_gb_s", 2.0 * config.experts * width),
        "head": ("hbm_gb_s", 2 * config.vocab_size * width / config.layers),
        "attention": (bus, misses),
        "routing": ("hbm_gb_s", config.kv_heads * context * (config.head_dim // 4 + 2 + config.head_dim * 2 / 64)),
    }  # fmt: skip


def prefill_flops(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Multiplications and additions of each part in one layer."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    return {
        "experts": 6.0 * tokens * config.experts_per_token * config.expert_size * config.hidden_size,
        "projections": 2.0 * tokens * config.hidden_size * heads,
    }


def estimate_5090(figures: dict[str, Any], limits: dict[str, float], layers: int) -> float:
    """Tokens a second if every kernel took as much longer as the memory it reads is slower; the part of it that is launching stays."""
    total = 0.0
    for part, found in figures["decode_parts"].items():
        bus = figures["decode_bytes"].get(part, ("hbm_gb_s", 0))[0]
        fixed = min(found["us"], found["launches"] * LAUNCH_MICROSECONDS)
        total += fixed + (found["us"] - fixed) * max(1.0, limits[bus] / RTX_5090[bus])
    return 1e6 / (total * layers)


def main(what: str, argv: list[str]) -> None:
    """what: "decode" or "prefill": which of the two the table is about; both are measured."""
    parser = argparse.ArgumentParser(prog=f"python -m hga_jax.bench {what} --whole-model", description=__doc__.splitlines()[0])
    parser.add_argument("--whole-model", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: random weights of --shape)")
    parser.add_argument("--shape", choices=[name for name in MODELS if not name.endswith("-fp8")], default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="of the random model (default: as the real one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="weights that are not FP8, and K/V")
    parser.add_argument("--random-fp8", action="store_true", help="FP8 weights in the random model")
    parser.add_argument("--ctx", type=int, nargs="+", default=[65536], help="prompt tokens")
    parser.add_argument("--rope-scaling", default="none", help="of generate: none keeps prompts within the native context")
    parser.add_argument(
        "--host-experts", type=int, help="layers whose experts lie in pinned host memory (default: as the longest prompt asks)"
    )
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--tier", nargs="+", default=["auto"], help="--kv-store of generate")
    parser.add_argument("--attention", choices=("hga", "dense"), default="hga")
    parser.add_argument("--policy", choices=("sketch", "paper"), default=HGAConfig().policy)
    parser.add_argument("--quality", default=None, help="sketch policy: fast, balanced, best or a threshold")
    parser.add_argument("--no-trace", action="store_true", help="times only")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    hga = HGAConfig(policy=options.policy)
    if options.quality:
        hga = replace(hga, threshold=parse_threshold(options.quality))
    limits = {} if options.no_trace else measured_ceilings()  # 20 GiB, which would hide the peak of a model that needs less
    model = open_model(options, hga)
    report: dict[str, Any] = {
        "command": " ".join([f"python -m hga_jax.bench {what}", *argv]), "environment": environment(), "ceilings": limits,
        "model": model.name, "layers": model.config.layers, "results": [],
    }  # fmt: skip
    print(report["environment"], model.name, flush=True)
    for prompt in options.ctx:
        for tier in options.tier:
            native = model.config.native_context
            case = Case(prompt, options.new_tokens, tier, options.attention, hga, options.rope_scaling).within(native)
            if case.prompt_tokens < prompt:
                print(f"{prompt} tokens and an answer exceed the native context of {native}: {case.prompt_tokens} instead", flush=True)
            result = {"prompt_tokens": case.prompt_tokens, **measure(model, case, trace=not options.no_trace)}
            if not options.no_trace:
                result["decode_bytes"] = decode_bytes(model.config, result, case.prompt_tokens)
                result["prefill_flops"] = prefill_flops(model.config, case.prompt_tokens)
                if result["decode_parts"]:
                    result["rtx_5090_estimate_tokens_per_second"] = estimate_5090(result, limits, model.config.layers)
            report["results"].append(result)
            print_result(what, result, limits)
            if options.json:  # after every case: a later one may not fit
                Path(options.json).write_text(json.dumps(report, indent=1))


def print_result(what: str, result: dict[str, Any], limits: dict[str, float]) -> None:
    gib = 2**30
    print(
        f"{result['prompt_tokens']:7d} tokens, history on {result['history_tier']}: prefill {result['prefill_seconds']:.2f} s "
        f"({result['prefill_tokens_per_second']:.0f} tokens/s), decode {result['decode_tokens_per_second'] or 0:.1f} tokens/s; "
        f"device peak {result['device_peak_bytes'] / gib:.2f} GiB, plan {result['plan']['total'] / gib:.2f}; "
        f"host history {result['host_history_bytes'] / gib:.2f} GiB",
        flush=True,
    )
    for part, found in sorted(result.get(f"{what}_parts", {}).items(), key=lambda item: -item[1]["us"]):
        floor = ""
        if what == "decode" and part in result["decode_bytes"]:
            bus, nbytes = result["decode_bytes"][part]
            floor = f"  {nbytes / 1e6:8.2f} MB, floor {nbytes / limits[bus] / 1e3:7.1f} us ({bus.removesuffix('_gb_s')})"
        if what == "prefill" and part in result["prefill_flops"]:
            flops = result["prefill_flops"][part]
            floor = f"  {flops / 1e12:8.2f} TFLOP, floor {flops / limits['bf16_tflop_s'] / 1e6:7.1f} us"
        print(f"    {part:12} {found['us']:10.1f} us a layer in {found['launches']:6.1f} launches{floor}", flush=True)
    if "rtx_5090_estimate_tokens_per_second" in result:
        print(f"    RTX 5090, an estimate: {result['rtx_5090_estimate_tokens_per_second']:.0f} tokens/s", flush=True)
