"""The public function of the expert choice; `implementation` picks the kernel or plain XLA."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.moe_routing import kernel, xla


def moe_routing(
    scores: Float[Array, "T E"], choices: int, *, renormalise: bool = True, implementation: Implementation | None = None
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """(ids, weights): the `choices` experts of highest score, best first (of equal ones the lower), and their softmax probability among
    all experts, or among the chosen when `renormalise`. scores float32.

    implementation None: the kernel on a CUDA GPU, plain XLA elsewhere. Raises NotImplementedError when "pallas" cannot run.
    """
    reason = kernel.unsupported(*scores.shape, choices)
    if choose("moe_routing", implementation, reason) == "pallas":
        return kernel.moe_routing(scores, choices, renormalise)
    return xla.moe_routing(scores, choices, renormalise)
