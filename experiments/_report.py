"""The frame of every experiment: command line, console, one row of JSON, errors on one line.

An experiment is a module with options, a `main` and a call of `run`:

    @dataclasses.dataclass(frozen=True)
    class Args(Options):
        epochs: int = 3
        '''Passes over the training set.'''

    def main(args: Args, report: Report) -> dict:
        for epoch in report.progress(range(args.epochs), "training"):
            ...
        return {"top1_percent": 91.2}

    if __name__ == "__main__":
        run(main, "name")
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

try:
    import tyro
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise ImportError(
        f"{error.name} is missing: pip install 'jaxcompress[experiments]'", name=error.name
    ) from error

import jaxcompress
from jaxcompress.core.files import replacing

Row = dict[str, int | float | str | bool | None]

_ROOT = Path(__file__).resolve().parent.parent
_USER_ERRORS = (ValueError, TypeError, FileNotFoundError)


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags that every experiment has."""

    seed: int = 0
    """Seed of every random number."""
    out: Path | None = None
    """Folder to write NAME.json into."""
    json: bool = False
    """Print one JSON object as the last line of standard output, all else on standard error."""
    short: bool = False
    """A run of seconds that goes through the same code; its figures mean nothing."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Where an experiment speaks: standard output, or standard error under `--json`."""

    console: Console

    def progress(self, items: Iterable, description: str, *, total: float | None = None):
        """Iterates over `items` under a progress bar that leaves no trace."""
        return track(items, description, total=total, console=self.console, transient=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Prints a table; floats with four significant digits."""
        table = Table(title=title)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
        for row in rows:
            table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
        self.console.print(table)


def run(main: Callable, name: str, *, argv: Sequence[str] | None = None) -> Row:
    """Parses the command line, runs `main(args, report)` and reports the figures it returns.

    Args:
      main: its first argument is annotated with a frozen dataclass that extends `Options`. It
        returns a flat dict: snake_case keys with units, numbers, strings, bools or None.
      name: of the result, hence of the file under `--out`.
      argv: arguments instead of those of the process.

    Returns:
      The row: the figures, then name, seed, short, versions and commit.

    Raises:
      SystemExit: with status 2, after one line `error: ...` on standard error, if `main` raises a
        ValueError, TypeError or FileNotFoundError (`python -X dev` shows where); nothing is
        written then. Any other exception passes through: a traceback and status 1.
    """
    module = sys.modules[main.__module__]
    spec = getattr(module, "__spec__", None)
    options_type = next(iter(typing.get_type_hints(main).values()))
    args: Options = tyro.cli(
        options_type,
        prog=f"python -m {spec.name}" if spec else name,
        description=(module.__doc__ or "").split("\n\n")[0],
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        if args.out is not None and args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out must be a folder, {args.out} is a file")
        stream = sys.stderr if args.json else sys.stdout
        # a file or a pipe has no width: wide enough for the tables
        width = None if stream.isatty() or "COLUMNS" in os.environ else 120
        report = Report(Console(file=stream, width=width))
        # what a library prints must not end up beside the JSON
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            figures = checked(main(args, report))
        row = {**figures, "name": name, "seed": args.seed, "short": args.short, **provenance()}
        if args.out is not None:
            write_json(args.out / f"{name}.json", row)
    except _USER_ERRORS as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        print(json.dumps(row), flush=True)
    else:
        report.table(name, ("figure", "value"), figures.items())
    return row


def checked(figures: Mapping[str, object]) -> Row:
    """The figures as plain Python values.

    Raises:
      ValueError: a key is not snake_case or is one that `run` adds; a value is not a single
        number, string, bool or None; a number is not finite.

    >>> import numpy as np
    >>> checked({"latency_s": np.float32(0.5), "layers": np.int64(3)})
    {'latency_s': 0.5, 'layers': 3}
    """
    reserved = {"name", "seed", "short", *provenance()}
    row: Row = {}
    for key, value in figures.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", key) or key in reserved:
            raise ValueError(f"figure {key!r} must be snake_case and none of {sorted(reserved)}")
        if getattr(value, "shape", None) == ():
            value = value.item()  # type: ignore[attr-defined]
        if not isinstance(value, int | float | str | bool | None):
            raise ValueError(
                f"figure {key!r} must be one number, string, bool or None, got {type(value)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"figure {key!r} is {value}: the run did not succeed")
        row[key] = value
    return row


def provenance() -> Row:
    """Versions of what ran, and the commit of this checkout (None outside one)."""
    packages = ("jax", "flax", "optax")
    versions: Row = {f"{p}_version": importlib.metadata.version(p) for p in packages}
    return versions | {
        "jaxcompress_version": jaxcompress.__version__,
        "python_version": platform.python_version(),
        "commit": commit(_ROOT),
    }


def commit(root: Path) -> str | None:
    """The commit checked out at `root`; None if `root` is not the top of a Git checkout."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    # in a Git hook GIT_DIR would point elsewhere
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, head = done.stdout.splitlines()
    # installed in an environment inside somebody else's checkout: not our commit
    return head if Path(top).resolve() == root.resolve() else None


def write_json(path: Path, row: Mapping[str, object]) -> None:
    """Writes `row` to `path`, whole or not at all; makes the folder if need be."""
    text = json.dumps(row, indent=2, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())
