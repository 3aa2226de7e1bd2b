"""The decoder in Flax NNX: Qwen3, Qwen3-MoE, Qwen2, Llama and Mistral from one definition, driven by ModelConfig.

Everything here handles one sequence: activations are [T, D], the K/V state of a layer is whatever the attention backend made.
Weights keep the checkpoints' orientation, [out, in] (experts [E, out, in]), so loading copies and never transposes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hga_jax.backend import AttentionBackend, Stats
from hga_jax.config import ModelConfig
from hga_jax.moe import expert_mlp
from hga_jax.quantized import AbstractWeight, BlockScaled, matmul
from hga_jax.rope import rotate


class Parameters:
    """Makes the initial leaves: random weights scaled by 1/sqrt(in), ones for norms; FP8 leaves where the config says so."""

    def __init__(self, config: ModelConfig, dtype: Any, seed: int):
        self.config, self.dtype, self.key = config, dtype, jax.random.key(seed)

    def _next_key(self) -> Array:
        self.key, key = jax.random.split(self.key)
        return key

    def weight(self, name: str, *shape: int) -> nnx.Param:
        """A projection; `name` is the checkpoint's module name, by which FP8 checkpoints list what they left unquantised."""
        values = jax.random.normal(self._next_key(), shape, jnp.float32) / shape[-1] ** 0.5
        if not self.config.is_fp8(name):
            return nnx.Param(values.astype(self.dtype))
        block = self.config.fp8_block
        scales = jnp.full((*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])), 4 / shape[-1] ** 0.5 / 448, jnp.float32)
        return nnx.Param(BlockScaled((values * (448 / 4 * shape[-1] ** 0.5)).astype(jnp.float8_e4m3fn), scales, block))

    def plain(self, *shape: int) -> nnx.Param:
        """Embeddings, output head, router: never quantised."""
        return nnx.Param((jax.random.normal(self._next_key(), shape, jnp.float32) / shape[-1] ** 0.5).astype(self.dtype))

    def ones(self, size: int) -> nnx.Param:
        return nnx.Param(jnp.ones((size,), self.dtype))

    def bias(self, size: int, present: bool) -> nnx.Param | None:
        return nnx.Param(jnp.zeros((size,), self.dtype)) if present else None


class RMSNorm(nnx.Module):
    def __init__(self, make: Parameters, size: int):
        self.weight = make.ones(size)
        self.eps = make.config.rms_eps

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        """Normalised in float32 and scaled in x's dtype, as the checkpoints were trained."""
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value() * normal.astype(x.dtype)


class Linear(nnx.Module):
    def __init__(self, make: Parameters, name: str, inputs: int, outputs: int, bias: bool = False):
        self.weight = make.weight(name, outputs, inputs)
        self.bias = make.bias(outputs, bias)

    def __call__(self, x: Float[Array, "*T in"]) -> Float[Array, "*T out"]:
        out = matmul(x, self.weight.get_value())
        return out if self.bias is None else out + self.bias.get_value()


class Attention(nnx.Module):
    """q, k, v projections, q/k norm where the family has it, rotation, the backend, output projection."""

    def __init__(self, make: Parameters, name: str):
        config = make.config
        width, query, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(make, f"{name}.q_proj", width, query, config.qkv_bias)
        self.k = Linear(make, f"{name}.k_proj", width, kv, config.qkv_bias)
        self.v = Linear(make, f"{name}.v_proj", width, kv, config.qkv_bias)
        self.o = Linear(make, f"{name}.o_proj", query, width, config.output_bias)
        self.q_norm = RMSNorm(make, config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(make, config.head_dim) if config.qk_norm else None
        self.config = config

    def project(
        self, x: Float[Array, "T D"], positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        """Queries and keys rotated to their positions, and values."""
        config = self.config
        q = self.q(x).reshape(-1, config.heads, config.head_dim)
        k = self.k(x).reshape(-1, config.kv_heads, config.head_dim)
        v = self.v(x).reshape(-1, config.kv_heads, config.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, config.rope), rotate(k, positions, config.rope), v

    def prefill(
        self, x: Float[Array, "T D"], first: Int[Array, ""], count: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, "T D"], Any, Stats]:
        q, k, v = self.project(x, first + jnp.arange(x.shape[0]))
        out, state, stats = backend.prefill(q, k, v, state, count)
        return self.o(out.reshape(x.shape[0], -1)), state, stats

    def decode(
        self, x: Float[Array, " D"], position: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, " D"], Any, Stats]:
        q, k, v = self.project(x[None], position[None])
        out, state, stats = backend.decode(q[0], k[0], v[0], state, position)
        return self.o(out.reshape(-1)), state, stats


class MLP(nnx.Module):
    def __init__(self, make: Parameters, name: str):
        config = make.config
        self.gate = Linear(make, f"{name}.gate_proj", config.hidden_size, config.mlp_size, config.mlp_bias)
        self.up = Linear(make, f"{name}.up_proj", config.hidden_size, config.mlp_size, config.mlp_bias)
        self.down = Linear(make, f"{name}.down_proj", config.mlp_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class MoE(nnx.Module):
    """Softmax router, the best `experts_per_token` experts of each token, their outputs mixed by (renormalised) probability."""

    def __init__(self, make: Parameters, name: str):
        config = make.config
        experts, width, size = config.experts, config.hidden_size, config.expert_size
        self.router = make.plain(experts, width)
        self.gate = make.weight(f"{name}.experts.0.gate_proj", experts, size, width)
        self.up = make.weight(f"{name}.experts.0.up_proj", experts, size, width)
        self.down = make.weight(f"{name}.experts.0.down_proj", experts, width, size)
        self.config = config

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        config = self.config
        scores = jnp.einsum("td,ed->te", x, self.router.get_value(), preferred_element_type=jnp.float32)
        weights, ids = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        return expert_mlp(x, ids, weights.astype(x.dtype), self.gate.get_value(), self.up.get_value(), self.down.get_value())


class DecoderLayer(nnx.Module):
    def __init__(self, make: Parameters, index: int):
        config, name = make.config, f"model.layers.{index}"
        self.attention_norm = RMSNorm(make, config.hidden_size)
        self.attention = Attention(make, f"{name}.self_attn")
        self.mlp_norm = RMSNorm(make, config.hidden_size)
        self.mlp = (MoE if config.is_moe_layer(index) else MLP)(make, f"{name}.mlp")

    def prefill(
        self, x: Float[Array, "T D"], first: Int[Array, ""], count: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, "T D"], Any, Stats]:
        """The layer over tokens at positions first, first+1, ...; rows from `count` on are padding."""
        mixed, state, stats = self.attention.prefill(self.attention_norm(x), first, count, state, backend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state, stats

    def decode(
        self, x: Float[Array, " D"], position: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, " D"], Any, Stats]:
        """The layer over one token."""
        mixed, state, stats = self.attention.decode(self.attention_norm(x), position, state, backend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)[None])[0], state, stats


class Decoder(nnx.Module):
    """The whole network. `Decoder(config)` has random weights; `load_model` fills a checkpoint's in."""

    def __init__(self, config: ModelConfig, dtype: Any = jnp.float32, seed: int = 0):
        make = Parameters(config, dtype, seed)
        self.config = config
        self.embedding = make.plain(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(make, i) for i in range(config.layers)])
        self.final_norm = RMSNorm(make, config.hidden_size)
        self.lm_head = None if config.tie_embeddings else make.plain(config.vocab_size, config.hidden_size)

    @staticmethod
    def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Decoder:
        """The same tree with jax.ShapeDtypeStruct leaves: what a checkpoint must provide, and what the planner counts."""
        return nnx.eval_shape(lambda: Decoder(config, dtype))

    def embed(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        return self.embedding.get_value()[tokens]

    def head(self, x: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Final norm and output head: float32 logits."""
        weight = self.embedding if self.lm_head is None else self.lm_head
        return jnp.einsum("...d,vd->...v", self.final_norm(x), weight.get_value(), preferred_element_type=jnp.float32)


def weight_leaves(decoder: Decoder) -> dict[str, AbstractWeight]:
    """Every parameter by its path in the tree, e.g. "layers.0.attention.q.weight": arrays, shapes, or BlockScaled of either."""
    flat = nnx.to_flat_state(nnx.state(decoder))
    return {".".join(str(part) for part in path): leaf.get_value() for path, leaf in flat}
