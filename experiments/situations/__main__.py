"""Question: does every method keep its promise in every situation of a kind of fault?

    python -m experiments.situations uses --json

Each kind is one table, methods x situations, against an independent reference (NumPy float64, a
closed form, or the runtime that reads the file); the module of the kind says which.
  cells            of the table
  held             of these, those in which the promise holds
The exit status is not zero if a promise is broken. About a minute a kind on two CPU cores. Results:
experiments/results/situations_KIND.json.
"""

import dataclasses
import importlib
import pkgutil
import sys
from typing import Annotated

import tyro

from experiments import situations
from experiments._report import Options, Report, run


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    kind: Annotated[str, tyro.conf.Positional] = "uses"
    """Which table: a module of `experiments/situations`."""


def main(args: Args, report: Report) -> dict:
    """Prints the table of one kind."""
    kinds = sorted(m.name for m in pkgutil.iter_modules(situations.__path__) if m.name[0] != "_")
    if args.kind not in kinds:
        raise ValueError(f"kind {args.kind!r} is none of {kinds}")
    module = importlib.import_module(f"experiments.situations.{args.kind}")
    table = module.table(args.seed, lambda items: report.progress(items, args.kind))
    mark = lambda cell: cell.text if cell.holds else f"{cell.text} (!)"
    rows = [(method, *map(mark, cells)) for method, cells in table.cells.items()]
    report.table(table.promise, (args.kind, *table.situations), rows)
    cells = [cell for row in table.cells.values() for cell in row]
    broken = [
        f"{method}, {situation}"
        for method, row in table.cells.items()
        for situation, cell in zip(table.situations, row, strict=True)
        if not cell.holds
    ]
    if broken:
        report.console.print(f"broken: {'; '.join(broken)}")
        raise SystemExit(1)
    return {"kind": args.kind, "cells": len(cells), "held": len(cells) - len(broken)}


if __name__ == "__main__":
    kind = next((argument for argument in sys.argv[1:2] if argument[0] != "-"), Args.kind)
    run(main, f"situations_{kind}")
