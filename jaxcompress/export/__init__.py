"""Shipping: packed checkpoints, and large ones quantized tensor by tensor."""

from jaxcompress.export.checkpoint import Checkpoint, file_size, load, save
from jaxcompress.export.container import FileSize
from jaxcompress.export.litert import LiteRT, litert
from jaxcompress.export.stablehlo import StableHLO, load_stablehlo, stablehlo
from jaxcompress.export.stream import Progress, StreamReport, quantize_file
from jaxcompress.export.stream_read import Leaf, inspect

__all__ = [
    "Checkpoint",
    "FileSize",
    "Leaf",
    "LiteRT",
    "Progress",
    "StableHLO",
    "StreamReport",
    "file_size",
    "inspect",
    "litert",
    "load",
    "load_stablehlo",
    "quantize_file",
    "save",
    "stablehlo",
]
