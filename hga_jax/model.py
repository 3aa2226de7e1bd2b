"""The decoder in Flax NNX: Qwen3, Qwen3-MoE, Qwen2, Llama and Mistral from one definition, driven by ModelConfig.

Everything here handles one sequence: activations are [T, D], the K/V state of a layer is whatever the attention backend made. Between
layers activations are float32 whatever the weights are: rounded to bfloat16 after every addition, they cost more than all roundings inside
the layers (a third of the logits' error of SmolLM2-135M in bfloat16).
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
from hga_jax.quantized import MAX_ROWS, AbstractWeight, BlockScaled, bounded_dtype, gated, joined_matmul, matmul
from hga_jax.rope import angles, rotate
from pallas_kernels.host_rows import host_rows
from pallas_kernels.moe_routing import moe_routing
from pallas_kernels.normalise import Norm, narrow, rms_norm
from pallas_kernels.rotate_heads import rotate_heads


class Parameters:
    """Makes the initial leaves: random weights scaled by 1/sqrt(in), ones for norms; FP8 leaves where the config says so."""

    def __init__(self, config: ModelConfig, dtype: Any, seed: int):
        self.config, self.dtype, self.key = config, dtype, jax.random.key(seed)

    def weight(self, name: str, *shape: int) -> nnx.Param:
        """A projection; `name` is the checkpoint's module name, by which FP8 checkpoints list what they left unquantised."""
        if not self.config.is_fp8(name):
            return self.plain(*shape)
        block = self.config.fp8_block
        blocks = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        return nnx.Param(self._block_scaled(shape, blocks))

    def plain(self, *shape: int) -> nnx.Param:
        """Embeddings, output head, router: never quantised."""
        return nnx.Param(self._normal(shape))

    def ones(self, size: int) -> nnx.Param:
        return nnx.Param(self._full((size,), 1.0, self.dtype))

    def bias(self, size: int, present: bool) -> nnx.Param | None:
        return nnx.Param(self._full((size,), 0.0, self.dtype)) if present else None

    def _next_key(self) -> Array:
        self.key, key = jax.random.split(self.key)
        return key

    def _normal(self, shape: tuple[int, ...]) -> Any:
        return (jax.random.normal(self._next_key(), shape, jnp.float32) / shape[-1] ** 0.5).astype(self.dtype)

    def _block_scaled(self, shape: tuple[int, ...], blocks: tuple[int, ...]) -> BlockScaled:
        """Codes of rms 112: those of a block reach 448, the largest there is."""
        codes = jax.random.normal(self._next_key(), shape, jnp.float32) * (448 / 4)
        scales = jnp.full(blocks, 4 / shape[-1] ** 0.5 / 448, jnp.float32)
        return BlockScaled(codes.astype(jnp.float8_e4m3fn), scales, self.config.fp8_block)

    def _full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Any:
        return jnp.full(shape, value, dtype)


class Shapes(Parameters):
    """Makes shapes in place of arrays. Tracing the random ones for their shapes takes seconds at 48 layers."""

    def __init__(self, config: ModelConfig, dtype: Any):
        self.config, self.dtype = config, jnp.dtype(dtype)

    def _normal(self, shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def _block_scaled(self, shape: tuple[int, ...], blocks: tuple[int, ...]) -> BlockScaled:
        block = self.config.fp8_block
        return jax.eval_shape(lambda: BlockScaled(jnp.zeros(shape, jnp.float8_e4m3fn), jnp.zeros(blocks, jnp.float32), block))

    def _full(self, shape: tuple[int, ...], value: float, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)


class RMSNorm(nnx.Module):
    def __init__(self, make: Parameters, size: int):
        self.weight = make.ones(size)
        self.config = make.config

    @property
    def norm(self) -> Norm:
        """For a product that normalises its input itself."""
        weight = self.weight.get_value()
        return Norm(weight, self.config.rms_eps, bounded_dtype(self.config, weight.dtype))

    def __call__(self, x: Float[Array, "*T D"], dtype: Any = None) -> Float[Array, "*T D"]:
        return rms_norm(x, self.norm, dtype)


class Linear(nnx.Module):
    def __init__(self, make: Parameters, name: str, inputs: int, outputs: int, bias: bool = False):
        self.weight = make.weight(name, outputs, inputs)
        self.bias = make.bias(outputs, bias)

    def __call__(
        self, x: Float[Array, "*T in"], residual: Float[Array, "*T out"] | None = None, dtype: Any = None
    ) -> Float[Array, "*T out"]:
        """The product, plus `residual` if given, in `dtype`, or the residual's, or x's."""
        out = matmul(x, self.weight.get_value(), residual=residual, out_dtype=dtype)
        return out if self.bias is None else narrow(out + self.bias.get_value(), out.dtype)


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
        self, x: Float[Array, "T D"], norm: RMSNorm, positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
        """Queries and keys of the normalised x rotated to their positions, and values; rounded once, in the end."""
        config, wide = self.config, jnp.float32
        if x.shape[0] <= MAX_ROWS:  # decode: few launches
            linears = (self.q, self.k, self.v)
            joined = joined_matmul(x, [linear.weight.get_value() for linear in linears], norm=norm.norm, out_dtype=wide)
            if self.q.bias is not None:
                joined = joined + jnp.concatenate([linear.bias.get_value() for linear in linears])
            q_norm, k_norm = (None if head is None else head.norm for head in (self.q_norm, self.k_norm))
            cos, sin = angles(positions, config.rope, config.head_dim)
            norms, dtype = {"q_norm": q_norm, "k_norm": k_norm}, norm.norm.dtype
            return rotate_heads(joined, cos, sin, heads=config.heads, kv_heads=config.kv_heads, **norms, dtype=dtype)
        x = norm(x)
        q = self.q(x, dtype=wide).reshape(-1, config.heads, config.head_dim)
        k = self.k(x, dtype=wide).reshape(-1, config.kv_heads, config.head_dim)
        v = self.v(x).reshape(-1, config.kv_heads, config.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q, wide), self.k_norm(k, wide)
        return rotate(q, positions, config.rope, x.dtype), rotate(k, positions, config.rope, x.dtype), v

    def prefill(
        self, x: Float[Array, "T D"], norm: RMSNorm, first: Int[Array, ""], count: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, "T D"], Any, Stats]:
        """x plus attention of the normalised x."""
        q, k, v = self.project(x, norm, first + jnp.arange(x.shape[0]))
        out, state, stats = backend.prefill(q, k, v, state, count)
        return self.o(out.reshape(x.shape[0], -1), x), state, stats

    def decode(
        self, x: Float[Array, " D"], norm: RMSNorm, position: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, " D"], Any, Stats]:
        """The same for one token."""
        q, k, v = self.project(x[None], norm, position[None])
        out, state, stats = backend.decode(q[0], k[0], v[0], state, position)
        return self.o(out.reshape(-1), x), state, stats


class MLP(nnx.Module):
    def __init__(self, make: Parameters, name: str):
        config = make.config
        self.gate = Linear(make, f"{name}.gate_proj", config.hidden_size, config.mlp_size, config.mlp_bias)
        self.up = Linear(make, f"{name}.up_proj", config.hidden_size, config.mlp_size, config.mlp_bias)
        self.down = Linear(make, f"{name}.down_proj", config.mlp_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[Array, "T D"], norm: RMSNorm) -> Float[Array, "T D"]:
        """x plus the MLP of the normalised x."""
        inner, dtype = norm(x), norm.norm.weight.dtype
        return self.down(gated(self.gate(inner, dtype=dtype), self.up(inner, dtype=dtype)), x)


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

    def __call__(self, x: Float[Array, "T D"], norm: RMSNorm) -> Float[Array, "T D"]:
        """x plus the experts' mix for the normalised x."""
        config = self.config
        scores = matmul(x, self.router.get_value(), norm=norm.norm, out_dtype=jnp.float32)
        ids, weights = moe_routing(scores, config.experts_per_token, renormalise=config.norm_topk_prob)
        experts = (self.gate.get_value(), self.up.get_value(), self.down.get_value())
        return expert_mlp(x, ids, weights, *experts, norm=norm.norm, residual=x)


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
        x, state, stats = self.attention.prefill(x, self.attention_norm, first, count, state, backend)
        return self.mlp(x, self.mlp_norm), state, stats

    def decode(
        self, x: Float[Array, " D"], position: Int[Array, ""], state: Any, backend: AttentionBackend
    ) -> tuple[Float[Array, " D"], Any, Stats]:
        """The layer over one token."""
        x, state, stats = self.attention.decode(x, self.attention_norm, position, state, backend)
        return self.mlp(x[None], self.mlp_norm)[0], state, stats


class Decoder(nnx.Module):
    """The whole network. `Decoder(config)` has random weights; `load_model` fills a checkpoint's in."""

    def __init__(self, config: ModelConfig, dtype: Any = jnp.float32, seed: int = 0, *, make: Parameters | None = None):
        make = make or Parameters(config, dtype, seed)
        self.config = config
        self.embedding = make.plain(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(make, i) for i in range(config.layers)])
        self.final_norm = RMSNorm(make, config.hidden_size)
        self.lm_head = None if config.tie_embeddings else make.plain(config.vocab_size, config.hidden_size)

    @staticmethod
    def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Decoder:
        """The same tree with jax.ShapeDtypeStruct leaves: what a checkpoint must provide, and what the planner counts."""
        return Decoder(config, make=Shapes(config, dtype))

    def embed(self, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
        """Rows of the table, which the plan may have put into pinned host memory, in float32."""
        table = self.embedding.get_value()
        on_host = jax.typeof(table).memory_space == jax.memory.Space.Host
        return host_rows(table, tokens, jnp.float32) if on_host else table[tokens].astype(jnp.float32)

    def head(self, x: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Final norm and output head: float32 logits."""
        weight = (self.embedding if self.lm_head is None else self.lm_head).get_value()
        return matmul(x, weight, norm=self.final_norm.norm._replace(dtype=weight.dtype), out_dtype=jnp.float32)


def weight_leaves(decoder: Decoder) -> dict[str, AbstractWeight]:
    """Every parameter by its path in the tree, e.g. "layers.0.attention.q.weight": arrays, shapes, or BlockScaled of either."""
    flat = nnx.to_flat_state(nnx.state(decoder))
    return {".".join(str(part) for part in path): leaf.get_value() for path, leaf in flat}
