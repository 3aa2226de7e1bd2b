"""The byte table: what a run will hold and where, counted from shapes before anything is read or allocated; and the tier it decides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from hga_jax.attention import HGAAttention
from hga_jax.backend import DENSE_CHUNK, KEYS_AT_ONCE_CUDA, QUERIES_AT_ONCE_CUDA, AttentionBackend, DenseAttention
from hga_jax.cache.host import PINNED_LIMIT, allow_pinning, pinned_limit
from hga_jax.cache.tiers import choose_tier
from hga_jax.config import HGAConfig, ModelConfig
from hga_jax.decoding import cannot_decode
from hga_jax.model import Decoder, weight_leaves
from hga_jax.placement import EXPERTS, hosted_layers, on_host
from hga_jax.programs import LAYERS_UNDER_WAY, SEGMENT, SUPER_BLOCK, padded_size, segment_of
from pallas_kernels.dispatch import on_cuda
from pallas_kernels.limits import MAX_ELEMENTS

GIB = 2**30
BANK_SHARE = 1 / 8  # of the history's pages: several times what is open at a time at 64K, so that hardly one is fetched twice
# Bytes of a device beside what is planned for by name: decoding's temporaries and what the allocator adds, which leaves a free piece whole
# rather than cut less than 128 MiB off it, and counts it as used. Qwen3-30B-A3B-FP8 on an H100 peaked 0.07 GiB above the named bytes at
# 65,536 tokens, 0.251 GiB at 261,888, and with 4 of its layers 0.267 GiB (273 MiB) at 262,080: two such pieces and a little.
RESERVE = 288 * 2**20
PIECE = 128 * 2**20  # a last piece of memory smaller than this is given out whole, so that a plan which leaves less leaves nothing
BANK_WORTH = 128  # pages of a kv head: about what a token sees, read from host memory for every token unless they are in a bank
PCIE = 46e9  # bytes a second, measured on PCIe 5 x16
MAIN_MEMORY = "available main memory"


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, the memory they share and its limit (None: unknown).

    host_weights: bytes of weights that lie in pinned host memory, outside the total; host_experts: of them the experts of expert_layers
    layers, of which a token reads expert_reads over PCIe. Prefill brings one layer's at a time to the device (streamed).
    host: bytes of `history` that lie in host memory instead, and host_limit what there is of it; working: the device buffer that one
    layer's history passes through in prefill. Both 0 with the device tier. super_block: tokens that prefill takes through a layer before
    the next layer starts, segment: at a time.
    prefill_summaries: bytes of `summaries` on the device while prefill is at work. host_summaries: bytes of them that stay in host memory
    while decoding, the largest array of `host_layers` layers: what every token reads over PCIe. reserve: left free for what has no name.
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
    super_block: int = SUPER_BLOCK
    segment: int = 0
    prefill_summaries: int = 0
    host_summaries: int = 0
    host_layers: int = 0
    host_experts: int = 0
    expert_layers: int = 0
    expert_reads: int = 0
    streamed: int = 0
    reserve: int = 0

    @property
    def portions(self) -> dict[str, int]:
        """What programs.prefill_blocks is to take at a time."""
        return {"segment": self.segment, "super_block": self.super_block}

    @property
    def lasting(self) -> int:
        """Bytes held through prefill and decoding, summaries apart."""
        return self.weights + self.history - self.host + self.windows

    @property
    def prefill_total(self) -> int:
        """Bytes in the memory that is planned for, while prefill is at work."""
        return self.lasting + self.prefill_summaries + self.working + self.streamed + self.activations

    @property
    def decode_total(self) -> int:
        """The same while decoding."""
        return self.lasting + self.summaries - self.host_summaries + self.bank

    @property
    def total(self) -> int:
        """The larger of the two, since prefill's buffers are given up before decoding takes its own, and the reserve."""
        return max(self.prefill_total, self.decode_total) + self.reserve

    def table(self) -> str:
        """The plan as lines of text, GiB."""
        notes = {
            "weights": "",
            "history": f"K and V of {self.ctx:,} tokens, all layers; tier: {self.tier}",
            "summaries": self._where_summaries(),
            "windows": "within the history in this tier" if not self.windows else "sinks, local window and open chunk",
            "bank": "none" if not self.bank else "routed pages kept on the device, from the end of prefill on",
            "working": "none in this tier" if not self.working else "one layer's history during prefill",
            "activations": f"{min(self.super_block, self.ctx):,} tokens; projections and MLP of {self.segment:,} at a time; logits",
        }
        if self.reserve:
            notes["reserve"] = "temporaries and fragments"
        lines = [f"{'':14}{'GiB':>9}"]
        lines += [f"{name:14}{getattr(self, name) / GIB:9.3f}  {note}".rstrip() for name, note in notes.items()]
        beside = f"; the history ({self.host / GIB:.3f}) is in host memory" if self.host else ""
        phases = f"{self.prefill_total / GIB:.3f} in prefill, {self.decode_total / GIB:.3f} in decoding"
        lines.append(f"{'total':14}{self.total / GIB:9.3f}  in {self.memory}: {phases}{beside}")
        if table := self.host_weights - self.host_experts:
            lines.append(f"{'embedding':14}{table / GIB:9.3f}  in pinned host memory: a token reads one row")
        if self.host_experts:
            lines.append(
                f"{'experts':14}{self.host_experts / GIB:9.3f}  in pinned host memory, those of {self.expert_layers} layers: "
                f"{_over_pcie(self.expert_reads)}; prefill has one layer's on the device ({self.streamed / GIB:.3f})"
            )
        if self.limit is not None:
            lines.append(f"{'available':14}{self.limit / GIB:9.3f}")
        return "\n".join(lines)

    def _where_summaries(self) -> str:
        note = "what routing reads"
        if self.prefill_summaries < self.summaries:
            note += f"; {self.prefill_summaries / GIB:.3f} of it on the device in prefill"
        if self.host_summaries:
            where = f"{self.host_summaries / GIB:.3f}, those of {self.host_layers} layers, in host memory in decoding"
            note += f"; {where}: {_over_pcie(self.host_summaries)}"
        return note

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit

    def check(self) -> None:
        """Raises ValueError with the table and what each knob frees when the plan does not fit."""
        if self.host_limit is not None and self.host > self.host_limit:
            pinned = f" ({PINNED_LIMIT}, read when JAX starts, bounds what it pins)" if self.host_limit == pinned_limit() else ""
            raise ValueError(
                f"the history needs {self.host / GIB:.2f} GiB of host memory and {self.host_limit / GIB:.2f} GiB are available{pinned}: "
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


def _over_pcie(read: int) -> str:
    return f"a token reads {read / 1e6:,.0f} MB over PCIe (about {read / PCIE * 1e3:.1f} ms on PCIe 5 x16)"


def make_plan(
    config: ModelConfig,
    backend: AttentionBackend,
    ctx: int,
    dtype: Any,
    device: jax.Device | None = None,
    *,
    parks: bool = True,
    host_experts: int = 0,
) -> Plan:
    """Count the bytes of a run of `ctx` tokens. Nothing is read or allocated. host_experts: as in placement.on_host.

    parks: whether the host tier's summaries are on the device for two layers at a time in prefill; a history on disk keeps them all there.
    """
    device = device or jax.devices()[0]
    leaves = _weight_bytes(config, jnp.dtype(dtype).name)
    hosted = {path: size for path, size in leaves.items() if on_host(path, config, device, host_experts)}
    experts = sum(size for path, size in hosted.items() if EXPERTS.fullmatch(path))
    expert_layers = len(hosted_layers(config, host_experts)) if experts else 0
    host_weights, weights = sum(hosted.values()), sum(leaves.values()) - sum(hosted.values())
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
        host=sizes["history"] if apart else 0, host_limit=_host_limit() if apart else None,
        prefill_summaries=sizes["summaries"] - parked, host_summaries=host_layers * max(movable), host_layers=host_layers,
        host_experts=experts, expert_layers=expert_layers, streamed=experts // max(expert_layers, 1),
        expert_reads=experts * config.experts_per_token // max(config.experts, 1), reserve=0 if memory == MAIN_MEMORY else RESERVE,
    )  # fmt: skip
    for super_block, segment in portions(ctx):
        size = padded_size(ctx, SEGMENT, super_block)
        activations = activation_bytes(config, ctx, jnp.dtype(dtype).itemsize, size, segment, getattr(backend, "config", None))
        plan = replace(plan, super_block=super_block, segment=segment, activations=activations)
        if limit is None or plan.prefill_total + plan.reserve <= limit:
            break
    if plan.reserve and limit is not None and 0 < limit - plan.total < PIECE:
        plan = replace(plan, reserve=plan.reserve + limit - plan.total)
    return plan


@cache
def _weight_bytes(config: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes of every weight by its path."""
    return {path: _bytes(leaf) for path, leaf in weight_leaves(Decoder.abstract(config, jnp.dtype(dtype))).items()}


def has_own_memory(device: jax.Device) -> bool:
    """Whether the device's memory is another than the host's."""
    return device.platform != "cpu"


def portions(ctx: int) -> list[tuple[int, int]]:
    """(super-block, segment) to take prefill in, the fastest first; shorter ones hold less at a time. A history in host memory is read once
    a super-block.
    """
    longest = segment_of(padded_size(ctx, SEGMENT, SUPER_BLOCK))
    segments = [longest >> halved for halved in range(4) if longest >> halved >= SEGMENT] or [longest]
    shorter = [(SUPER_BLOCK // 2, segment) for segment in segments if ctx > SUPER_BLOCK]
    return [(SUPER_BLOCK, segment) for segment in segments] + shorter


def activation_bytes(config: ModelConfig, ctx: int, width: int, size: int, tokens: int, hga: HGAConfig | None) -> int:
    """Bytes of prefill's temporaries with super-blocks of `size` tokens and segments of `tokens`, `width` bytes a value: the super-block's
    activations and the largest of a segment's three parts.

    Activations between layers are float32. Projections: input, normalised input, float32 products of q, k, v, the same turned, outputs.
    Dense attention (`hga` None): q, k, v, outputs, and the scores of a block of queries and keys or page lists. Else q, k, v, outputs, and
    what routing makes for a layer: the history's keys as their sketches remember them, page means, page lists, and a byte a block and page
    in up to six tables. Expert MLP: a row of F and one of D for each token and chosen expert (see pallas_kernels.moe_prefill), input,
    normalised input, output.
    The compiler's own figures for Qwen3-30B-A3B-FP8, segments of 16,384 tokens, are below these: 0.75 GiB where this says 0.88 (262,144
    tokens), 0.86 and 1.09 (524,288), 1.52 and 1.81 (1,048,576), the super-block's activations apart.
    """
    hidden = config.hidden_size
    heads, out = (config.heads + 2 * config.kv_heads) * config.head_dim, config.heads * config.head_dim
    projections = tokens * (hidden * (4 + width) + heads * (4 + 2 * width) + out * width)
    mlp = tokens * (hidden * (8 + width) + 3 * config.mlp_size * width)
    if config.experts:
        mlp = tokens * (hidden * (8 + width) + config.experts_per_token * (config.expert_size + hidden) * 2)
    attention = 0
    if hga is None and on_cuda():
        scores = 2 * 4 * config.heads * QUERIES_AT_ONCE_CUDA * KEYS_AT_ONCE_CUDA  # and their exponentials
        lists = 2 * 4 * config.kv_heads * (tokens // DENSE_CHUNK + 1) * (ctx // DenseAttention.page_size)
        attention = tokens * (hidden * 4 + (heads + out) * width) + max(scores, lists)
    if hga is not None:
        blocks, pages = tokens // hga.chunk_size + 1, ctx // hga.group_size
        routing = config.kv_heads * ((ctx + pages) * config.head_dim * width + blocks * (3 * hga.page_capacity * 8 + 6 * pages))
        attention = tokens * (hidden * 4 + (heads + out) * width) + routing
    return size * hidden * 4 + max(projections, attention, mlp) + 2 * config.vocab_size * 4


def place_history(
    config: ModelConfig,
    backend: AttentionBackend,
    ctx: int,
    dtype: Any,
    kv_store: str,
    host_memory: float | None = None,
    device: jax.Device | None = None,
    host_experts: int = 0,
) -> tuple[AttentionBackend, Plan]:
    """The backend with its history in the tier that `kv_store` asks for, and the plan of the run.

    host_experts: layers whose experts lie in host memory, see `layers_to_host`.

    host_memory: GiB for the page cache of a history on disk (default: a quarter of what is free). For such a history the backend is the
    one that prefill runs on the device, a layer at a time.
    Raises ValueError when the backend has no such tier; whether the plan fits is for the caller to check.
    """
    make = partial(make_plan, config, ctx=ctx, dtype=dtype, device=device, host_experts=host_experts)
    plan = make(backend)
    if kv_store == "auto" and tier_of(backend) == "host":
        return backend, plan
    movable = isinstance(backend, HGAAttention)
    tier = choose_tier(kv_store, device_fits=plan.fits or not movable)
    if tier == tier_of(backend):
        return backend, plan
    if not movable:
        raise ValueError(f"--kv-store {kv_store} needs attention hga: dense attention reads its whole history for every token")
    if tier == "disk":
        on_disk = replace(backend, tier="device", bank_pages=0, host_summaries=0)
        return on_disk, _plan_on_disk(make(replace(on_disk, tier="host"), parks=False), host_memory)
    if tier == "host" and has_own_memory(device or jax.devices()[0]):
        _check_indices(config, backend.config, ctx)
    backend = replace(backend, tier=tier)
    backend = replace(backend, host_summaries=_layers_of_summaries(backend, make))
    backend = replace(backend, bank_pages=_bank_pages(config, backend, make(backend), dtype))
    return backend, make(backend)


def _check_indices(config: ModelConfig, hga: HGAConfig, ctx: int) -> None:
    """Raises ValueError for a history in host memory that the kernels cannot take, and nothing else reads that memory in place."""
    capacity = -(-ctx // hga.chunk_size) * hga.chunk_size
    reason = cannot_decode(hga, config.heads, config.kv_heads, capacity, config.head_dim)
    if reason is None:
        return
    if cannot_decode(hga, config.heads, config.kv_heads, hga.chunk_size, config.head_dim) is not None:
        raise ValueError(f"a history in host memory needs the decode kernels: {reason}; --kv-store device does without")
    most = (MAX_ELEMENTS // (2 * config.kv_heads * config.head_dim) - 1) // hga.chunk_size * hga.chunk_size
    raise ValueError(f"{reason}, which the kernels' int32 offsets cannot reach: --ctx {most} is the most for this model")


def layers_to_host(
    config: ModelConfig, backend: AttentionBackend, ctx: int, dtype: Any, kv_store: str, device: jax.Device | None = None
) -> int:
    """In how many layers the experts had best lie in host memory, to be decided before the weights are loaded.

    As few as leave room on the device for all summaries, for prefill, and for a bank of what a token sees; 0 where that is so anyway, or
    cannot be reached.
    """
    most = len(hosted_layers(config, config.layers))
    for count in range(most + 1):
        placed, plan = place_history(config, backend, ctx, dtype, kv_store if count == 0 else "host", device=device, host_experts=count)
        if plan.tier != "host" or not plan.host or (count and not plan.host_experts):
            return 0
        wanted = min(BANK_WORTH, ctx // placed.config.group_size * BANK_SHARE) if placed.config.policy == "sketch" else 0
        if plan.fits and not plan.host_layers and placed.bank_pages >= int(wanted):
            return count
    return 0


def _layers_of_summaries(backend: HGAAttention, make: Callable[[HGAAttention], Plan]) -> int:
    """In how many layers the summaries' largest array must stay in host memory for decoding to fit: as few as possible."""
    plan, each = make(backend), make(replace(backend, host_summaries=1)).host_summaries
    if not plan.host or plan.limit is None:
        return 0
    return max(-((plan.limit - plan.decode_total - RESERVE) // each), 0)


def _bank_pages(config: ModelConfig, backend: HGAAttention, plan: Plan, dtype: Any) -> int:
    """Pages of a kv head that fit on the device beside everything else, at most a share of the history; 0 where a bank is of no use."""
    if plan.tier != "host" or not plan.host or plan.limit is None or backend.config.policy != "sketch":
        return 0
    group = backend.config.group_size
    heads, number = config.layers * config.kv_heads, jnp.dtype(jnp.int32).itemsize  # tables: of the slots, and of the pages of the history
    page_bytes = heads * (2 * group * config.head_dim * jnp.dtype(dtype).itemsize + number)
    spare = plan.limit - RESERVE - plan.decode_total - heads * number * (-(-plan.ctx // group) + backend.config.groups_per_chunk)
    return max(min(int(spare // page_bytes), int(plan.ctx // group * BANK_SHARE)), 0)


def _plan_on_disk(plan: Plan, host_memory: float | None) -> Plan:
    """Of a history on disk, memory holds one layer at a time in prefill, and a page cache on the host."""
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


def _host_limit() -> int:
    """Bytes of main memory that can be pinned."""
    available = _main_memory()[1]
    return pinned_limit() if available is None else min(available, pinned_limit())


def allow_pinning_all() -> None:
    """Let JAX pin all main memory there is now; for commands, before JAX looks for devices."""
    available = _main_memory()[1]
    if available is not None:
        allow_pinning(available)


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
