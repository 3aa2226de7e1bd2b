"""The expert MLP in plain XLA: silu(x gate.T) * (x up.T) through down, for the experts each token chose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hga_jax.quantized import Weight, matmul

BLOCK_ROWS = 32  # rows of one expert multiplied at a time in prefill; each expert wastes half of one on average


def expert_mlp(
    x: Float[Array, "T D"], ids: Int[Array, "T k"], weights: Float[Array, "T k"], gate: Weight, up: Weight, down: Weight
) -> Float[Array, "T D"]:
    """Mix of the chosen experts' outputs. gate, up [E, F, D]; down [E, D, F]; weights are what each expert's output counts.

    Every (token, expert) pair is computed once and no expert is multiplied by a token that did not choose it: FLOPs are those of the
    routed experts, and only one block's weights are dequantised at a time.
    """
    tokens, choices = ids.shape
    if tokens * choices <= BLOCK_ROWS:  # decode: read just the chosen experts
        out = lax.map(lambda e: _mlp(x[e[0]][None], gate[e[1]], up[e[1]], down[e[1]])[0], (_owners(tokens, choices), ids.reshape(-1)))
        return (out.reshape(tokens, choices, -1) * weights[..., None]).sum(1).astype(x.dtype)

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
        part = _mlp(x[pair // choices], gate[expert], up[expert], down[expert])
        return out.at[jnp.where(live, pair, rows)].set(part, mode="drop"), None

    bound = rows // BLOCK_ROWS + min(experts, rows)
    out = lax.fori_loop(0, jnp.minimum(last_block[-1], bound), lambda i, o: block(o, i)[0], jnp.zeros((rows, x.shape[1]), x.dtype))
    return (out.reshape(tokens, choices, -1) * weights[..., None]).sum(1).astype(x.dtype)


def _owners(tokens: int, choices: int) -> Int[Array, " pairs"]:
    return jnp.repeat(jnp.arange(tokens), choices)


def _mlp(x: Float[Array, "T D"], gate: Weight, up: Weight, down: Weight) -> Float[Array, "T D"]:
    return matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down)
