"""Decode of a real model from the host tier with banks of several sizes: hit rate, tokens/s, bytes over PCIe.

python -m hga_jax.bench bank --prompt-file TEXT [--model M] [--share 0 0.05 0.1 0.25]     shares of the context's pages

Every size writes the same text as the device tier, which is run first; `same` counts the tokens that agree. The programs of all sizes are
compiled beside each other, in threads, before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hga_jax.attention import HGAAttention
from hga_jax.bench.decode import environment
from hga_jax.config import HGAConfig
from hga_jax.language_model import LanguageModel
from hga_jax.loading import load_model


def backend_of(model: LanguageModel, ctx: int, share: float | None) -> HGAAttention:
    """share None: the device tier."""
    config = HGAConfig()
    slots = int((share or 0) * ctx / config.group_size)
    return HGAAttention(config, model.config.rope, tier="device" if share is None else "host", bank_pages=slots)


def measure(model: LanguageModel, ids: Any, ctx: int, new_tokens: int, share: float | None) -> tuple[dict[str, Any], list[int]]:
    """Generate with programs that are compiled already."""
    backend = backend_of(model, ctx, share)
    config, slots = backend.config, backend.bank_pages
    result = model.generate(ids, max_new_tokens=new_tokens, ctx=ctx, attention=backend)
    kv_heads, page = model.config.kv_heads, 2 * config.group_size * model.config.head_dim * jnp.dtype(model.dtype).itemsize
    windows = (config.sink_chunks + config.local_chunks) * config.chunk_size  # and the own chunk: not routed
    held = len(ids) + result.new_tokens / 2
    wanted = (result.decode_fetched_fraction * held - windows) / config.group_size
    read = 0.0 if share is None else wanted * (1 - (result.bank_hit_rate or 0)) * page * kv_heads * model.config.layers
    figures = {
        "tier": result.history_tier, "share": share, "bank_pages": slots, "bank_hit_rate": result.bank_hit_rate,
        "decode_tokens_per_second": result.decode_tokens_per_second, "routed_pages_per_token": wanted, "pcie_bytes_per_token": read,
        "fetched_fraction": result.decode_fetched_fraction, "prefill_seconds": result.prefill_seconds, "new_tokens": result.new_tokens,
    }  # fmt: skip
    return figures, result.tokens


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m hga_jax.bench bank", description=__doc__)
    parser.add_argument("--model", help="as for generate (default: the built-in small model)")
    parser.add_argument("--prompt-file", required=True, help="UTF-8 text; its first --tokens tokens are the prompt")
    parser.add_argument("--tokens", type=int, default=7600)
    parser.add_argument("--new-tokens", type=int, default=384)
    parser.add_argument("--share", type=float, nargs="+", default=[0, 0.05, 0.1, 0.25], help="bank sizes, as shares of the context's pages")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args(argv)
    model = load_model(options.model)
    ids = model.tokenizer.encode(Path(options.prompt_file).read_text(encoding="utf-8"))[: options.tokens]
    ctx = len(ids) + options.new_tokens
    report: dict[str, Any] = {"environment": environment(), "model": model.name, "prompt_tokens": len(ids), "argv": argv, "results": []}
    expected: list[int] = []
    shares = (None, *options.share)
    with ThreadPoolExecutor(len(shares)) as pool:  # two new tokens take every program once
        list(pool.map(lambda share: model.generate(ids, max_new_tokens=2, ctx=ctx, attention=backend_of(model, ctx, share)), shares))
    for share in shares:
        figures, tokens = measure(model, ids, ctx, options.new_tokens, share)
        expected = expected or tokens
        figures["same"] = sum(a == b for a, b in zip(tokens, expected, strict=False))
        report["results"].append(figures)
        print(
            ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()),
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
