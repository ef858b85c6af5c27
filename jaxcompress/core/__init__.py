"""The core abstraction: compressors, packed arrays, path rules, exact selection."""

from jaxcompress.core.combine import by_path, chain, partition, uncovered_weights
from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    identity,
    is_float_array,
    per_leaf,
)
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

__all__ = [
    "CompressState",
    "Compressor",
    "Grid",
    "Masked",
    "QTensor",
    "by_path",
    "chain",
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
    "uncovered_weights",
    "unpack",
]
