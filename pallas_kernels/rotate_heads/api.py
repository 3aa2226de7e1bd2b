"""The public function of the heads; `implementation` picks the kernel or plain XLA."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.normalise import Norm
from pallas_kernels.rotate_heads import kernel, xla


def rotate_heads(
    joined: Float[Array, "T total"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    *,
    heads: int,
    kv_heads: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Queries, keys and values of a few tokens, queries and keys normalised and rotated, from the products of their projections.

    joined: rows of q, k and v one after another, total = (N + 2K) * H. cos, sin float32: of the angle of each pair (i, i + H/2). dtype: of
    the results, by default joined's; in between, numbers are rounded to joined's.
    implementation None: the kernel on a CUDA GPU, plain XLA elsewhere. Raises NotImplementedError when "pallas" cannot run.
    """
    arguments = (joined, cos, sin, q_norm, k_norm, heads, kv_heads, dtype or joined.dtype)
    if choose("rotate_heads", implementation, kernel.unsupported(joined, 2 * cos.shape[1])) == "pallas":
        return kernel.rotate_heads(*arguments)
    return xla.rotate_heads(*arguments)
