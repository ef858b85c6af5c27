"""How far are predicted latencies and energies from those of MLPerf Tiny?

    python -m experiments.cost_validation            (20 seconds, no download)

`experiments/mlperf_tiny.csv` holds the public int8 results, with the file each is from. Every board
(a submission: board, runtime, round) is predicted from all others: their measurements say how the
classes of layers relate on boards with its kind of runtime (`cost.class_factors`), and, without
a measurement of its own, how fast boards with its core and runtime are. Calibrated, the board adds
one measurement: all ordered pairs of its networks count. "Strict" also leaves out all other rounds
of the same physical board with the same kind of runtime. Energy is the mean power of the board's
other networks times the measured latency. The scatter is cost_validation.png under --out.
"""

import csv
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments.models.zoo import ZOO
from jaxcompress.core.files import replacing

NETWORKS = {
    "ic": "resnet8",
    "kws": "ds_cnn",
    "vww": "mobilenet_v1_025",
    "ad": "autoencoder",
}
PADDED = {"x-cube-ai": 4}
"""Channels that a runtime's kernels pad inputs to."""
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    quantiles: Path | None = None
    """Write the errors that `cost.calibrate` ships to this file."""


class Row(NamedTuple):
    """One result."""

    board: tuple[str, ...]  # round, submitter, board, core, runtime, clock
    task: str
    cycles: float
    latency_s: float
    energy_j: float | None
    energy_latency_s: float
    kind: str

    @property
    def core(self) -> str:
        """The processor core."""
        return self.board[3]

    @property
    def runtime(self) -> str:
        """The runtime without its version."""
        return re.sub(r"[\s\d.].*", "", self.board[4])


def results() -> list[Row]:
    """The int8 results whose clock is known."""
    file = Path(__file__).with_name("mlperf_tiny.csv")
    rows = []
    for row in csv.DictReader(file.read_text("utf-8").splitlines()):
        if row["dtype"] != "int8" or not row["clock_hz"]:
            continue
        board = tuple(row[k] for k in "round submitter board core runtime clock_hz".split())
        latency_s = float(row["latency_s"])
        rows.append(
            Row(
                board,
                row["task"],
                latency_s * float(row["clock_hz"]),
                latency_s,
                float(row["energy_j"]) if row["energy_j"] else None,
                float(row["energy_latency_s"] or latency_s),
                row["kind"],
            )
        )
    return rows


def template(inputs: int) -> jc.cost.Device:
    """A core of 1 Hz on which every multiply-accumulate of int8 takes one cycle."""
    estimate = {"source": "assumed, to be fitted", "grade": "estimate"}
    number = lambda value, unit: {"value": value, "unit": unit, **estimate}
    rate = {"weight": "int8", "activation": "int8", "op": "any", **number(1, "cycle/MAC")}
    memory = {"capacity": number(1e12, "B"), "bandwidth": number(1e12, "B/s")}
    runtime = {
        "description": f"input channels padded to {inputs}",
        "rates": "effective",
        "weights": "memory",
        "activations": "memory",
        "fusion": "activation",
        "active_power": number(0, "W"),
        "overhead": number(0, "s"),
        "alignment": {"inputs": number(inputs, "channel")},
        "throughput": [rate],
    }
    return jc.cost.device_of_tables(
        {
            "description": "a core",
            "clock": number(1, "Hz"),
            "memory": {"memory": memory},
            "runtime": {"kernels": runtime},
        },
        name="template",
    )


def costs_on(device: jc.cost.Device) -> dict[str, jc.cost.Cost]:
    """The four networks with int8 weights and activations on a device."""
    costs = {}
    for task, name in NETWORKS.items():
        apply_fn, variables, inputs = ZOO[name].build()
        int8 = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), variables)

        def dequantized(variables, *inputs, apply_fn=apply_fn):
            return apply_fn(jax.tree.map(lambda w: w.astype(jnp.float32), variables), *inputs)

        costs[task] = jc.cost.estimate(dequantized, int8, *inputs, device=device, activations=8)
    return costs


Boards = dict[tuple[str, ...], list[Row]]


class Predictor:
    """Predicts boards from other boards."""

    def __init__(self, boards: Boards):
        self.boards = boards
        plain = costs_on(template(1))
        padded = {runtime: costs_on(template(n)) for runtime, n in PADDED.items()}
        self.costs = lambda row: padded.get(row.runtime, plain)[row.task]

    def measured(self, boards: Iterable[Sequence[Row]]) -> list[list[jc.cost.Measured]]:
        """Estimates with cycles."""
        return [[(self.costs(row), row.cycles) for row in rows] for rows in boards]

    def others(self, board: tuple[str, ...], *, strict: bool) -> Boards:
        """The boards that `board` may be predicted from."""
        me = self.boards[board][0]

        def apart(key: tuple[str, ...], row: Row) -> bool:
            return key != board and not (
                strict and key[2] == board[2] and row.runtime == me.runtime
            )

        return {key: rows for key, rows in self.boards.items() if apart(key, rows[0])}

    def factors(self, me: Row, others: Boards) -> dict[str, float]:
        """How classes of layers relate: of all others, then of those with its kind of runtime."""
        everywhere = jc.cost.class_factors(self.measured(others.values()))
        alike = [rows for rows in others.values() if rows[0].runtime == me.runtime]
        return jc.cost.class_factors(self.measured(alike), prior=everywhere)

    def speed(self, me: Row, others: Boards, factors: Mapping[str, float]) -> float:
        """Median speed of the boards most like this one: core and runtime, core, runtime, all."""
        like = [
            lambda row: row.core == me.core and row.runtime == me.runtime,
            lambda row: row.core == me.core,
            lambda row: row.runtime == me.runtime,
            lambda row: True,
        ]
        for alike in like:
            chosen = [rows for rows in others.values() if alike(rows[0])]
            if chosen:
                break
        fitted = [
            np.mean([np.log(s / _latency(factors, c)) for c, s in b]) for b in self.measured(chosen)
        ]
        return float(np.exp(np.median(fitted)))

    def errors(self, *, strict: bool) -> dict[int, list[tuple[tuple[str, ...], Row, float]]]:
        """log(predicted / measured) by number of own measurements: 0, 1, 2, 3."""
        found: dict[int, list[tuple[tuple[str, ...], Row, float]]] = {n: [] for n in range(4)}
        for board, rows in self.boards.items():
            others = self.others(board, strict=strict)
            factors = self.factors(rows[0], others)
            speed = self.speed(rows[0], others, factors)
            for row in rows:
                plain = speed * _latency(factors, self.costs(row))
                found[0].append((board, row, float(np.log(plain / row.cycles))))
                rest = [other for other in rows if other is not row]
                for n in range(1, len(rest) + 1):
                    for own in itertools.combinations(rest, n):
                        points = [(self.costs(r), r.cycles) for r in own]
                        fitted = jc.cost.calibrate(points, factors=factors)
                        predicted = fitted.latency_s(self.costs(row))
                        found[n].append((board, row, float(np.log(predicted / row.cycles))))
        return found


def _latency(factors: Mapping[str, float], cost: jc.cost.Cost) -> float:
    return jc.cost.Calibration(factors, 0).latency_s(cost)


def conformal(errors: Sequence[float], coverage: float) -> float:
    """The error that a new one stays within with probability `coverage` (split conformal)."""
    ranked = np.sort(np.abs(errors))
    return float(ranked[min(int(np.ceil((len(ranked) + 1) * coverage)), len(ranked)) - 1])


def coverage_of(errors: Sequence[tuple[tuple[str, ...], Row, float]], coverage: float) -> float:
    """Share of errors within the bound that all other boards' errors give."""
    inside = []
    for board in {board for board, *_ in errors}:
        bound = conformal([e for b, _, e in errors if b != board], coverage)
        inside += [abs(e) <= bound for b, _, e in errors if b == board]
    return float(np.mean(inside))


def energy_errors(rows: Sequence[Row]) -> list[float]:
    """Relative errors of mean power of a board's other networks times latency."""
    errors = []
    for row in rows:
        others = [r for r in rows if r.board == row.board and r.task != row.task and r.energy_j]
        if row.energy_j and others:
            watts = np.mean([r.energy_j / r.energy_latency_s for r in others if r.energy_j])
            errors.append(float(watts * row.energy_latency_s / row.energy_j - 1))
    return errors


def by_board(rows: Iterable[Row]) -> Boards:
    """Microcontrollers with at least two networks."""
    boards: Boards = {}
    for row in rows:
        if row.kind == "mcu":
            boards.setdefault(row.board, []).append(row)
    return {board: rows for board, rows in boards.items() if len(rows) > 1}


def relative(logs: Iterable[float]) -> np.ndarray:
    """|predicted / measured - 1| of log ratios."""
    return np.abs(np.expm1(np.asarray(list(logs))))


def main(args: Args, report: Report) -> dict:
    """Predicts every board from the others."""
    rows = results()
    boards = by_board(rows)
    if args.short:
        boards = dict(itertools.islice(boards.items(), 0, None, 5))
    predictor = Predictor(boards)
    errors, strict = (predictor.errors(strict=s) for s in (False, True))
    energy = energy_errors(rows)
    table = []
    for name, found in (("", errors), ("strict", strict)):
        for n, what in ((0, "no measurement"), (1, "one"), (2, "two"), (3, "three")):
            e = relative(x for *_, x in found[n])
            covered = coverage_of(found[n], 0.9)
            table.append((f"{what} {name}", len(e), np.median(e), np.quantile(e, 0.9), covered))
    table.append(
        ("energy", len(energy), np.median(np.abs(energy)), np.quantile(np.abs(energy), 0.9), "")
    )
    columns = ("own measurements", "points", "median error", "90th percentile", "90 % covers")
    report.table("predicted against measured, MLPerf Tiny", columns, table)
    if args.out is not None:
        draw(args.out / "cost_validation.png", errors)
    if args.quantiles is not None:
        write_quantiles(args.quantiles, errors)
    return {
        "latency_calibrated_median_error": float(np.median(relative(e for *_, e in errors[1]))),
        "latency_uncalibrated_median_error": float(np.median(relative(e for *_, e in errors[0]))),
        "latency_calibrated_strict_median_error": float(
            np.median(relative(e for *_, e in strict[1]))
        ),
        "latency_uncalibrated_strict_median_error": float(
            np.median(relative(e for *_, e in strict[0]))
        ),
        "latency_calibrated_p90_error": float(np.quantile(relative(e for *_, e in errors[1]), 0.9)),
        "interval_90_coverage": coverage_of(errors[1], 0.9),
        "interval_50_coverage": coverage_of(errors[1], 0.5),
        "energy_median_error": float(np.median(np.abs(energy))),
        "energy_points": len(energy),
        "points": len(errors[0]),
        "calibrated_points": len(errors[1]),
        "boards": len(boards),
    }


def draw(path: Path, errors: Mapping[int, Sequence[tuple[tuple[str, ...], Row, float]]]) -> None:
    """Predicted against measured latency, without and with one measurement."""
    with plot(path, columns=2, size=(10, 4.5)) as axes:
        for n, title, ax in zip((0, 1), ("no measurement", "one measurement"), axes, strict=True):
            for task in NETWORKS:
                found = [(row.latency_s, e) for _, row, e in errors[n] if row.task == task]
                measured = np.array([s for s, _ in found])
                ax.scatter(measured, measured * np.exp([e for _, e in found]), s=8, label=task)
            ends = np.array([1e-3, 2])
            ax.plot(ends, ends, "k-", lw=0.8)
            ax.set(xscale="log", yscale="log", xlabel="measured, s", ylabel="predicted, s")
            ax.set_title(f"{title} of the board itself")
            ax.legend()


def write_quantiles(
    path: Path, errors: Mapping[int, Sequence[tuple[tuple[str, ...], Row, float]]]
) -> None:
    """The table of `cost.calibrate`."""
    lines = [
        "description = \"|log(measured / predicted)| that a share of the predictions of a board's "
        "latency stays within, by the number of networks measured on the board: MLPerf Tiny int8 "
        "results, every board predicted from the others, python -m experiments.cost_validation "
        '--quantiles FILE"\n'
    ]
    for n, found in errors.items():
        bounds = [round(conformal([e for *_, e in found], c), 4) for c in COVERAGES]
        lines.append(f"\n[measurements.{n}]\npoints = {len(found)}\n")
        lines.append(f"coverage = {list(COVERAGES)}\nerror = {bounds}\n")
    with replacing(path) as file:
        file.write("".join(lines).encode())


if __name__ == "__main__":
    run(main, "cost_validation")
