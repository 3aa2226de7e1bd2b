"""Prefill attention over windows and routed pages in device memory."""

from pallas_kernels.routed_prefill_attention.api import routed_prefill_attention
from pallas_kernels.routed_prefill_attention.config import Config

__all__ = ["Config", "routed_prefill_attention"]
