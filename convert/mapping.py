"""The one table: where each weight of our decoder lies in Hugging Face checkpoints and in GGUF files.

Array keys are the decoder's paths (`hga_jax.model.weight_leaves`); an FP8 leaf is two arrays, `<path>.values` and `<path>.scales`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hga_jax.config import ModelConfig

Transform = Literal["copy", "rotary", "experts"]


@dataclass(frozen=True)
class Row:
    """One weight. {i} is the layer, {e} the expert.

    transform: "copy" as it is; "rotary": rows of llama GGUFs come with the two halves of each head interleaved and go back to half-split;
    "experts": our [E, out, in] is one tensor per expert in Hugging Face checkpoints, stacked already in GGUF.
    """

    path: str
    hf: str
    gguf: str
    transform: Transform = "copy"


def _layer(path: str, hf: str, gguf: str, transform: Transform = "copy") -> Row:
    return Row(f"layers.{{i}}.{path}", f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}", transform)


TABLE = (
    Row("embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Row("final_norm.weight", "model.norm.weight", "output_norm.weight"),
    Row("lm_head", "lm_head.weight", "output.weight"),
    _layer("attention_norm.weight", "input_layernorm.weight", "attn_norm.weight"),
    _layer("attention.q.weight", "self_attn.q_proj.weight", "attn_q.weight", "rotary"),
    _layer("attention.q.bias", "self_attn.q_proj.bias", "attn_q.bias", "rotary"),
    _layer("attention.k.weight", "self_attn.k_proj.weight", "attn_k.weight", "rotary"),
    _layer("attention.k.bias", "self_attn.k_proj.bias", "attn_k.bias", "rotary"),
    _layer("attention.v.weight", "self_attn.v_proj.weight", "attn_v.weight"),
    _layer("attention.v.bias", "self_attn.v_proj.bias", "attn_v.bias"),
    _layer("attention.o.weight", "self_attn.o_proj.weight", "attn_output.weight"),
    _layer("attention.o.bias", "self_attn.o_proj.bias", "attn_output.bias"),
    _layer("attention.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight"),
    _layer("attention.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight"),
    _layer("mlp_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _layer("mlp.gate.weight", "mlp.gate_proj.weight", "ffn_gate.weight"),
    _layer("mlp.gate.bias", "mlp.gate_proj.bias", "ffn_gate.bias"),
    _layer("mlp.up.weight", "mlp.up_proj.weight", "ffn_up.weight"),
    _layer("mlp.up.bias", "mlp.up_proj.bias", "ffn_up.bias"),
    _layer("mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight"),
    _layer("mlp.down.bias", "mlp.down_proj.bias", "ffn_down.bias"),
    _layer("mlp.router", "mlp.gate.weight", "ffn_gate_inp.weight"),
    _layer("mlp.gate", "mlp.experts.{e}.gate_proj.weight", "ffn_gate_exps.weight", "experts"),
    _layer("mlp.up", "mlp.experts.{e}.up_proj.weight", "ffn_up_exps.weight", "experts"),
    _layer("mlp.down", "mlp.experts.{e}.down_proj.weight", "ffn_down_exps.weight", "experts"),
)
ROWS = {row.path: row for row in TABLE}
SCALE_SUFFIX = "_scale_inv"  # Hugging Face block-scaled FP8: <name>.weight and <name>.weight_scale_inv

# Tensors that real checkpoints carry and no decoder needs.
HARMLESS_HF = re.compile(r"(^|\.)rotary_emb\.inv_freq$|\.(k|v)_proj\.(k|v)_scale$")
HARMLESS_GGUF = re.compile(r"^rope_freqs\.weight$")  # Llama 3's frequency factors: read as the rope scaling by gguf_config


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint and the place it has in our array: the whole of it, or row `expert` of a stack."""

    name: str
    expert: int | None = None


def split_key(key: str) -> tuple[str, str]:
    """ "layers.0.mlp.gate.values" -> ("layers.0.mlp.gate", "values"); the second is "" for plain arrays."""
    for piece in ("values", "scales"):
        if key.endswith("." + piece):
            return key[: -len(piece) - 1], piece
    return key, ""


def row_of(key: str) -> tuple[Row, int | None]:
    """The table's row of an array key, and its layer."""
    path, _ = split_key(key)
    match = re.match(r"layers\.(\d+)\.", path)
    pattern = path if match is None else "layers.{i}." + path[match.end() :]
    return ROWS[pattern], None if match is None else int(match[1])


def hf_parts(key: str, config: ModelConfig) -> tuple[Part, ...]:
    """The Hugging Face tensors that make up one of our arrays."""
    row, layer = row_of(key)
    name = row.hf.replace("{i}", str(layer)) + (SCALE_SUFFIX if split_key(key)[1] == "scales" else "")
    if row.transform != "experts":
        return (Part(name),)
    return tuple(Part(name.replace("{e}", str(e)), e) for e in range(config.experts))


def gguf_parts(key: str) -> tuple[Part, ...]:
    """The GGUF tensor of one of our arrays."""
    row, layer = row_of(key)
    return (Part(row.gguf.replace("{i}", str(layer))),)
