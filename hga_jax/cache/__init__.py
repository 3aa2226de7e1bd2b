"""Where the K/V history of one layer and one sequence lives. Only page ids and token positions cross this interface.

A *history* is a registered dataclass with the methods of `DeviceHistory`; attention code never asks which tier it talks to.
"""

from hga_jax.cache.device import DeviceHistory
from hga_jax.cache.host import HostHistory

__all__ = ["DeviceHistory", "HostHistory"]
