"""The core abstraction: compressors, packed arrays, path rules, exact selection."""

from jaxcompress.core.combine import by_path, chain, partition, uncovered_weights
from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    identity,
    is_float_array,
    per_leaf,
)
from jaxcompress.core.constant_fan_in import Condensed, condense, condensed_matmul
from jaxcompress.core.mask_storage import smallest_form
from jaxcompress.core.packed import (
    Grid,
    Masked,
    QTensor,
    is_packed,
    mask_leaf,
    masked_bytes,
    packed_bytes,
    unpack,
)
from jaxcompress.core.paths import leaves_with_paths, match_rules, near_misses, path_str
from jaxcompress.core.sparse import Bitmask, Groups, Positions, Rows
from jaxcompress.core.storage import file_bytes

__all__ = [
    "Bitmask",
    "CompressState",
    "Compressor",
    "Condensed",
    "Grid",
    "Groups",
    "Masked",
    "Positions",
    "QTensor",
    "Rows",
    "by_path",
    "chain",
    "condense",
    "condensed_matmul",
    "file_bytes",
    "identity",
    "is_float_array",
    "is_packed",
    "leaves_with_paths",
    "mask_leaf",
    "masked_bytes",
    "match_rules",
    "near_misses",
    "packed_bytes",
    "partition",
    "path_str",
    "per_leaf",
    "smallest_form",
    "uncovered_weights",
    "unpack",
]
