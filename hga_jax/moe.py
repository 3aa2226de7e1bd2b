"""The expert MLP: silu(x gate.T) * (x up.T) through down, for the experts each token chose. Kernels where they fit, plain XLA otherwise."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.quantized import BlockScaled, Weight, gated, matmul, unusual_block
from pallas_kernels import moe_decode, moe_prefill
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.normalise import Norm, narrow, result_dtype, rms_norm

BLOCK_ROWS = 32  # rows of one expert multiplied at a time in prefill; each expert wastes half of one on average


def expert_mlp(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate: Weight,
    up: Weight,
    down: Weight,
    *,
    norm: Norm | None = None,
    residual: Float[Array, "T D"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """Mix of the chosen experts' outputs. gate, up [E, F, D]; down [E, D, F]; weights are what each expert's output counts.
    norm: of x, before; residual: added to the result, which has its dtype, or x's.

    implementation None: the decode kernels for a few tokens and the grouped matmuls for more, on a CUDA GPU with FP8 weights and 16-bit
    activations; plain XLA otherwise.
    """
    pairs = [(w.values, w.scales) if isinstance(w, BlockScaled) else (w, None) for w in (gate, up, down)]
    values, scales = zip(*pairs, strict=True)
    kernel = moe_decode if x.shape[0] <= moe_decode.MAX_TOKENS else moe_prefill
    reason = unusual_block(gate, up, down) or kernel.unsupported(x, ids, values, scales)
    if kernel is moe_prefill and (x if norm is None else norm.weight).dtype == jnp.float32:
        reason = "activations are float32 and the grouped matmuls multiply in 16 bits"
    quantized = all(scale is not None for scale in scales)
    if implementation is None and not quantized:
        implementation = "xla"
    if choose("expert_mlp", implementation, reason) == "pallas":
        if kernel is moe_decode:
            return moe_decode.expert_mlp(x, ids, weights, values, scales, norm=norm, residual=residual)
        run = partial(moe_prefill.expert_mlp, values=values, scales=scales, out_dtype=jnp.float32)
    else:
        run = partial(_expert_mlp_xla, gate=gate, up=up, down=down, dtype=(x if norm is None else norm.weight).dtype)
    out = run(x if norm is None else rms_norm(x, norm), ids, weights)
    return narrow(out if residual is None else residual + out, result_dtype(x, norm, residual))


def _expert_mlp_xla(
    x: Float[Array, "T D"], ids: Int[Array, "T k"], weights: Float[Array, "T k"], gate: Weight, up: Weight, down: Weight, dtype: Any
) -> Float[Array, "T D"]:
    """In float32, with the gated product rounded to `dtype`. Every (token, expert) pair is computed once, and no expert is multiplied by a
    token that did not choose it: FLOPs are those of the routed experts, and only one block's weights are dequantised at a time.
    """
    tokens, choices = ids.shape
    if tokens * choices <= BLOCK_ROWS:  # decode: read just the chosen experts
        pairs = (_owners(tokens, choices), ids.reshape(-1))
        out = lax.map(lambda e: _mlp(x[e[0]][None], gate[e[1]], up[e[1]], down[e[1]], dtype)[0], pairs)
        return (out.reshape(tokens, choices, -1) * weights[..., None]).sum(1)

    experts = gate.shape[0]
    rows = tokens * choices
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    blocks_of = -(-counts // BLOCK_ROWS)
    last_block = jnp.cumsum(blocks_of)
    first_row = jnp.cumsum(counts) - counts

    def block(out: Array, i: Array) -> tuple[Array, None]:
        expert = jnp.searchsorted(last_block, i, side="right").clip(0, experts - 1)
        inside = (i - (last_block[expert] - blocks_of[expert])) * BLOCK_ROWS + jnp.arange(BLOCK_ROWS)
        live = (inside < counts[expert]) & (i < last_block[-1])
        pair = order[jnp.clip(first_row[expert] + inside, 0, rows - 1)]
        token = pair // choices
        part = _mlp(x[token], gate[expert], up[expert], down[expert], dtype) * weights.reshape(-1)[pair, None]
        return out.at[jnp.where(live, token, tokens)].add(part, mode="drop"), None

    bound = rows // BLOCK_ROWS + min(experts, rows)
    return lax.fori_loop(0, jnp.minimum(last_block[-1], bound), lambda i, o: block(o, i)[0], jnp.zeros(x.shape, jnp.float32))


def _owners(tokens: int, choices: int) -> Int[Array, " pairs"]:
    return jnp.repeat(jnp.arange(tokens), choices)


def _mlp(x: Float[Array, "T D"], gate: Weight, up: Weight, down: Weight, dtype: Any) -> Float[Array, "T D"]:
    """In float32, with the gated product rounded to `dtype`."""
    wide = partial(matmul, out_dtype=jnp.float32, implementation="xla")
    return wide(gated(wide(x, gate), wide(x, up), dtype), down)
