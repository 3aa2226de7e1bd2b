"""Which weights live in the device's memory and which in pinned host memory beside it."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax

from hga_jax.config import ModelConfig
from pallas_kernels.dispatch import is_cuda

EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.(gate|up|down)")  # the stacked experts' paths; those of a plain MLP end in ".weight"


def hosted_layers(config: ModelConfig, count: int) -> frozenset[int]:
    """`count` of the layers with experts, evenly spread: prefill, which has two layers under way, then brings one's experts at a time."""
    layers = [layer for layer in range(config.layers) if config.is_moe_layer(layer)]
    count = min(count, len(layers))
    return frozenset(layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count))


def on_host(path: str, config: ModelConfig, device: jax.Device, host_experts: int = 0) -> bool:
    """Whether the weight at `path` lies in pinned host memory: on a CUDA GPU, an embedding table that is not the output head too, and the
    experts of `host_experts` layers.

    A decoded token reads one row of the table; 65,536 tokens of prefill read 0.27 GB of Qwen3-30B-A3B's 0.62. Of a layer's experts (0.56
    GiB in FP8) it reads 8 of 128: in host memory they cost it 0.8 ms, where summaries of the same size would cost 13.
    """
    if not is_cuda(device):
        return False
    if found := EXPERTS.fullmatch(path):
        return int(found[1]) in hosted_layers(config, host_experts)
    return path == "embedding" and not config.tie_embeddings


def default_placement(config: ModelConfig, device: jax.Device, host_experts: int = 0) -> Callable[[str], jax.sharding.Sharding]:
    """From a weight's path to where it goes when nobody says otherwise."""
    kinds = {False: jax.sharding.SingleDeviceSharding(device)}
    if is_cuda(device):
        kinds[True] = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return lambda path: kinds[on_host(path, config, device, host_experts)]
