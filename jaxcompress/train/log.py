"""The log of a run: one JSON object a line, cut back to the checkpoint when the run goes on."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Metrics = Mapping[str, Any]  # name -> scalar, on the device or not


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a log that `fit` wrote; a last line that was not finished is left out.

    Raises:
      ValueError: a line is none of `fit`.
    """
    return [row for row, _ in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    # (row, offset behind it)
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # killed while it was written
            end += len(line)
            try:
                row = json.loads(line)
                yield {"step": int(row["step"]), **row}, end
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number} is no row of a log of fit") from None


def cut(path: Path, step: int) -> None:
    """Cuts a log behind its last row of the steps up to `step`; makes the file if it is missing.

    Raises:
      ValueError: the file is something else; it stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    ends = [(row["step"], end) for row, end in _rows(path)]
    os.truncate(path, max((end for at, end in ends if at <= step), default=0))


class Recorder:
    """Metrics stay on the device until `flush` fetches, checks and writes them all at once."""

    def __init__(self, path: str | os.PathLike | None, *, step: int, every: int):
        self._path = None if path is None else Path(path)
        self._every, self._pending = every, []
        if self._path is not None:
            cut(self._path, step)

    def add(self, step: int, metrics: Metrics, *, always: bool = False) -> None:
        """Keeps the metrics of a step; `always`: they become a row even between the steps."""
        for name, value in metrics.items():
            if name == "step":
                raise ValueError("a metric may not be called 'step': every row has it already")
            if np.shape(value):
                raise ValueError(
                    f"metric {name!r} must be a scalar, got shape {list(np.shape(value))}"
                )
        self._pending.append((step, dict(metrics), always or step % self._every == 0))

    def flush(self) -> None:
        """Writes the rows, to the disk.

        Raises:
          FloatingPointError: a metric is NaN or infinite, with its name and step; the rows before
            it are written.
        """
        values = jax.device_get([metrics for _, metrics, _ in self._pending])
        lines, fault = [], None
        for (step, _, written), metrics in zip(self._pending, values, strict=True):
            row = {name: np.asarray(value).item() for name, value in metrics.items()}
            bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
            if bad:
                fault = f"step {step}: {bad[0]} is {row[bad[0]]}"
                break
            if written and row:
                lines.append(json.dumps({"step": step, **row}) + "\n")
        self._pending.clear()
        if self._path is not None and lines:
            with self._path.open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        if fault:
            raise FloatingPointError(fault)
