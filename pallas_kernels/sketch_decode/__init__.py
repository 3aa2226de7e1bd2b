"""One decoded token of the sketch policy in few launches: operations of sketch_routing and routed_decode_attention that share one."""

from pallas_kernels.sketch_decode.api import Attended, Scanned, attend_selected, scan_beside_windows

__all__ = ["Attended", "Scanned", "attend_selected", "scan_beside_windows"]
