"""Plots of experiments: drawn without a display, written whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcompress.core.files import replacing


@contextlib.contextmanager
def plot(path: Path, *, columns: int = 1, size: tuple[float, float] = (6, 4)) -> Iterator[Any]:
    """Gives the axes (an array of them if `columns` > 1); at the end writes a PNG to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
    try:
        yield axes
        with replacing(path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        plt.close(figure)
