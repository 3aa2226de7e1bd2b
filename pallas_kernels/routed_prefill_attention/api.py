"""Exact attention of many query blocks, each over its windows and the pages opened for it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.routed_prefill_attention import backward, kernel, xla
from pallas_kernels.routed_prefill_attention.config import Config

Implementation = Literal["pallas", "xla"]


class _Settings(NamedTuple):
    chunk_size: int
    sink_chunks: int
    local_chunks: int
    scale: float
    config: Config | None
    backward_config: Config | None
    interpret: bool

    def arguments(self, config: Config | None) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "backward_config"} | {"config": config}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: _Settings, *arrays: Array) -> tuple[Array, Array]:
    return kernel.routed_prefill_attention(*arrays, **settings.arguments(settings.config))


def _attention_forward(settings: _Settings, *arrays: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse = _attention(settings, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attention_backward(settings: _Settings, saved: tuple[Array, ...], gradients: tuple[Array, Array]) -> tuple[Array | None, ...]:
    d_query, d_pages = backward.gradients(*saved, *gradients, **settings.arguments(settings.backward_config))
    return d_query, d_pages, None, None, None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def routed_prefill_attention(
    query: Float[Array, "T N H"],
    pages: Float[Array, "K P 2 g H"],
    first_position: Int[Array, ""],
    count: Int[Array, ""],
    page_ids: Int[Array, "K B R M"],
    since: Int[Array, "K B R M"],
    counts: Int[Array, "K B R"],
    *,
    chunk_size: int,
    sink_chunks: int,
    local_chunks: int,
    scale: float,
    implementation: Implementation,
    config: Config | None = None,
    backward_config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attend the queries at positions first_position, first_position + 1, ... to sinks, local window, own chunk and listed pages.

    query: post-RoPE rows; the first `count` are live, the others give zeros. pages: keys and values of a history that holds all tokens up
    to the last live query. Block b is chunk first_position // chunk_size + b; the B blocks must cover the T rows wherever they start in a
    chunk. page_ids: R lists a kv head: one that its G query heads share, or G. counts: slots of a list in use. since: the first row of the
    chunk (position % chunk_size) that sees the page; chunk_size or more: nobody does. Lists name no page of a window, and none twice.

    Returns (out, lse): attention outputs in query's dtype and the float32 log-sum-exp of the scaled scores. Sums are float32.
    Differentiable in query and pages, the lists being fixed. Raises NotImplementedError for what the kernel cannot take, ValueError for a
    scale that is not positive or arrays beyond int32 offsets.
    """
    if implementation not in ("pallas", "xla"):
        raise ValueError(f"{implementation=}: choose pallas or xla")
    if not scale > 0:
        raise ValueError(f"{scale=} must be positive")
    if chunk_size % pages.shape[3]:
        raise ValueError(f"{chunk_size=} must be a multiple of the page's {pages.shape[3]} tokens")
    arrays = (query, pages, first_position, count, page_ids, since, counts)
    if implementation == "xla":
        return xla.routed_prefill_attention(*arrays, chunk_size=chunk_size, sink_chunks=sink_chunks, local_chunks=local_chunks, scale=scale)
    return _attention(_Settings(chunk_size, sink_chunks, local_chunks, scale, config, backward_config, interpret), *arrays)
