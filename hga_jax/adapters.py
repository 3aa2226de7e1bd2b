"""hga_attention behind the interfaces that other people's models call: jax.nn's function, Flax's attention_fn, a cache for decode loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hga_jax.attention import hga_attention
from hga_jax.backend import AttentionBackend, Stats
from hga_jax.config import HGAConfig, RopeConfig
from hga_jax.pytree import register
from hga_jax.rope import rotate


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K H"],
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: Any = None,
    implementation: str | None = None,
    config: HGAConfig | None = None,
    rope: RopeConfig | None = None,
) -> Float[Array, "*B T N H"]:
    """hga_attention with the signature of jax.nn.dot_product_attention, for models that call that one on post-RoPE queries and keys.

    Only causal attention without bias and mask has a routed form: is_causal=True must be given and bias, mask and local_window_size left
    out, else ValueError. With or without a batch axis. As there, query row t attends to keys 0 .. t, so keys from T on play no part. Rows
    from query_seq_lengths or key_value_seq_lengths on are padding and give zeros. config: HGAConfig() by default; rope: see hga_attention.

    >>> from hga_jax import dot_product_attention  # the one-line change: in place of `from jax.nn import dot_product_attention`
    """
    for name, given in (("bias", bias), ("mask", mask), ("local_window_size", local_window_size)):
        if given is not None:
            raise ValueError(f"{name} is given: routed attention takes none; pass is_causal=True, and sequence lengths for padding")
    if not is_causal:
        raise ValueError("is_causal=False: routed attention is causal; pass is_causal=True or call jax.nn.dot_product_attention")
    if query.ndim not in (3, 4):
        raise ValueError(f"query has shape {query.shape}: [tokens, heads, head_dim] with or without a batch axis in front is needed")
    length = query.shape[-3]
    if key.shape[-3] < length:
        raise ValueError(f"key holds {key.shape[-3]} tokens, fewer than query's {length}")
    batched = (x if x.ndim == 4 else x[None] for x in (query, key[..., :length, :, :], value[..., :length, :, :]))
    lengths = [x for x in (query_seq_lengths, key_value_seq_lengths) if x is not None]
    out = hga_attention(
        *batched,
        config=config or HGAConfig(),
        rope=rope,
        key_value_seq_lengths=jnp.minimum(*lengths) if len(lengths) == 2 else (lengths or [None])[0],
        scale=scale,
        implementation=implementation,
    )
    return out.reshape(query.shape)


@dataclass(frozen=True)
class FlaxAttention:
    """An attention_fn for flax.nnx.MultiHeadAttention: call the module with is_causal=True and no mask. Grouped kv heads work.

    rope: the module's queries and keys get no rotation from it; with `rope` they are rotated here (half-split, positions from 0), as
    nnx.dot_product_attention_with_rope does. In the module's decode mode every step reads the whole cache, since the module keeps no
    summaries: it is right, and as slow as dense. For a fast decode loop use AttentionCache.

    >>> nnx.MultiHeadAttention(8, 512, attention_fn=FlaxAttention(HGAConfig(), RopeConfig()), decode=False, rngs=nnx.Rngs(0))
    """

    config: HGAConfig
    rope: RopeConfig | None = None

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S K H"],
        value: Float[Array, "*B S K H"],
        bias: Any = None,
        mask: Any = None,
        *,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        dtype: Any = None,
        module: Any = None,
        is_causal: bool = False,
        **ignored: Any,  # settings of dropout and of the dense product's precision
    ) -> Float[Array, "*B T N H"]:
        length, held = query.shape[-3], key.shape[-3]
        decoding = length == 1 and mask is not None
        if bias is not None or (mask is not None and not decoding):
            raise ValueError("a bias or mask is given: routed attention takes none; call the module with is_causal=True alone")
        if not is_causal and not decoding:
            raise ValueError("is_causal=False: routed attention is causal; call the module with is_causal=True")
        if dropout_rate and not deterministic:
            raise ValueError(f"{dropout_rate=}: routed attention has no dropout of attention weights; set it to 0")
        if module is not None:
            raise ValueError("sow_weights=True: routed attention has no array of attention weights to record")
        if ignored.get("input_positions") is not None:
            raise ValueError("input_positions is given: routed attention takes positions 0, 1, ... in order")
        dtype = dtype or jnp.result_type(query, key, value)
        q, k, v = (x.reshape(-1, *x.shape[-3:]).astype(dtype) for x in (query, key, value))
        start = self._position(mask, len(q), held) if decoding else jnp.zeros(len(q), jnp.int32)
        if self.rope is not None:
            q = jax.vmap(lambda x, start: rotate(x, start + jnp.arange(length), self.rope))(q, start)
            k = jax.vmap(lambda x: rotate(x, jnp.arange(held), self.rope))(k)
        return hga_attention(
            q, k, v, config=self.config, rope=self.rope, query_start=start if decoding else 0
        ).reshape(query.shape)  # fmt: skip

    def _position(self, mask: Array, batch: int, held: int) -> Int[Array, " B"]:
        """Where the one query of each sequence is, from a mask that lets it see the tokens so far."""
        seen = jnp.broadcast_to(mask, (*mask.shape[:-3], 1, 1, held)).reshape(-1, held).astype(bool).sum(-1, dtype=jnp.int32)
        return jnp.broadcast_to(seen, (batch,)) - 1


@register
@dataclass(frozen=True)
class AttentionCache:
    """K/V of one layer for a decode loop of your own, behind the backend that our decoder uses: append, then attend, in one call.

    A pytree: carry it through jit, scan or while_loop, one a layer, and donate it. What a query opens is remembered for the next ones, so
    with the sketch policy any split of a text into calls gives the same outputs.

    >>> cache = AttentionCache.create(HGAAttention(HGAConfig()), batch=1, capacity=65536, kv_heads=8, head_dim=128, dtype=jnp.bfloat16)
    >>> out, cache = cache.attend(query, key, value)  # a prompt, then token by token
    """

    states: tuple[Any, ...]
    attention: AttentionBackend = field(metadata={"static": True})

    @staticmethod
    def create(attention: AttentionBackend, *, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: Any) -> AttentionCache:
        """Empty, with room for `capacity` tokens in each sequence. attention: HGAAttention or another backend."""
        for name, value in (("batch", batch), ("capacity", capacity), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if getattr(attention, "tier", "device") != "device":
            raise ValueError(f"tier={attention.tier!r}: AttentionCache keeps its history on the device; for other tiers use LanguageModel")
        states = tuple(attention.init_state(capacity, kv_heads, head_dim, dtype) for _ in range(batch))
        return AttentionCache(states, attention)

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens held of each sequence."""
        return jnp.stack([state.length for state in self.states])

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B _T K H"],  # _: checked below, with an error that says more
        value: Float[Array, "B _T K H"],
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T N H"], AttentionCache]:
        """Append post-RoPE keys and values and attend from the queries of the same tokens, causally.

        counts: how many of the T rows of each sequence are tokens (all, by default); the others are padding and give zeros. The caller
        sees to it that the tokens fit the capacity.
        """
        if len(query) != len(self.states):
            raise ValueError(f"query holds {len(query)} sequences and the cache {len(self.states)}")
        if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
            raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} must be of the same tokens")
        outs, states = [], []
        for b, state in enumerate(self.states):  # not vmap: each sequence's loops end where its own work does
            if query.shape[1] == 1 and counts is None:
                out, state, _ = _decode(query[b, 0], key[b, 0], value[b, 0], state, backend=self.attention)
                out = out[None]
            else:
                count = jnp.int32(query.shape[1]) if counts is None else counts[b]
                out, state, _ = _prefill(query[b], key[b], value[b], state, count, backend=self.attention)
            outs.append(out)
            states.append(state)
        return jnp.stack(outs), AttentionCache(tuple(states), self.attention)


@partial(jax.jit, static_argnames="backend")  # jitted so that it is traced once, not once a sequence
def _prefill(query: Array, key: Array, value: Array, state: Any, count: Array, *, backend: AttentionBackend) -> tuple[Array, Any, Stats]:
    return backend.prefill(query, key, value, state, count)


@partial(jax.jit, static_argnames="backend")
def _decode(query: Array, key: Array, value: Array, state: Any, *, backend: AttentionBackend) -> tuple[Array, Any, Stats]:
    out, state, stats = backend.decode(query, key, value, state)
    if backend.settle_every is not None:
        held = state.length
        state = jax.lax.cond(held % backend.settle_every == 0, lambda state: backend.settle(state, held), lambda state: state, state)
    return out, state, stats
