"""jaxcompress: a smaller network that keeps its accuracy, for the device it must run on."""

from jaxcompress import (
    core,
    distill,
    export,
    formats,
    graph,
    plot,
    prune,
    quantize,
    search,
    train,
)
from jaxcompress import cost as cost
from jaxcompress.core import (
    Compressor,
    CompressState,
    Masked,
    QTensor,
    by_path,
    chain,
    identity,
    packed_bytes,
    partition,
    per_leaf,
    unpack,
)
from jaxcompress.search import Budget

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CompressState",
    "Compressor",
    "Masked",
    "QTensor",
    "by_path",
    "chain",
    "core",
    "cost",
    "distill",
    "export",
    "formats",
    "graph",
    "identity",
    "packed_bytes",
    "partition",
    "per_leaf",
    "plot",
    "prune",
    "quantize",
    "search",
    "train",
    "unpack",
]
