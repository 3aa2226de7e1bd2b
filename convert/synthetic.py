"""Checkpoints with the names, shapes, dtypes and files of real ones and random weights: for measuring what needs no trained model.

    python -m convert.synthetic --like qwen3-30b-a3b-fp8 --layers 4 --out DIR

Weights are Gaussian with rms 1/sqrt(in), norms ones, so activations stay of order one through any number of layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from convert.checking import array_targets
from convert.mapping import hf_parts, row_of, split_key
from convert.safetensors_files import INDEX, SINGLE, write_safetensors
from hga_jax.config import ModelConfig
from hga_jax.model import Decoder

QWEN3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "head_dim": 128, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_scaling": None, "sliding_window": None,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
# Qwen/Qwen3-30B-A3B-Instruct-2507
QWEN3_30B = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "max_window_layers": 48,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "output_router_logits": False, "router_aux_loss_coef": 0.001, "rope_theta": 10000000,
    "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip
# Qwen/Qwen3-0.6B
QWEN3_06B = QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "max_window_layers": 28,
    "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
FP8_QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MODELS = {"qwen3-30b-a3b-fp8": QWEN3_30B, "qwen3-30b-a3b": QWEN3_30B, "qwen3-0.6b": QWEN3_06B}
TINY_DENSE = {
    "hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160, "vocab_size": 512,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 136}
FP8_MODULES_KEPT = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
PIECE = 8 << 20  # bytes written at a time
POOL = 24 << 20  # bytes of random weights that tensors are cut from
WRITERS = 8  # files written at a time
FP8_SIGMA = 112.0  # a Gaussian block of 128x128 reaches 4 sigma: its largest value lands on e4m3's 448
Reference = tuple[str, tuple[int, ...], np.dtype]


def make_config(like: str, layers: int | None = None, tiny: bool = False) -> dict[str, Any]:
    """The config.json of a model of this kind, with another number of layers or divided widths if asked. Raises ValueError."""
    if like not in MODELS:
        raise ValueError(f"{like=}: choose one of {', '.join(MODELS)}")
    raw = dict(MODELS[like])
    if layers is not None:
        if layers < 1:
            raise ValueError(f"{layers=} must be at least 1")
        raw["num_hidden_layers"] = raw["max_window_layers"] = layers
    if tiny:
        raw |= TINY_DENSE | (TINY_EXPERTS if "num_experts" in raw else {})
    if like.endswith("-fp8"):
        kept = [f"model.layers.{i}.{name}" for i in range(raw["num_hidden_layers"]) for name in FP8_MODULES_KEPT]
        raw["quantization_config"] = FP8_QUANTIZATION | {"modules_to_not_convert": ["lm_head", *kept]}
    return raw


def list_tensors(raw: dict[str, Any]) -> list[Reference]:
    """(name, shape, dtype) of every tensor, in the order of the network."""
    config = ModelConfig.from_hf(raw)
    found: list[tuple[tuple, Reference]] = []
    for key, target in array_targets(Decoder.abstract(config, jnp.bfloat16)).items():
        layer = row_of(key)[1]
        place = {"embedding": -1, "final_norm.weight": config.layers, "lm_head": config.layers + 1}.get(key, layer)
        dtype = target.dtype if split_key(key)[1] == "values" else ml_dtypes.bfloat16  # Qwen stores the scales as bfloat16
        for part in hf_parts(key, config):
            shape = target.shape if part.expert is None else target.shape[1:]
            found.append(((place, part.name), (part.name, shape, np.dtype(dtype))))
    if raw["tie_word_embeddings"]:  # the real Qwen3-0.6B holds the shared matrix twice
        found.append(((config.layers + 1, ""), ("lm_head.weight", (config.vocab_size, config.hidden_size), np.dtype(ml_dtypes.bfloat16))))
    return [reference for _, reference in sorted(found, key=lambda item: item[0])]


def write_synthetic(
    out: str | os.PathLike[str],
    like: str,
    *,
    layers: int | None = None,
    tiny: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint into a new directory and return it; memory stays at a few pools of 24 MB.

    The same seed and name give the same tensor, whatever the number of layers. progress hears bytes as they are written.
    Raises ValueError when `out` exists, the disk has no room, or an option is out of range.
    """
    out = Path(out)
    raw = make_config(like, layers, tiny)
    tensors = list_tensors(raw)
    if out.exists():
        raise ValueError(f"{out}: exists already: choose another name")
    if max_shard_bytes <= 0:
        raise ValueError(f"{max_shard_bytes=} must be positive")
    total = sum(_size(item) for item in tensors)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < total:
        raise ValueError(f"{parent}: has {free / 1e9:.1f} GB free, the checkpoint needs {total / 1e9:.1f} GB")
    shards = _shards(tensors, max_shard_bytes)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

        def write(name: str, shard: list[Reference]) -> None:
            header = {item[0]: item[1:] for item in shard}
            write_safetensors(partial / name, header, _pieces(shard, seed, progress), {"format": "pt"})

        _fp8_pool(seed)  # before threads want it
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, names, shards))
        if len(shards) > 1:
            weight_map = {item[0]: name for name, shard in zip(names, shards, strict=True) for item in shard}
            (partial / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
        (partial / "config.json").write_text(json.dumps(raw, indent=2))
        if not tiny:  # the two tokens at which the real model stops
            ends = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
            (partial / "generation_config.json").write_text(json.dumps(ends, indent=2))
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _size(item: Reference) -> int:
    return math.prod(item[1]) * item[2].itemsize


def _shards(tensors: list[Reference], limit: int) -> list[list[Reference]]:
    """Filled one after another, as save_pretrained does."""
    shards: list[list[Reference]] = [[]]
    filled = 0
    for item in tensors:
        if shards[-1] and filled + _size(item) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += _size(item)
    return shards


def _pieces(shard: list[Reference], seed: int, progress: Callable[[int], None] | None) -> Iterator[np.ndarray]:
    """The shard's contents in order."""
    for name, shape, dtype in shard:
        step = PIECE // dtype.itemsize
        count = math.prod(shape)
        for start in range(0, count, step):
            piece = _make(seed, name, shape, dtype, min(step, count - start), start // step)
            yield piece
            if progress is not None:
                progress(piece.nbytes)


def _make(seed: int, name: str, shape: tuple[int, ...], dtype: np.dtype, count: int, piece: int) -> np.ndarray:
    """One piece of a tensor: norms ones, scales constant, everything else a stretch of the pool that starts where the name says."""
    if name.endswith("norm.weight"):
        return np.ones(count, dtype)
    if name.endswith("_scale_inv"):
        return np.full(count, _scale(shape, name), dtype)
    pool = _fp8_pool(seed) if dtype == np.dtype(ml_dtypes.float8_e4m3fn) else _bf16_pool(seed, shape[-1])
    start = zlib.crc32(f"{seed} {name} {piece}".encode()) % (pool.size - count + 1)
    return pool[start : start + count]


@lru_cache(1)
def _fp8_pool(seed: int) -> np.ndarray:
    """Gaussian codes, drawn once: drawing all 30 GB of a large model takes longer than writing them."""
    codes = np.random.Generator(np.random.SFC64(seed)).bytes(POOL).translate(_fp8_table())
    return np.frombuffer(codes, ml_dtypes.float8_e4m3fn)


@lru_cache(4)
def _bf16_pool(seed: int, inputs: int) -> np.ndarray:
    ranks = np.random.Generator(np.random.SFC64(seed)).integers(0, 1 << 16, POOL // 2, dtype=np.uint16)
    return np.take(_bf16_table(inputs), ranks, mode="clip")


def _quantiles(count: int) -> np.ndarray:
    """Equally likely values of a standard Gaussian, scaled to rms one."""
    inverse = NormalDist().inv_cdf
    values = np.array([inverse((i + 0.5) / count) for i in range(count)])
    return values / np.sqrt(np.mean(values**2))


@cache
def _fp8_table() -> bytes:
    """256 codes, none of them NaN."""
    return np.clip(_quantiles(256) * FP8_SIGMA, -448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()


@cache
def _gauss() -> np.ndarray:
    return _quantiles(1 << 16)


@cache
def _bf16_table(inputs: int) -> np.ndarray:
    return (_gauss() / math.sqrt(inputs)).astype(ml_dtypes.bfloat16)


def _scale(shape: tuple[int, ...], name: str) -> float:
    """Such that codes of rms FP8_SIGMA become weights of rms 1/sqrt(in); `in` to the block, the last one taken as whole."""
    return 1.0 / (FP8_SIGMA * math.sqrt(shape[-1] * FP8_QUANTIZATION["weight_block_size"][1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. Errors are one line on stderr and 2."""
    parser = argparse.ArgumentParser(prog="python -m convert.synthetic", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--like", required=True, choices=MODELS)
    parser.add_argument("--layers", type=int, help="how many (default: as the real one)")
    parser.add_argument("--out", help="directory to write (default: ./synthetic-<like>)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest file (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="divided widths, for tests")
    options = parser.parse_args(arguments)
    out = options.out or f"synthetic-{options.like}"
    try:
        total = sum(_size(item) for item in list_tensors(make_config(options.like, options.layers, options.tiny)))
        with tqdm(desc=out, total=total, unit="B", unit_scale=True, disable=None) as bar:
            write_synthetic(
                out, options.like, layers=options.layers, tiny=options.tiny, max_shard_bytes=int(options.max_shard_gb * 1e9),
                seed=options.seed, progress=bar.update,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {out}: {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
