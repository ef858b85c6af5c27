"""A plan: an option for every site, as a JSON file that can be read, edited and replayed."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxcompress.core.files import replacing


@dataclass(frozen=True)
class Plan:
    """What to do with every site, and what it should cost.

    Attributes:
      weights: {path of a leaf: name of an option}.
      activations: name of the format of all activations; None: as they are.
      device: name of the device it was made for.
      predicted: {cost: value}, as `cost.Cost`.
      loss: sum of the sensitivities of the options, less that of the network as it was.
      measured: {metric: value} of the plan on the data it was made with.
    """

    weights: Mapping[str, str] = field(hash=False)
    activations: str | None = None
    device: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict, hash=False)
    loss: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all."""
        with replacing(path) as file:
            file.write((json.dumps(vars(self), indent=2) + "\n").encode())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=88)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get()

    def __rich__(self) -> Any:
        from rich.table import Table

        costs = ", ".join(f"{name} {value:,.6g}" for name, value in self.predicted.items())
        table = Table(title=f"{self.device}: {costs}", title_justify="left")
        table.add_column("weights")
        table.add_column("option")
        for site, option in self.weights.items():
            table.add_row(site, option)
        return table


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan of a JSON file, `Plan.save` or a hand wrote.

    Raises:
      ValueError: it is no such file; the message says what is wrong.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"plan {path}: no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        raise ValueError(f'plan {path}: there must be an object "weights" of sites and options')
    known = {f.name for f in fields(Plan)}
    unknown = set(found) - known
    if unknown:
        raise ValueError(f"plan {path}: unknown {sorted(unknown)}; known: {sorted(known)}")
    wrong = {
        site: option for site, option in found["weights"].items() if not isinstance(option, str)
    }
    if wrong:
        raise ValueError(f"plan {path}: options must be names, got {wrong}")
    _check_rest(path, found)
    return Plan(**found)


def _check_rest(path: str | os.PathLike[str], found: dict[str, Any]) -> None:
    """Names are names and numbers are finite: JSON that Python reads may hold NaN."""
    form = found.get("activations")
    if form is not None and not isinstance(form, str):
        raise ValueError(f"plan {path}: activations must be a format's name or null, got {form!r}")
    if not isinstance(found.get("device", ""), str):
        raise ValueError(f"plan {path}: device must be a name, got {found['device']!r}")
    numbers: dict[str, Any] = {"loss": found.get("loss", 0.0)}
    for name in ("predicted", "measured"):
        table = found.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"plan {path}: {name} must be an object of numbers, got {table!r}")
        numbers |= {f"{name}[{key!r}]": value for key, value in table.items()}
    for name, value in numbers.items():
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not math.isfinite(value):
            raise ValueError(f"plan {path}: {name} must be a finite number, got {value!r}")
        if name.startswith("predicted") and value < 0:
            raise ValueError(f"plan {path}: {name} must be at least 0, got {value}")
