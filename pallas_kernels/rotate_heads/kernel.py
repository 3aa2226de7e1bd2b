"""q/k norm and rotation of a few tokens in one launch (Pallas, Triton lowering); XLA makes eight of it, of 1 to 2 us each.

A program takes one head of one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.indexing import outer, span
from pallas_kernels.normalise import Norm, narrow

MAX_TOKENS = 8


def unsupported(joined: Any, head_dim: int) -> str | None:
    """Why the kernel is not for this, or None."""
    if joined.shape[0] > MAX_TOKENS:
        return f"{joined.shape[0]} tokens exceed {MAX_TOKENS}"
    return f"head_dim {head_dim} exceeds 1024: a head stays in registers" if head_dim > 1024 else None


def _kernel(
    joined_ref,  # [T, (N + 2K) * H] device
    cos_ref,  # f32[T, H/2] device
    sin_ref,  # f32[T, H/2] device
    *refs,  # device: q norm [H], k norm [H] where there are such, then out q [T, N, H], k [T, K, H], v [T, K, H]
    head_dim: int,
    q_eps: float | None,
    k_eps: float | None,
):
    *norms, q_ref, k_ref, v_ref = refs
    heads, kv_heads, half = q_ref.shape[1], k_ref.shape[1], head_dim // 2
    token, head = pl.program_id(0), pl.program_id(1)
    lane = span(0, pl.next_power_of_2(half))
    inside = lane < half
    mask = None if half == lane.shape[0] else inside

    def load(ref: Any, *index: Any) -> list[Array]:
        """The two halves of a head."""
        return [plt.load(ref.at[outer(*index, offset + jnp.minimum(lane, half - 1))]) for offset in (0, half)]

    first, second = (plt.load(joined_ref.at[outer(token, head * head_dim + o + jnp.minimum(lane, half - 1))]) for o in (0, half))

    def store(ref: Any, index: Any, values: list[Array]) -> None:
        for offset, value in zip((0, half), values, strict=True):
            plt.store(ref.at[outer(token, index, jnp.where(inside, offset + lane, head_dim))], narrow(value, ref.dtype), mask=mask)

    def turned(weight_ref: Any, eps: float | None) -> list[Array]:
        a, b = first.astype(jnp.float32), second.astype(jnp.float32)
        if eps is not None:
            total = jnp.sum(jnp.where(inside, a * a + b * b, 0.0))
            inverse = lax.rsqrt(total / head_dim + eps)
            scales = load(weight_ref)
            a, b = ((s * (x * inverse).astype(first.dtype)).astype(jnp.float32) for s, x in zip(scales, (a, b), strict=True))
        [cos], [sin] = ([plt.load(ref.at[outer(token, jnp.minimum(lane, half - 1))])] for ref in (cos_ref, sin_ref))
        return [a * cos - b * sin, b * cos + a * sin]

    @pl.when(head < heads)
    def _():
        store(q_ref, head, turned(norms[0] if q_eps is not None else None, q_eps))

    @pl.when((head >= heads) & (head < heads + kv_heads))
    def _():
        store(k_ref, head - heads, turned(norms[-1] if k_eps is not None else None, k_eps))

    @pl.when(head >= heads + kv_heads)
    def _():
        store(v_ref, head - heads - kv_heads, [first, second])


def rotate_heads(
    joined: Float[Array, "T total"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    q_norm: Norm | None,
    k_norm: Norm | None,
    heads: int,
    kv_heads: int,
    dtype: Any,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """See api.rotate_heads. Raises NotImplementedError for what the kernel is not for."""
    tokens, head_dim = joined.shape[0], 2 * cos.shape[1]
    if reason := unsupported(joined, head_dim):
        raise NotImplementedError(f"rotate_heads: {reason}")
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    operands = [joined, cos, sin, *(norm.weight for norm in norms)]
    q_eps, k_eps = (None if norm is None else norm.eps for norm in (q_norm, k_norm))
    shapes = [jax.ShapeDtypeStruct((tokens, count, head_dim), dtype) for count in (heads, kv_heads, kv_heads)]
    return tuple(
        pl.pallas_call(
            partial(_kernel, head_dim=head_dim, q_eps=q_eps, k_eps=k_eps),
            grid=(tokens, heads + 2 * kv_heads),
            in_specs=[pl.no_block_spec] * len(operands),
            out_specs=[pl.no_block_spec] * 3,
            out_shape=shapes,
            compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
            interpret=interpret,
            name="rotate_heads",
        )(*operands)
    )
