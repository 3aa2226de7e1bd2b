"""Decode routing of the sketch policy: 2-bit sketches of every token -> pages whose estimated attention mass passes a threshold."""

from pallas_kernels.sketch_routing.api import (
    PageList,
    Pages,
    ScanQuery,
    Scores,
    append_sketch,
    carried_pages,
    check_sketch,
    list_shape,
    middle_of,
    pack_codes,
    prepare,
    scan,
    select,
    sketch_chunks,
    sketch_routing,
    unpack_codes,
)
from pallas_kernels.sketch_routing.config import Config

__all__ = [
    "Config",
    "PageList",
    "Pages",
    "ScanQuery",
    "Scores",
    "append_sketch",
    "carried_pages",
    "check_sketch",
    "list_shape",
    "middle_of",
    "pack_codes",
    "prepare",
    "scan",
    "select",
    "sketch_chunks",
    "sketch_routing",
    "unpack_codes",
]
