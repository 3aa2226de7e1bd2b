"""Prefill routing of the sketch policy: all blocks of a prompt at once, a handful of launches."""

from pallas_kernels.sketch_prefill_routing.api import PageLists, route
from pallas_kernels.sketch_prefill_routing.config import Config, Rule, Screen, Tile
from pallas_kernels.sketch_prefill_routing.kernel import unsupported

__all__ = ["Config", "PageLists", "Rule", "Screen", "Tile", "route", "unsupported"]
