"""Rows of arrays that lie in pinned host memory: the embedding lookup, and neighbouring rows from one memory to the other."""

from pallas_kernels.host_rows.api import copy_rows, host_rows
from pallas_kernels.host_rows.config import Config

__all__ = ["Config", "copy_rows", "host_rows"]
