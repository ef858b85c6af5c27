"""Runs of a long experiment, kept in a file that grows with every one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments._report import Report, write_json


class Runs:
    """Results by a key that says all settings of a run, in OUT/NAME_runs.json.

    An experiment of hours is stopped and started again, and goes on where it was. Processes with
    parts of it may share --out: what others have written is kept. Without --out nothing is.
    """

    def __init__(self, out: Path | None, name: str, report: Report):
        self.path = Path(out) / f"{name}_runs.json" if out else None
        self.report = report
        self.done: dict[str, Any] = self._written()

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A run, from the file if it is there."""
        if key not in self.done:
            self.done[key] = compute()
            self.report.console.print(f"{key}: {self.done[key]}")
            if self.path is not None:
                self.done = self._written() | self.done
                write_json(self.path, self.done)
        return self.done[key]

    def _written(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        return json.loads(self.path.read_text())
