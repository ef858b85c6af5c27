"""Shipping: packed checkpoints, files for other runtimes, and what those cost."""

from jaxcompress.core.storage import container as container
from jaxcompress.core.storage.container import FileSize
from jaxcompress.export.benchmark import Measured, benchmark
from jaxcompress.export.checkpoint import Checkpoint, file_size, load, save
from jaxcompress.export.entropy import entropy_bytes
from jaxcompress.export.litert import LiteRT, litert
from jaxcompress.export.marks import mark_activations, mark_weights
from jaxcompress.export.onnx_file import OnnxReport, onnx
from jaxcompress.export.sessions import Session, session
from jaxcompress.export.stablehlo import StableHLO, load_stablehlo, stablehlo
from jaxcompress.export.stream import Progress, StreamReport, quantize_file
from jaxcompress.export.stream_read import Leaf, inspect

__all__ = [
    "Checkpoint",
    "FileSize",
    "Leaf",
    "LiteRT",
    "Measured",
    "OnnxReport",
    "Progress",
    "Session",
    "StableHLO",
    "StreamReport",
    "benchmark",
    "entropy_bytes",
    "file_size",
    "inspect",
    "litert",
    "load",
    "load_stablehlo",
    "mark_activations",
    "mark_weights",
    "onnx",
    "quantize_file",
    "save",
    "session",
    "stablehlo",
]
