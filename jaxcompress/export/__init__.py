"""Shipping: packed checkpoints, and large ones quantized tensor by tensor."""

from jaxcompress.export.checkpoint import Checkpoint, file_size, load, save
from jaxcompress.export.container import FileSize
from jaxcompress.export.entropy import entropy_bytes
from jaxcompress.export.stream import Progress, StreamReport, quantize_file
from jaxcompress.export.stream_read import Leaf, inspect

__all__ = [
    "Checkpoint",
    "FileSize",
    "Leaf",
    "Progress",
    "StreamReport",
    "entropy_bytes",
    "file_size",
    "inspect",
    "load",
    "quantize_file",
    "save",
]
