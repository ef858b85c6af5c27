"""Shipping: packed checkpoints."""

from jaxcompress.export.checkpoint import Checkpoint, file_size, load, save
from jaxcompress.export.container import FileSize

__all__ = ["Checkpoint", "FileSize", "file_size", "load", "save"]
