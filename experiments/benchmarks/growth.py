"""How do seconds, traces and compilations grow with the number of layers, and since a commit?

Command   python -m experiments.benchmarks.growth --json
Result    experiments/results/growth.json

A network of 4, 16 and 64 unrolled dense layers of 32 units. Every entry is called once in a new
process, in this tree and in a git worktree of an older commit in turn; the median of the rounds
counts. Traces are calls of `jax.make_jaxpr`, of the network or of a part of it (derivative rules);
compilations are XLA's. The limit of traces is one for each distinct network.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments._report import Options, Report, run
from experiments.benchmarks import _growth

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    before: str = "5c3d46d"
    """The commit to compare with; empty: none."""
    layers: tuple[int, ...] = (4, 16, 64)
    """Numbers of layers."""
    entries: tuple[str, ...] = tuple(_growth.ENTRIES)
    """What is called."""
    rounds: int = 3
    """Of every measurement."""
    limit: float = 600.0
    """Seconds after which a call is given up."""


def main(args: Args, report: Report) -> dict:
    """Prints one row for each entry and number of layers."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if args.before:
            trees["before"] = Path(folder) / "before"
            add = ["git", "worktree", "add", "--detach", str(trees["before"]), args.before]
            subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
        try:
            rows = _measured(args, report, trees)
        finally:
            if args.before:
                remove = ["git", "worktree", "remove", "--force", str(trees["before"])]
                subprocess.run(remove, cwd=ROOT, check=True, capture_output=True)
    shown = ("seconds", "traces", "compilations")
    report.table(
        "first call", ("entry, layers", *(f"{key} {tree}" for key in shown for tree in trees)),
        [
            (name, *(f"{row[tree][key]:.3g}" for key in shown for tree in trees))
            for name, row in rows.items()
        ],
    )  # fmt: skip
    return {"rows": rows, "before": args.before}


def _measured(args: Args, report: Report, trees: dict[str, Path]) -> dict:
    jobs = [(entry, n) for entry in args.entries for n in args.layers]
    rows: dict[str, dict] = {}
    for entry, n in report.progress(jobs, "entries"):
        seen: dict[str, list[dict]] = {tree: [] for tree in trees}
        for _ in range(args.rounds):
            for tree, root in trees.items():
                if not (seen[tree] and seen[tree][-1]["seconds"] > 60):  # long ones once
                    seen[tree].append(_call(entry, n, args.seed, root, args.limit))
        rows[f"{entry}, {n}"] = {
            tree: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for tree, found in seen.items()
        }
    return rows


def _call(entry: str, layers: int, seed: int, root: Path, limit: float) -> dict:
    script = ROOT / "experiments" / "benchmarks" / "_growth.py"
    command = [sys.executable, "-P", str(script), entry, str(layers), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(("seconds", "traces", "compilations"), float("nan"))
    if done.returncode:
        raise RuntimeError(f"{entry} of {layers} layers: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    run(main, "growth")
