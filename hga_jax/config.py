"""Settings as frozen data: the model's, RoPE's and the attention policy's. Nothing here computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pallas_kernels.votes import ENOUGH

POLICIES = ("sketch", "paper")
SUMMARIES = ("mixed_rope", "mean")
# Thresholds of the sketch policy per query head that shares a kv head. A request of one head opens the page for all G of them, so at equal
# quality the threshold may grow with G. "balanced", with votes: SmolLM2 (G = 3) loses 0.001 nats at 4K tokens, 0.002 at 8K, for about the
# paper policy's tokens (eval/README.md, also for Qwen2.5-Coder, G = 7).
QUALITY = {"fast": 0.008 / 3, "balanced": 0.001, "best": 0.001 / 3}
# Where votes keep pages open, thresholds this much higher open about as many (eval/README.md).
VOTES_THRESHOLD = 1.7
# Tokens of history room up to which prefill scans whole sketches; beyond, scanning a quarter of the rotary pairs saves more than half: 18.3
# ms a layer in place of some 45 at 65,536 tokens.
PAIRS_FROM = 16384
# Room beyond which every fourth query scans them and not every second: 10.0 in place of 12.9 ms a layer at 65,536 tokens (every query:
# 18.0).
FOURTHS_FROM = 32768
# Tokens below which cuDNN's dense attention is about as fast on an H100, and exact: 3.9 ms a layer at 16,384 (routing and routed attention
# 3.0), 14.9 at 32,768 (7.0), 32 heads of 128.
DENSE_BELOW = 16384
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def parse_threshold(text: str) -> float | str:
    """A level of QUALITY or a number, from a command line. Raises ValueError."""
    if text in QUALITY:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"threshold {text!r}: choose {', '.join(QUALITY)} or a number between 0 and 1") from None


@dataclass(frozen=True)
class HGAConfig:
    """Which tokens a query attends to.

    chunk_size, group_size: tokens in a chunk (64) and in a group (16); a group is one page, the unit that is fetched.
    sink_chunks, local_chunks: the first chunks, and the chunks just before the query's own, always attended.
    policy: "sketch" (causal threshold on estimated attention mass) or "paper" (arXiv 2606.30709: top chunks, then top groups).
    threshold: sketch policy, the share of a query's attention mass above which a page is opened (0 < threshold < 1), or a level of QUALITY,
    whose threshold depends on how many query heads share a kv head.
    votes, vote_share, vote_stride: sketch policy, what keeps a page open for the next chunk: `votes` (query, head) pairs of the chunk's
    queries at positions p with p % vote_stride == 0 have vote_share of the threshold there, whether or not one of them asked for it.
    "auto": a 28th of the pairs (4 of the 112 of 7 heads). 0: any request does, and "threshold" levels are lower.
    sketch_pairs: sketch policy, in how many rotary pairs sketches remember residuals: those in which the residuals of the sinks are
    largest; the others count as zero. 0: all. What that brings and costs: eval/README.md.
    page_capacity: sketch policy, the most routed pages of a kv head open at a time; further requests are refused, in query order.
    Decode kernels keep several lists a kv head, with room for as many pages twice over, and refuse when one is full.
    screening: sketch policy, how prefill finds pages. "off": every query scans every token. "on": every screen_stride-th query looks at
    each page's mean key plus screen_spread standard deviations; pages that reach screen_margin of the threshold, as a share of the windows'
    mass, are candidates from there to the end of the next chunk. Every request_stride-th query requests those of them whose sketches reach
    screen_threshold of the threshold. Decode always scans everything. Screening finds no votes.
    scan_pairs: sketch policy, 0 or in how many rotary pairs prefill scans tokens, in place of sketches: a page counts as its mean key and,
    in those pairs alone, the largest of its tokens' deviations from that. For each kv head they are the pairs in which the first queries
    and keys of the sequence, those that have nothing to route, have the largest products of energies; where none of those queries was seen
    (a history begun by other means than prefill) prefill goes by sketches. Decode does always, so that where a prompt ends changes which
    pages are open to the tokens behind. "auto": on an NVIDIA GPU, in histories with room for more than PAIRS_FROM tokens, a quarter of the
    pairs, which costs half the time; what it costs in loss: eval/README.md.
    scan_stride: where pairs are scanned, queries at positions p with p % scan_stride == 0 do so and ask for pages; the others see what was
    asked for before them. "auto": 2, and 4 in histories with room for more than FOURTHS_FROM tokens, as far as vote_stride is a multiple.
    pairs_threshold: factor on the threshold then, for scores are lower without the other pairs; 0: the one with which about as many tokens
    are opened as by sketches.
    dense_below: a prompt's first call of at most so many tokens attends to everything, which is faster there as well as exact; "auto": up
    to the crossover measured on NVIDIA GPUs, 0 elsewhere.
    top_chunks, top_groups, summary: paper policy; `top_groups // 2` is what each single query requests.
    """

    chunk_size: int = 64
    group_size: int = 16
    sink_chunks: int = 2
    local_chunks: int = 8
    policy: Literal["sketch", "paper"] = "sketch"
    threshold: float | Literal["fast", "balanced", "best"] = "balanced"
    votes: int | Literal["auto"] = "auto"
    vote_share: float = 0.1
    vote_stride: int = 4
    sketch_pairs: int = 0
    page_capacity: int = 1024
    screening: Literal["on", "off"] = "off"
    screen_stride: int = 4
    request_stride: int = 1
    screen_spread: float = 3.0
    screen_margin: float = 1 / 16
    screen_threshold: float = 0.25
    scan_pairs: int | Literal["auto"] = "auto"
    pairs_threshold: float = 0.0
    scan_stride: int | Literal["auto"] = "auto"
    dense_below: int | Literal["auto"] = 0
    top_chunks: int = 16
    top_groups: int = 64
    summary: Literal["mixed_rope", "mean"] = "mixed_rope"

    def __post_init__(self):
        if self.group_size <= 0 or self.chunk_size <= 0 or self.chunk_size % self.group_size:
            raise ValueError(f"chunk_size={self.chunk_size} must be a positive multiple of group_size={self.group_size}")
        if self.sink_chunks < 0 or self.local_chunks < 0:
            raise ValueError(f"sink_chunks={self.sink_chunks} and local_chunks={self.local_chunks} must not be negative")
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: choose one of {', '.join(POLICIES)}")
        if isinstance(self.threshold, str) and self.threshold not in QUALITY:
            raise ValueError(f"threshold={self.threshold!r}: choose {', '.join(QUALITY)} or a number between 0 and 1")
        if not isinstance(self.threshold, str) and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1 (0.004 is a good start)")
        if self.votes != "auto" and (isinstance(self.votes, str) or not 0 <= self.votes <= ENOUGH):
            raise ValueError(f'votes={self.votes!r}: choose "auto" or a number from 0 to {ENOUGH}')
        if not 0 < self.vote_share <= 1:
            raise ValueError(f"vote_share={self.vote_share} must lie in (0, 1]")
        if self.counts_votes and self.screening == "on":
            raise ValueError(f"screening='on' finds no votes: choose off, or votes=0 in place of {self.votes}")
        if self.sketch_pairs < 0:
            raise ValueError(f"sketch_pairs={self.sketch_pairs} must not be negative")
        if self.policy == "sketch" and self.sketch_pairs and self.sink_chunks == 0:
            raise ValueError(f"sketch_pairs={self.sketch_pairs} are chosen by the keys of the sinks: sink_chunks must be at least 1")
        if self.page_capacity < 1:
            raise ValueError(f"page_capacity={self.page_capacity} must be at least 1")
        if self.screening not in ("on", "off"):
            raise ValueError(f"screening={self.screening!r}: choose on or off")
        if self.scan_stride != "auto" and isinstance(self.scan_stride, str):
            raise ValueError(f'scan_stride={self.scan_stride!r}: choose "auto" or a number of positions')
        for name in ("screen_stride", "request_stride", "vote_stride", *(() if self.scan_stride == "auto" else ("scan_stride",))):
            if getattr(self, name) < 1 or self.chunk_size % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide chunk_size={self.chunk_size}")
        if self.counts_votes and self.scan_stride != "auto" and self.vote_stride % self.scan_stride:
            raise ValueError(
                f"vote_stride={self.vote_stride} must be a multiple of scan_stride={self.scan_stride}: queries that do not scan cannot vote"
            )
        if self.screen_spread < 0 or not 0 < self.screen_margin <= 1 or self.screen_threshold <= 0:
            raise ValueError(
                f"screen_spread={self.screen_spread} must not be negative, screen_margin={self.screen_margin} must lie in (0, 1] and "
                f"screen_threshold={self.screen_threshold} be positive"
            )
        if self.scan_pairs != "auto" and (isinstance(self.scan_pairs, str) or self.scan_pairs < 0):
            raise ValueError(f'scan_pairs={self.scan_pairs!r}: choose "auto" or a number of pairs')
        if not self.pairs_threshold >= 0:
            raise ValueError(f"pairs_threshold={self.pairs_threshold} must not be negative")
        if self.dense_below != "auto" and (isinstance(self.dense_below, str) or self.dense_below < 0):
            raise ValueError(f'dense_below={self.dense_below!r}: choose "auto" or a number of tokens')
        if self.top_chunks < 1 or self.top_groups < 2:
            raise ValueError(f"top_chunks={self.top_chunks} must be at least 1 and top_groups={self.top_groups} at least 2")
        if self.summary not in SUMMARIES:
            raise ValueError(f"summary={self.summary!r}: choose one of {', '.join(SUMMARIES)}")

    @property
    def groups_per_chunk(self) -> int:
        return self.chunk_size // self.group_size

    @property
    def sink_pages(self) -> int:
        return self.sink_chunks * self.groups_per_chunk

    @property
    def unrouted(self) -> int:
        """Tokens at the start of a sequence whose queries have nothing to route: windows cover what they see."""
        return (self.sink_chunks + self.local_chunks + 1) * self.chunk_size

    @property
    def lists_pages(self) -> bool:
        """Whether prefill goes by page lists on every machine, because only they do what is asked for."""
        return self.policy == "sketch" and (self.screening == "on" or self.scan_pairs not in ("auto", 0))

    @property
    def counts_votes(self) -> bool:
        """Whether votes keep pages open for the next chunk, and not any request."""
        return self.policy == "sketch" and self.votes != 0 and not (self.votes == "auto" and self.screening == "on")

    def votes_for(self, queries_per_kv_head: int) -> int:
        """Votes that keep a page open for the next chunk when so many query heads share a kv head; 0: any request does."""
        if not self.counts_votes:
            return 0
        pairs = self.chunk_size // self.vote_stride * queries_per_kv_head
        return min(max(round(pairs / 28), 1), ENOUGH) if self.votes == "auto" else self.votes

    def sketched_pairs(self, head_dim: int) -> int:
        """In how many rotary pairs sketches remember residuals."""
        return self.sketch_pairs or head_dim // 2

    def pairs_for(self, room: int, head_dim: int) -> int:
        """In how many rotary pairs prefill by page lists scans a history with room for so many tokens; 0: by sketches."""
        if self.policy != "sketch" or self.screening == "on":
            return 0
        return (head_dim // 8 if room > PAIRS_FROM else 0) if self.scan_pairs == "auto" else self.scan_pairs

    def scan_stride_for(self, room: int) -> int:
        """Every how manyth query scans the pairs of a history with room for so many tokens."""
        if self.scan_stride != "auto":
            return self.scan_stride
        wanted = 4 if room > FOURTHS_FROM else 2
        return math.gcd(wanted, self.chunk_size, self.vote_stride if self.counts_votes else wanted)

    def dense_up_to(self, fused: bool) -> int:
        """Tokens of a prompt's first call up to which attention is dense; fused: whether cuDNN's attention takes its arrays."""
        return (DENSE_BELOW if fused else 0) if self.dense_below == "auto" else self.dense_below

    def threshold_for(self, queries_per_kv_head: int) -> float:
        """The share of attention mass that opens a page when so many query heads share a kv head."""
        if not isinstance(self.threshold, str):
            return self.threshold
        return QUALITY[self.threshold] * queries_per_kv_head * (VOTES_THRESHOLD if self.counts_votes else 1)

    def pairs_threshold_for(self, pairs: int, head_dim: int) -> float:
        """The factor on the threshold where tokens are scanned in so many rotary pairs."""
        if self.pairs_threshold:
            return self.pairs_threshold
        # Fitted to SmolLM2-135M, 4,096 tokens of source code and of a novel: 0.38, 0.60, 0.72, 0.83 for 1/8, 1/4, 3/8, 1/2 of the pairs.
        return 1 - 0.72 * (1 - 2 * pairs / head_dim) ** 2


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, half-split convention: pair i is dims (i, i + H/2), frequency theta^(-2i/H), positions from 0.

    scaling: None, or one of LinearScaling, Llama3Scaling, YarnScaling.
    """

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self):
        if not self.theta > 0:
            raise ValueError(f"rope theta={self.theta} must be positive")


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rule: low frequencies divided by `factor`, high ones kept, a ramp between the two."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071). attention_factor None: 0.1 ln(factor) + 1, or from mscale and mscale_all_dim when both are given."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def resolved_attention_factor(self) -> float:
        def magnitude(scale: float, weight: float) -> float:
            return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
        return magnitude(self.factor, 1.0)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape, read from a checkpoint's config.json by `from_hf`; letters as in the README (D, N, K, H, F, E, V)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    native_context: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None
    fp8_skip: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.heads} must be a multiple of num_key_value_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError(f"num_experts_per_tok={self.experts_per_token} must lie between 1 and num_experts={self.experts}")

    @property
    def queries_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    def is_moe_layer(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers

    def is_fp8(self, module: str) -> bool:
        """Whether a projection, by its name in the checkpoint ("model.layers.0.self_attn.q_proj"), is stored as FP8.

        An entry of the checkpoint's modules_to_not_convert covers the module of that name, all below it, and all whose name ends with it.
        """
        skipped = any(module == name or module.startswith(name + ".") or module.endswith("." + name) for name in self.fp8_skip)
        return self.fp8_block is not None and not skipped

    def with_rope(self, rope: RopeConfig) -> ModelConfig:
        return replace(self, rope=rope)

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
        """Read the dict of a Hugging Face config.json. Raises ValueError naming the key when something is missing or unsupported."""
        return _model_config_from_hf(raw)


def _model_config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type={kind!r} is not supported: supported are {', '.join(MODEL_TYPES)}")

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"config.json of this {kind} model lacks {key!r}")
        return raw[key]

    context = int(need("max_position_embeddings"))
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", kind == "mistral") else None  # 4096: what an absent key means
    if window and int(window) < context:
        raise ValueError(f"sliding_window={window} is not supported: only full attention layers (sliding_window: null) are")
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported: only silu is")
    heads, hidden, layers = int(need("num_attention_heads")), int(need("hidden_size")), int(need("num_hidden_layers"))
    moe = kind == "qwen3_moe"
    dense_layers: tuple[int, ...] = ()
    if moe:
        step, listed = int(raw.get("decoder_sparse_step", 1)), set(raw.get("mlp_only_layers") or ())
        dense_layers = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
    eos = raw.get("eos_token_id")
    fp8_block, fp8_skip = _fp8_from_hf(raw.get("quantization_config"))
    bias = bool(raw.get("attention_bias", False))
    experts_key = "num_experts" if "num_experts" in raw else "num_local_experts"  # the second is what transformers 5 saves
    return ModelConfig(
        model_type=kind, vocab_size=int(need("vocab_size")), hidden_size=hidden, layers=layers, heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads), head_dim=int(raw.get("head_dim") or hidden // heads),
        mlp_size=int(need("intermediate_size")), native_context=context,
        rope=rope_from_hf(raw, context), rms_eps=float(need("rms_norm_eps")),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        qkv_bias=True if kind == "qwen2" else bias,  # Qwen2 always has them and its config.json does not say so
        output_bias=False if kind == "qwen2" else bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        experts=int(need(experts_key)) if moe else 0, experts_per_token=int(need("num_experts_per_tok")) if moe else 0,
        expert_size=int(need("moe_intermediate_size")) if moe else 0, norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
        dense_layers=dense_layers, fp8_block=fp8_block, fp8_skip=fp8_skip,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),),
    )  # fmt: skip


def _fp8_from_hf(quantization: Mapping[str, Any] | None) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    if not quantization:
        return None, ()
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not block:
        raise ValueError(
            f"quantization_config with quant_method={method!r}, weight_block_size={block} is not supported: only block-scaled fp8 is"
        )
    return (int(block[0]), int(block[1])), tuple(quantization.get("modules_to_not_convert") or ())


def rope_from_hf(raw: Mapping[str, Any], native_context: int) -> RopeConfig:
    """RopeConfig from a config.json: the `rope_theta` + `rope_scaling` pair, or the newer `rope_parameters`."""
    nested = raw.get("rope_parameters") or {}
    scaling = dict(nested or raw.get("rope_scaling") or {})
    theta = nested.get("rope_theta") or raw.get("rope_theta")
    if theta is None:
        raise ValueError("config.json names no rope_theta: the checkpoint's own value is needed, there is no safe default")
    partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial} in config.json is not supported: only 1.0 is, rotating the whole head")
    kind = scaling.get("rope_type", scaling.get("type", "default"))

    def need(key: str) -> Any:
        if scaling.get(key) is None:
            raise ValueError(f"rope scaling {kind!r} in config.json lacks {key!r}")
        return scaling[key]

    if kind == "default":
        parsed = None
    elif kind == "linear":
        parsed = LinearScaling(float(need("factor")))
    elif kind == "llama3":
        parsed = Llama3Scaling(
            float(need("factor")),
            float(need("low_freq_factor")),
            float(need("high_freq_factor")),
            int(need("original_max_position_embeddings")),
        )
    elif kind == "yarn":
        parsed = YarnScaling(
            float(need("factor")), int(scaling.get("original_max_position_embeddings") or native_context),
            float(scaling.get("beta_fast") or 32.0), float(scaling.get("beta_slow") or 1.0),
            scaling.get("attention_factor"), scaling.get("mscale"), scaling.get("mscale_all_dim"), bool(scaling.get("truncate", True)),
        )  # fmt: skip
    else:
        raise ValueError(f"rope scaling {kind!r} is not supported: supported are default, linear, llama3, yarn")
    return RopeConfig(float(theta), parsed)
