"""Decode routing of the paper policy: each query head's best chunks, then its best groups among them."""

from pallas_kernels.paper_routing.api import Pages, empty_marks, paper_routing
from pallas_kernels.paper_routing.config import Config

__all__ = ["Config", "Pages", "empty_marks", "paper_routing"]
