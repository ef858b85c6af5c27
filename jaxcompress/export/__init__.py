"""Shipping: packed checkpoints, large ones quantized tensor by tensor, files for runtimes."""

from jaxcompress.export.checkpoint import Checkpoint, file_size, load, save
from jaxcompress.export.container import FileSize
from jaxcompress.export.marks import mark_activations, mark_weights
from jaxcompress.export.onnx_file import OnnxReport, onnx
from jaxcompress.export.stream import Progress, StreamReport, quantize_file
from jaxcompress.export.stream_read import Leaf, inspect

__all__ = [
    "Checkpoint",
    "FileSize",
    "Leaf",
    "OnnxReport",
    "Progress",
    "StreamReport",
    "file_size",
    "inspect",
    "load",
    "mark_activations",
    "mark_weights",
    "onnx",
    "quantize_file",
    "save",
]
