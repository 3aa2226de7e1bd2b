"""Decode attention over windows and routed pages that lie in device memory, in host memory, or in a device bank before host memory."""

from pallas_kernels.routed_decode_attention.api import (
    Bank,
    FreshToken,
    Merged,
    Partial,
    Windows,
    copy_pages,
    merge,
    page_attention,
    window_attention,
)
from pallas_kernels.routed_decode_attention.config import Config

__all__ = [
    "Bank",
    "Config",
    "FreshToken",
    "Merged",
    "Partial",
    "Windows",
    "copy_pages",
    "merge",
    "page_attention",
    "window_attention",
]
