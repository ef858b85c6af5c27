"""Shipping: packed checkpoints, files for other runtimes, and what those cost."""

from jaxcompress.core.storage import container as container
from jaxcompress.core.storage.container import FileSize
from jaxcompress.export.benchmarks import Measured, benchmark
from jaxcompress.export.checkpoint.huffman_bound import entropy_bytes
from jaxcompress.export.checkpoint.packed_file import Checkpoint, file_size, load, save
from jaxcompress.export.checkpoint.stream_read import Leaf, inspect
from jaxcompress.export.checkpoint.streaming import Progress, StreamReport, quantize_file
from jaxcompress.export.litert_format.litert_file import LiteRT, litert
from jaxcompress.export.marks import mark_activations, mark_weights
from jaxcompress.export.onnx_format.onnx_file import OnnxReport, onnx
from jaxcompress.export.sessions import Session, session
from jaxcompress.export.stablehlo_file import StableHLO, load_stablehlo, stablehlo

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
