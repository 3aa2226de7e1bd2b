"""The byte table: what a run will hold and where, counted from shapes before anything is read or allocated; and the tier it decides."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from hga_jax.attention import HGAAttention
from hga_jax.backend import AttentionBackend
from hga_jax.cache.tiers import choose_tier
from hga_jax.config import HGAConfig, ModelConfig
from hga_jax.model import Decoder, weight_leaves
from hga_jax.placement import on_host
from hga_jax.programs import LAYERS_UNDER_WAY, SEGMENT, SUPER_BLOCK, padded_size, segment_of

GIB = 2**30
BANK_SHARE = 1 / 8  # of the history's pages: several times what is open at a time at 64K, so that hardly one is fetched twice
DECODE_ROOM = 2**28  # bytes left free beside what decoding is planned to hold: the compiler's temporaries, fragments
PCIE = 46e9  # bytes a second, measured on PCIe 5 x16
MAIN_MEMORY = "available main memory"


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, the memory they share and its limit (None: unknown).

    host_weights: bytes of weights that lie in pinned host memory, outside the total.
    host: bytes of `history` that lie in host memory instead, and host_limit what there is of it; working: the device buffer that one
    layer's history passes through in prefill. Both 0 with the device tier. segment: tokens that prefill takes through a layer at a time.
    prefill_summaries: bytes of `summaries` on the device while prefill is at work. host_summaries: bytes of them that stay in host memory
    while decoding, the largest array of `host_layers` layers: what every token reads over PCIe.
    """

    ctx: int
    weights: int
    host_weights: int
    history: int
    summaries: int
    windows: int
    bank: int
    activations: int
    tier: str
    memory: str
    limit: int | None
    working: int = 0
    host: int = 0
    host_limit: int | None = None
    segment: int = 0
    prefill_summaries: int = 0
    host_summaries: int = 0
    host_layers: int = 0

    @property
    def lasting(self) -> int:
        """Bytes held through prefill and decoding, summaries apart."""
        return self.weights + self.history - self.host + self.windows

    @property
    def prefill_total(self) -> int:
        """Bytes in the memory that is planned for, while prefill is at work."""
        return self.lasting + self.prefill_summaries + self.working + self.activations

    @property
    def decode_total(self) -> int:
        """The same while decoding."""
        return self.lasting + self.summaries - self.host_summaries + self.bank

    @property
    def total(self) -> int:
        """The larger of the two: prefill's buffers are given up before decoding takes its own."""
        return max(self.prefill_total, self.decode_total)

    def table(self) -> str:
        """The plan as lines of text, GiB."""
        notes = {
            "weights": "",
            "history": f"K and V of {self.ctx:,} tokens, all layers; tier: {self.tier}",
            "summaries": self._where_summaries(),
            "windows": "within the history in this tier" if not self.windows else "sinks, local window and open chunk",
            "bank": "none" if not self.bank else "routed pages kept on the device, from the end of prefill on",
            "working": "none in this tier" if not self.working else "one layer's history during prefill",
            "activations": f"one super-block of the prompt; projections and MLP of {self.segment:,} tokens at a time; logits",
        }
        lines = [f"{'':14}{'GiB':>9}"]
        lines += [f"{name:14}{getattr(self, name) / GIB:9.3f}  {note}".rstrip() for name, note in notes.items()]
        beside = f"; the history ({self.host / GIB:.3f}) is in host memory" if self.host else ""
        phases = f"{self.prefill_total / GIB:.3f} in prefill, {self.decode_total / GIB:.3f} in decoding"
        lines.append(f"{'total':14}{self.total / GIB:9.3f}  in {self.memory}: {phases}{beside}")
        if self.host_weights:
            lines.append(f"{'embedding':14}{self.host_weights / GIB:9.3f}  in pinned host memory: a token reads one row")
        if self.limit is not None:
            lines.append(f"{'available':14}{self.limit / GIB:9.3f}")
        return "\n".join(lines)

    def _where_summaries(self) -> str:
        note = "what routing reads"
        if self.prefill_summaries < self.summaries:
            note += f"; {self.prefill_summaries / GIB:.3f} of it on the device in prefill"
        if self.host_summaries:
            note += (
                f"; {self.host_summaries / GIB:.3f}, those of {self.host_layers} layers, in host memory in decoding: "
                f"every token reads them over PCIe (about {self.host_summaries / PCIE * 1e3:.0f} ms on PCIe 5 x16)"
            )
        return note

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit

    def check(self) -> None:
        """Raises ValueError with the table and what each knob frees when the plan does not fit."""
        if self.host_limit is not None and self.host > self.host_limit:
            raise ValueError(
                f"the history needs {self.host / GIB:.2f} GiB of host memory and {self.host_limit / GIB:.2f} GiB are available: "
                f"--ctx {int(self.ctx * self.host_limit / self.host) // 1024 * 1024} would fit\n{self.table()}"
            )
        if self.fits:
            return
        short = self.total - self.limit
        growing = self.history - self.host + self.prefill_summaries + self.working
        per_token = growing / self.ctx
        fits = int((self.limit - (self.total - growing)) / per_token)
        if fits > 0:
            knob = f"--ctx {fits // 1024 * 1024 or fits} would fit (each 1,024 tokens cost {per_token * 1024 / 2**20:.1f} MiB)"
        else:
            knob = f"no --ctx fits beside weights of {self.weights / GIB:.2f} GiB: choose a smaller --model or a narrower --dtype"
        if not self.host and self.memory != MAIN_MEMORY:
            knob += f"; --kv-store host would free {self.history / GIB:.2f} GiB here (attention hga)"
        raise ValueError(
            f"the plan needs {short / GIB:.2f} GiB more than the {self.limit / GIB:.2f} GiB of {self.memory}: {knob}\n{self.table()}"
        )


def make_plan(
    config: ModelConfig, backend: AttentionBackend, ctx: int, dtype: Any, device: jax.Device | None = None, parks: bool = True
) -> Plan:
    """Count the bytes of a run of `ctx` tokens. Nothing is read or allocated.

    parks: whether the host tier's summaries are on the device for two layers at a time in prefill; a history on disk keeps them all there.
    """
    device = device or jax.devices()[0]
    leaves = {path: _bytes(leaf) for path, leaf in weight_leaves(Decoder.abstract(config, dtype)).items()}
    host_weights = sum(size for path, size in leaves.items() if on_host(path, config, device))
    weights = sum(leaves.values()) - host_weights
    state = jax.eval_shape(lambda: backend.before_decoding((backend.init_state(ctx, config.kv_heads, config.head_dim, dtype),))[0])
    sizes, movable = {"history": 0, "windows": 0, "bank": 0, "summaries": 0}, [0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        sizes[purpose(path)] += config.layers * _bytes(leaf)
        if "summaries" in _names(path):
            movable.append(_bytes(leaf))
    tier = tier_of(backend)
    working = sizes["history"] // config.layers if tier == "host" else 0
    memory, limit = _memory(device)
    apart = tier == "host" and has_own_memory(device)
    parked = sum(movable) * max(config.layers - LAYERS_UNDER_WAY, 0) if apart and parks else 0
    host_layers = min(backend.host_summaries, config.layers) if apart else 0
    plan = Plan(
        ctx, weights, host_weights, **sizes, activations=0, tier=tier, memory=memory, limit=limit, working=working,
        host=sizes["history"] if apart else 0, host_limit=_main_memory()[1] if apart else None,
        prefill_summaries=sizes["summaries"] - parked, host_summaries=host_layers * max(movable), host_layers=host_layers,
    )  # fmt: skip
    for segment in segments(padded_size(ctx, SEGMENT, SUPER_BLOCK)):
        activations = activation_bytes(config, ctx, jnp.dtype(dtype).itemsize, segment, getattr(backend, "config", None))
        plan = replace(plan, segment=segment, activations=activations)
        if limit is None or plan.prefill_total <= limit:
            break
    return plan


def has_own_memory(device: jax.Device) -> bool:
    """Whether the device's memory is another than the host's."""
    return device.platform != "cpu"


def segments(size: int) -> list[int]:
    """Lengths of prefill's segments to try, the fastest first; shorter ones hold less at a time."""
    longest = segment_of(size)
    return [longest >> halved for halved in range(3) if longest >> halved >= SEGMENT] or [longest]


def activation_bytes(config: ModelConfig, ctx: int, width: int, tokens: int, hga: HGAConfig | None) -> int:
    """Bytes of prefill's temporaries with segments of `tokens` tokens, `width` bytes a value: the super-block's activations and the larger
    of a segment's two halves.

    Attention: input, normalised input, float32 products of q, k, v, the same turned, outputs. Expert MLP: a row of F and one of D for each
    token and chosen expert (see pallas_kernels.moe_prefill), input, normalised input, output. Beside them, unless attention is dense (`hga`
    None), what routing makes for a layer: the history's keys as their sketches remember them, page means, page lists, and a byte a block
    and page in up to six tables; where all sketches are scanned, the keys in 8 bits as well.
    """
    size, hidden = padded_size(ctx, SEGMENT, SUPER_BLOCK), config.hidden_size
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim
    attention = tokens * (2 * hidden * width + heads * (4 + 2 * width) + config.heads * config.head_dim * width)
    mlp = tokens * (3 * hidden * width + 3 * config.mlp_size * width)
    if config.experts:
        mlp = tokens * (3 * hidden * width + config.experts_per_token * (config.expert_size + hidden) * 2)
    routing = 0
    if hga is not None:
        blocks, pages = tokens // hga.chunk_size + 1, ctx // hga.group_size
        key = config.head_dim * (width if hga.screened(ctx) else width + 1)
        routing = config.kv_heads * (ctx * key + pages * config.head_dim * width + blocks * (3 * hga.page_capacity * 8 + 6 * pages))
    return size * hidden * width + max(attention, mlp) + routing + 2 * config.vocab_size * 4


def place_history(
    config: ModelConfig,
    backend: AttentionBackend,
    ctx: int,
    dtype: Any,
    kv_store: str,
    host_memory: float | None = None,
    device: jax.Device | None = None,
) -> tuple[AttentionBackend, Plan]:
    """The backend with its history in the tier that `kv_store` asks for, and the plan of the run.

    host_memory: GiB for the page cache of a history on disk (default: a quarter of what is free). For such a history the backend is the
    one that prefill runs on the device, a layer at a time.
    Raises ValueError when the backend has no such tier; whether the plan fits is for the caller to check.
    """
    plan = make_plan(config, backend, ctx, dtype, device)
    if kv_store == "auto" and tier_of(backend) == "host":
        return backend, plan
    movable = isinstance(backend, HGAAttention)
    tier = choose_tier(kv_store, device_fits=plan.fits or not movable)
    if tier == tier_of(backend):
        return backend, plan
    if not movable:
        raise ValueError(f"--kv-store {kv_store} needs attention hga: dense attention reads its whole history for every token")
    if tier == "disk":
        plan = _plan_on_disk(config, backend, ctx, dtype, host_memory, device)
        return replace(backend, tier="device", bank_pages=0, host_summaries=0), plan
    backend = replace(backend, tier=tier)
    plan = make_plan(config, backend, ctx, dtype, device)
    layers = _layers_on_host(config, backend, plan, dtype, device)
    if layers:
        backend = replace(backend, host_summaries=layers)
        plan = make_plan(config, backend, ctx, dtype, device)
    bank = _bank_pages(config, backend, plan, dtype)
    if not bank:
        return backend, plan
    backend = replace(backend, bank_pages=bank)
    return backend, make_plan(config, backend, ctx, dtype, device)


def _layers_on_host(config: ModelConfig, backend: HGAAttention, plan: Plan, dtype: Any, device: jax.Device | None) -> int:
    """In how many layers the summaries' largest array must stay in host memory for decoding to fit: as few as possible."""
    if not plan.host or plan.limit is None:
        return 0
    short = plan.decode_total + DECODE_ROOM - plan.limit
    each = make_plan(config, replace(backend, host_summaries=1), plan.ctx, dtype, device).host_summaries
    return min(max(-(-short // each), 0), config.layers)


def _bank_pages(config: ModelConfig, backend: HGAAttention, plan: Plan, dtype: Any) -> int:
    """Pages of a kv head that fit on the device beside everything else, at most a share of the history; 0 where a bank is of no use."""
    if plan.tier != "host" or not plan.host or plan.limit is None or backend.config.policy != "sketch":
        return 0
    group = backend.config.group_size
    heads, number = config.layers * config.kv_heads, jnp.dtype(jnp.int32).itemsize  # tables: of the slots, and of the pages of the history
    page_bytes = heads * (2 * group * config.head_dim * jnp.dtype(dtype).itemsize + number)
    spare = plan.limit - DECODE_ROOM - plan.decode_total - heads * number * (-(-plan.ctx // group) + backend.config.groups_per_chunk)
    return max(min(int(spare // page_bytes), int(plan.ctx // group * BANK_SHARE)), 0)


def _plan_on_disk(
    config: ModelConfig, backend: HGAAttention, ctx: int, dtype: Any, host_memory: float | None, device: jax.Device | None
) -> Plan:
    """Of a history on disk, memory holds one layer at a time in prefill, and a page cache on the host."""
    plan = make_plan(config, replace(backend, tier="host", bank_pages=0, host_summaries=0), ctx, dtype, device, parks=False)
    cache = min(page_cache_bytes(host_memory), plan.history)
    on_cpu = plan.memory == MAIN_MEMORY
    return replace(plan, tier="disk", history=cache, host=0 if on_cpu else cache, host_limit=None if on_cpu else _main_memory()[1])


def page_cache_bytes(host_memory: float | None) -> int:
    """Bytes of host memory for the pages of a history on disk, from GiB asked for."""
    return round(host_memory * GIB) if host_memory is not None else (_main_memory()[1] or 16 * GIB) // 4


def tier_of(backend: AttentionBackend) -> str:
    return backend.tier if isinstance(backend, HGAAttention) else "device"


def purpose(path: tuple) -> str:
    """What a leaf of an attention state, by its path, is held for: history, windows, bank or summaries."""
    names = _names(path)
    if "bank" in names:
        return "bank"
    if "window" in names:
        return "windows"
    return "history" if "pages" in names else "summaries"


def _names(path: tuple) -> list[str | None]:
    return [getattr(part, "name", None) for part in path]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _memory(device: jax.Device) -> tuple[str, int | None]:
    """Name and size of what the plan must fit into: the allocator's limit on an accelerator, available memory on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return f"{device.device_kind} memory", int(stats["bytes_limit"])
    return _main_memory()


def _main_memory() -> tuple[str, int | None]:
    try:
        with open("/proc/meminfo") as lines:
            table = dict(line.split(":", 1) for line in lines)
        return MAIN_MEMORY, int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return "main memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return "main memory", None
