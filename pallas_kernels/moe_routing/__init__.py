"""Which experts a token goes to and with what weight, from the router's scores."""

from pallas_kernels.moe_routing.api import moe_routing
from pallas_kernels.moe_routing.config import Config

__all__ = ["Config", "moe_routing"]
