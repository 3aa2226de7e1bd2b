"""Checkpoints into the decoder: Hugging Face directories, GGUF files, and the directories `python -m convert` writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import checkpoint
from convert.checking import array_targets, check_source
from convert.gguf_config import ARCHITECTURES
from convert.mapping import split_key
from convert.sources import GGUFSource, HuggingFaceSource, Source, read_hf_config
from convert.stream import HOST_BYTES, READERS, HostBuffers, PinnedBuffers, make_units, stream_arrays
from hga_jax.config import ModelConfig
from hga_jax.model import Decoder, weight_leaves
from hga_jax.placement import default_placement
from hga_jax.quantized import BlockScaled, Weight, dequantize
from hga_jax.text.gguf_metadata import read_gguf_metadata
from hga_jax.text.tokenizer import Tokenizer
from pallas_kernels.dispatch import is_cuda

DTYPES = ("bfloat16", "float32", "float16")
Progress = Callable[[int, int], None]
Placement = jax.Device | jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | None


def load_decoder(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Placement = None,
    progress: Progress | None = None,
    fp8: Literal["keep", "dequantize"] = "keep",
    host_bytes: int = HOST_BYTES,
    readers: int = READERS,
    host_experts: int = 0,
) -> tuple[Decoder, ModelConfig]:
    """Open a checkpoint: a Hugging Face directory, a GGUF file, or a directory that `python -m convert` wrote.

    dtype: of the weights that are not FP8: bfloat16, float16 or float32; None keeps the checkpoint's (bfloat16 for a quantised GGUF).
    sharding: a device, a sharding, or a function from a weight's path ("layers.0.attention.q.weight") to its sharding; None: the default
    device, and what hga_jax.placement puts into its host memory, the experts of host_experts layers among it. progress hears (bytes done,
    of how many). fp8="dequantize" turns FP8 weights into plain ones of `dtype`.
    host_bytes bounds the host memory in use while the weights stream (one layer at least), readers is how many threads read.

    The tensors are compared with what the config asks for before any is copied. Raises ValueError, one line: no checkpoint there, damaged
    files, an unsupported model, or every missing, unexpected, misshapen and wrong-dtype tensor.
    """
    path = Path(path)
    if fp8 not in ("keep", "dequantize"):
        raise ValueError(f"{fp8=}: choose keep or dequantize")
    if checkpoint.is_converted(path):
        saved = checkpoint.read_settings(path)
        config, dtype = saved.config, check_dtype(saved.dtype if dtype is None else dtype)
        decoder = Decoder.abstract(config, dtype)
        place = _placement(sharding, config, host_experts)
        arrays = checkpoint.restore(path, array_targets(decoder), place, progress)
        leaves = dict(_leaves(arrays, config, dtype, fp8, place))
    else:
        source = open_source(path)
        try:
            config, dtype = source.config, check_dtype(source.dtype if dtype is None else dtype)
            decoder = Decoder.abstract(config, dtype)
            targets = array_targets(decoder)
            check_source(source, targets)
            final = _placement(sharding, config, host_experts)
            place = final if fp8 == "keep" else _placement(None, config, 0)
            buffers = _buffers(place, targets, host_bytes)

            def put(key: str, host: np.ndarray) -> tuple[jax.Array, bool]:
                return buffers.to_device(host, place(key))

            arrays = stream_arrays(source, make_units(source, targets), put, progress, buffers, readers)
            leaves = dict(_leaves(arrays, config, dtype, fp8, final))
        finally:
            source.close()
    if fp8 == "dequantize":
        config = replace(config, fp8_block=None, fp8_skip=())
        decoder = Decoder.abstract(config, dtype)
    return with_weights(decoder, leaves), config


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The model a checkpoint holds, without looking at its weights. Raises ValueError as load_decoder does."""
    path = Path(path)
    if checkpoint.is_converted(path):
        return checkpoint.read_settings(path).config
    if path.is_dir():
        return read_hf_config(path)[1]
    return open_source(path).config


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer a checkpoint carries, or None when it has none. Raises ValueError when it has one that cannot be read."""
    path = Path(path)
    if path.is_dir():
        return Tokenizer.from_directory(path) if (path / "tokenizer.json").is_file() else None
    metadata = read_gguf_metadata(path)
    return Tokenizer.from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None


def open_source(path: Path) -> Source:
    """A Hugging Face directory or a GGUF file, its headers read and its config understood. Raises ValueError."""
    if path.is_dir():
        return HuggingFaceSource(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: is one file of a checkpoint: give its directory, which also holds config.json")
    try:
        return GGUFSource(path)
    except ValueError as error:
        if "is not a GGUF file" in str(error):
            raise ValueError(f"{error}; a GGUF ({', '.join(ARCHITECTURES)}) or a checkpoint directory is expected") from error
        raise


def check_dtype(dtype: Any) -> np.dtype:
    """A weight dtype. Raises ValueError for others than bfloat16, float32, float16."""
    found = jnp.dtype(dtype)
    if found.name not in DTYPES:
        raise ValueError(f"dtype={found.name!r}: weights can be {', '.join(DTYPES)}")
    return found


def with_weights(decoder: Decoder, leaves: Mapping[str, Weight]) -> Decoder:
    """The (abstract) decoder with these leaves, by the paths of `weight_leaves`; shapes and dtypes must be the same."""
    graph, state = nnx.split(decoder)
    wanted = weight_leaves(decoder)
    if wanted.keys() != leaves.keys():
        raise ValueError(f"leaves differ from the decoder's: {sorted(wanted.keys() ^ leaves.keys())[:5]}")
    for path, leaf in wanted.items():
        have, want = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (leaves[path], leaf))
        if have != want:
            raise ValueError(f"{path} is {have}, expected {want}")
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(leaves[".".join(map(str, path))])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _placement(sharding: Placement, config: ModelConfig, host_experts: int) -> Callable[[str], jax.sharding.Sharding]:
    """What `sharding` means for an array key; FP8 values and scales follow their weight."""
    if sharding is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
        device = jax.local_devices(backend=device)[0] if isinstance(device, str) else device
        place = default_placement(config, device, host_experts)
        return lambda key: place(split_key(key)[0])
    if isinstance(sharding, jax.Device):
        sharding = jax.sharding.SingleDeviceSharding(sharding)
    if isinstance(sharding, jax.sharding.Sharding):
        return lambda key: sharding
    return lambda key: sharding(split_key(key)[0])


def _buffers(place: Callable[[str], jax.sharding.Sharding], keys: Iterable[str], host_bytes: int) -> HostBuffers:
    """Pinned ones where one CUDA GPU takes all."""
    devices = {device for key in keys for device in place(key).device_set}
    if len(devices) == 1 and is_cuda(device := devices.pop()):
        return PinnedBuffers(host_bytes, device)
    return HostBuffers(host_bytes)


def _leaves(
    arrays: Iterator[tuple[str, jax.Array]], config: ModelConfig, dtype: Any, fp8: str, place: Callable[[str], jax.sharding.Sharding]
) -> Iterator[tuple[str, Weight]]:
    """Values and scales joined as they come (both are of one layer, so few wait), dequantised where that is asked for."""
    halves: dict[str, dict[str, jax.Array]] = {}
    for key, array in arrays:
        path, piece = split_key(key)
        if not piece:
            yield path, array if fp8 == "keep" else jax.device_put(array, place(path))
            continue
        pair = halves.setdefault(path, {})
        pair[piece] = array
        if len(pair) == 2:
            leaf = BlockScaled(pair["values"], pair["scales"], config.fp8_block)
            del halves[path], pair, array
            yield path, leaf if fp8 == "keep" else jax.device_put(_dequantize(leaf, dtype), place(path))


@partial(jax.jit, static_argnums=1)
def _dequantize(leaf: BlockScaled, dtype: Any) -> jax.Array:
    return dequantize(leaf, dtype)
