"""Which implementation runs: asked for by name, or chosen once; a choice that had to fall back is logged once per reason."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax

Implementation = Literal["pallas", "xla"]
logger = logging.getLogger("hga_jax")


def is_cuda(device: jax.Device) -> bool:
    """Whether the device is an NVIDIA GPU."""
    return device.platform == "gpu" and "cuda" in device.client.platform_version.lower()


def on_cuda() -> bool:
    """Whether computations run on an NVIDIA GPU unless told otherwise."""
    return is_cuda(jax.devices()[0])


def choose(operation: str, implementation: Implementation | None, unsupported: str | None) -> Implementation:
    """`unsupported` says why the kernel cannot take these arguments, None when it can. implementation None: the kernel on a CUDA GPU, else
    XLA.

    Raises NotImplementedError when "pallas" was asked for by name and cannot run: whoever names an implementation gets it or an error.
    """
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f"{implementation=} is not one of 'pallas', 'xla', None")
    cuda = on_cuda()
    if implementation == "pallas":
        if unsupported or not cuda:
            raise NotImplementedError(f"{operation}: {unsupported or 'the kernel needs a CUDA GPU'}; use implementation='xla'")
        return "pallas"
    if implementation == "xla" or not cuda:
        return "xla"
    if unsupported:
        _log_fallback(operation, unsupported)
        return "xla"
    return "pallas"


@functools.cache
def _log_fallback(operation: str, reason: str) -> None:
    logger.warning("%s runs as plain XLA: %s", operation, reason)
