"""Rows of a table that lies in pinned host memory: the embedding lookup."""

from pallas_kernels.host_rows.api import host_rows
from pallas_kernels.host_rows.config import Config

__all__ = ["Config", "host_rows"]
