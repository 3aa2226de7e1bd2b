"""The byte table: what a run will hold and where, counted from shapes before anything is read or allocated."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hga_jax.backend import AttentionBackend
from hga_jax.config import ModelConfig
from hga_jax.model import Decoder, weight_leaves
from hga_jax.programs import SEGMENT, SUPER_BLOCK, padded_size, segment_of

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, the memory they share and its limit (None: unknown)."""

    ctx: int
    weights: int
    history: int
    summaries: int
    windows: int
    bank: int
    activations: int
    tier: str
    memory: str
    limit: int | None

    @property
    def total(self) -> int:
        return self.weights + self.history + self.summaries + self.windows + self.bank + self.activations

    def table(self) -> str:
        """The plan as lines of text, GiB."""
        notes = {
            "weights": "",
            "history": f"K and V of {self.ctx:,} tokens, all layers; tier: {self.tier}",
            "summaries": "what routing reads",
            "windows": "within the history in this tier" if not self.windows else "",
            "bank": "none in this tier" if not self.bank else "",
            "activations": "one super-block of the prompt, one segment's projections and MLP, logits",
        }
        lines = [f"{'':14}{'GiB':>9}"]
        lines += [f"{name:14}{getattr(self, name) / GIB:9.3f}  {note}".rstrip() for name, note in notes.items()]
        lines.append(f"{'total':14}{self.total / GIB:9.3f}  in {self.memory}")
        if self.limit is not None:
            lines.append(f"{'available':14}{self.limit / GIB:9.3f}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}

    def check(self) -> None:
        """Raises ValueError with the table and what each knob frees when the plan does not fit."""
        if self.limit is None or self.total <= self.limit:
            return
        short = self.total - self.limit
        per_token = (self.history + self.summaries) / self.ctx
        fits = int((self.limit - (self.total - self.history - self.summaries)) / per_token)
        if fits > 0:
            knob = f"--ctx {fits // 1024 * 1024 or fits} would fit (each 1,024 tokens cost {per_token * 1024 / 2**20:.1f} MiB)"
        else:
            knob = f"no --ctx fits beside weights of {self.weights / GIB:.2f} GiB: choose a smaller --model or a narrower --dtype"
        raise ValueError(
            f"the plan needs {short / GIB:.2f} GiB more than the {self.limit / GIB:.2f} GiB of {self.memory}: {knob}\n{self.table()}"
        )


def make_plan(config: ModelConfig, backend: AttentionBackend, ctx: int, dtype: Any, device: jax.Device | None = None) -> Plan:
    """Count the bytes of a run of `ctx` tokens. Nothing is read or allocated."""
    device = device or jax.devices()[0]
    weights = sum(_bytes(leaf) for leaf in weight_leaves(Decoder.abstract(config, dtype)).values())
    state = jax.eval_shape(lambda: backend.init_state(ctx, config.kv_heads, config.head_dim, dtype))
    history = summaries = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if any(getattr(part, "name", None) == "pages" for part in path):
            history += config.layers * _bytes(leaf)
        else:
            summaries += config.layers * _bytes(leaf)
    size, width = padded_size(ctx, SEGMENT, SUPER_BLOCK), jnp.dtype(dtype).itemsize
    inner = max(config.mlp_size, config.expert_size * config.experts_per_token, config.heads * config.head_dim)
    activations = 2 * size * config.hidden_size * width + segment_of(size) * inner * 4 * 4 + 2 * config.vocab_size * 4
    memory, limit = _memory(device)
    return Plan(ctx, weights, history, summaries, 0, 0, activations, "device", memory, limit)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _memory(device: jax.Device) -> tuple[str, int | None]:
    """Name and size of what the plan must fit into: the allocator's limit on an accelerator, available memory on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return f"{device.device_kind} memory", int(stats["bytes_limit"])
    try:
        with open("/proc/meminfo") as lines:
            table = dict(line.split(":", 1) for line in lines)
        return "available main memory", int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return "main memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return "main memory", None
