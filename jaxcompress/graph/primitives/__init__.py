"""What JAX primitives mean: their rows, and what those do that move elements."""

from jaxcompress.graph.primitives.declared import declare
from jaxcompress.graph.primitives.movement import (
    Moved,
    Pad,
    Permute,
    Regroup,
    Spread,
    Take,
    move,
    moved,
    taken,
    whole_axes,
)
from jaxcompress.graph.primitives.table import Row, degree_of, names, row, rows

__all__ = [
    "Moved", "Pad", "Permute", "Regroup", "Row", "Spread", "Take", "declare", "degree_of", "move",
    "moved", "names", "row", "rows", "taken", "whole_axes",
]  # fmt: skip
