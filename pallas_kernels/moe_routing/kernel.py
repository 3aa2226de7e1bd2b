"""The k largest of each row of router scores (Pallas, Triton lowering): one launch in place of softmax, sort and division.

k rounds of "largest, and where" over rows held in registers; k and the number of experts are small. lax.top_k sorts.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.indexing import outer, span
from pallas_kernels.moe_routing.config import Config

MAX_EXPERTS, MAX_CHOICES = 512, 32


def unsupported(tokens: int, experts: int, choices: int) -> str | None:
    """Why the kernel cannot take these sizes, or None."""
    if experts > MAX_EXPERTS or choices > MAX_CHOICES:
        return f"{experts} experts, {choices} chosen: a row of at most {MAX_EXPERTS} stays in registers, {MAX_CHOICES} rounds are unrolled"
    if tokens * experts >= 2**31:
        return f"{tokens} x {experts} scores exceed int32 offsets"
    return None


def _kernel(
    scores_ref,  # f32[T, E] device
    ids_ref,  # i32[T, k] device, out
    weights_ref,  # f32[T, k] device, out
    *,
    config: Config,
    choices: int,
    renormalise: bool,
):
    tokens, experts = scores_ref.shape
    rows = pl.program_id(0) * config.rows + span(0, config.rows)
    expert = span(0, pl.next_power_of_2(experts))
    slot = span(0, pl.next_power_of_2(choices))
    live, inside = rows < tokens, expert < experts
    index = outer(jnp.minimum(rows, tokens - 1), jnp.minimum(expert, experts - 1))
    scores = jnp.where(inside[None, :], plt.load(scores_ref.at[index]), -jnp.inf)
    peak = jnp.max(scores, axis=1)
    total = jnp.sum(jnp.exp(scores - peak[:, None]), axis=1)
    ids = jnp.zeros((config.rows, slot.shape[0]), jnp.int32)
    weights = jnp.zeros((config.rows, slot.shape[0]), jnp.float32)
    for choice in range(choices):
        best = jnp.max(scores, axis=1)
        where = jnp.min(jnp.where(scores == best[:, None], expert[None, :], experts - 1), axis=1)
        here = slot[None, :] == choice
        ids = jnp.where(here, where[:, None], ids)
        weights = jnp.where(here, jnp.exp(best - peak)[:, None], weights)
        scores = jnp.where(expert[None, :] == where[:, None], -jnp.inf, scores)
    weights = weights / (jnp.sum(weights, axis=1) if renormalise else total)[:, None]
    where_to = outer(jnp.where(live, rows, tokens), jnp.minimum(slot, choices))  # masked lanes point outside: see pallas_kernels.indexing
    mask = live[:, None] & (slot < choices)[None, :]
    plt.store(ids_ref.at[where_to], ids, mask=mask)
    plt.store(weights_ref.at[where_to], weights, mask=mask)


def moe_routing(
    scores: Float[Array, "T E"], choices: int, renormalise: bool, *, config: Config | None = None, interpret: bool = False
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """See api.moe_routing. Raises NotImplementedError for sizes the kernel cannot take."""
    tokens, experts = scores.shape
    if reason := unsupported(tokens, experts, choices):
        raise NotImplementedError(f"moe_routing: {reason}")
    config = config or (Config(rows=1, warps=1) if tokens <= 8 else Config())
    shape = (tokens, choices)
    return pl.pallas_call(
        partial(_kernel, config=config, choices=choices, renormalise=renormalise),
        grid=(-(-tokens // config.rows),),
        in_specs=[pl.no_block_spec],
        out_specs=[pl.no_block_spec] * 2,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="moe_routing",
    )(scores)
