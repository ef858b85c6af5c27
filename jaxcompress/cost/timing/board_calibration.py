"""Fits an estimate to a board by a few measurements, and says how far off it may then be."""

import dataclasses
import functools
import importlib.resources
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxcompress.cost.device_model import OPS, Device, Quantity, Rate
from jaxcompress.cost.result import Cost

Measured = tuple[Cost, float]  # an estimate, and the seconds that were measured

_STEPS = 10


@functools.cache
def _errors() -> dict[str, dict[str, list[float]]]:
    file = importlib.resources.files("jaxcompress.cost") / "tables" / "calibration.toml"
    return tomllib.loads(file.read_text("utf-8"))["measurements"]


def error_bound(measurements: int, coverage: float = 0.9) -> float:
    """|log(measured / predicted)| that a share `coverage` of predictions stays within.

    From MLPerf Tiny, each board predicted from the others and from that many measurements of its
    own (`experiments.cost_validation`); more than three count as three.

    Raises:
      ValueError: a coverage outside 0.5 to 0.95, a negative number.

    >>> error_bound(1, 0.9) > error_bound(1, 0.5) > 0
    True
    """
    table = _errors()[str(min(measurements, 3))]
    low, high = table["coverage"][0], table["coverage"][-1]
    if measurements < 0 or not low <= coverage <= high:
        raise ValueError(f"coverage: must be from {low} to {high}, got {coverage!r}")
    return float(np.interp(coverage, table["coverage"], table["error"]))


class Calibration(NamedTuple):
    """How much slower each class of layers runs than the device file says.

    Attributes:
      factors: by class (`device.OPS`); kernels without contraction have their mean.
      measurements: how many it rests on.
    """

    factors: Mapping[str, float]
    measurements: int

    def latency_s(self, cost: Cost) -> float:
        """The estimate's latency with the factors applied."""
        return sum(self._factor(layer.op) * layer.latency_s for layer in cost.layers)

    def interval_s(self, cost: Cost, coverage: float = 0.9) -> tuple[float, float]:
        """Seconds between which the latency lies with probability `coverage` (0.5 to 0.95).

        Raises:
          ValueError: another coverage.
        """
        factor = math.exp(error_bound(self.measurements, coverage))
        return self.latency_s(cost) / factor, self.latency_s(cost) * factor

    def apply(self, device: Device) -> Device:
        """The device with rates divided by the factors, for `estimate`."""
        source = f"calibrated by {self.measurements} measurements; before: "

        def slower(quantity: Quantity, factor: float) -> Quantity:
            per_unit = quantity.unit.startswith("cycle/") or quantity.unit == "s"
            value = quantity.value * factor if per_unit else quantity.value / factor
            return Quantity(value, quantity.unit, source + quantity.source, "derived")

        def rate(rate: Rate) -> Rate:
            more = {
                name: slower(getattr(rate, name), self._factor(rate.op))
                for name in ("rate", "unfold", "ragged", "overhead")
                if getattr(rate, name) is not None
            }
            return dataclasses.replace(rate, **more)

        mean = self._factor("")
        memories = {
            name: dataclasses.replace(memory, bandwidth=slower(memory.bandwidth, mean))
            for name, memory in device.memories.items()
        }
        return dataclasses.replace(
            device,
            throughput=tuple(map(rate, device.throughput)),
            memories=memories,
            overhead=slower(device.overhead, mean),
            calibrated=self.measurements,
            call=None if device.call is None else slower(device.call, mean),
        )

    def _factor(self, op: str) -> float:
        if op in self.factors:
            return self.factors[op]
        return math.exp(np.mean(np.log(list(self.factors.values()))))


def seconds_by_class(cost: Cost) -> np.ndarray:
    """Latency by class of layers [len(OPS)], other kernels shared out among them."""
    totals = np.array([sum(x.latency_s for x in cost.layers if x.op == op) for op in OPS])
    known = totals.sum()
    return totals * (cost.latency_s / known) if known else totals


def class_factors(
    boards: Sequence[Sequence[Measured]],
    *,
    prior: Mapping[str, float] | None = None,
    ridge: float = 0.1,
) -> dict[str, float]:
    """How the classes of layers relate, from several boards; each board has a speed of its own.

    Minimizes sum_i (sum_c f_c t_ic / (k_b m_i) - 1)^2 + ridge sum_c (f_c / prior_c - 1)^2, with
    t_ic the estimated seconds of class c, m_i the measured ones and k_b the speed of the board
    (the geometric mean of its ratios); no factor is negative.

    Raises:
      ValueError: a measurement that is no positive number.

    >>> class_factors([])["conv"]
    1.0
    """
    from scipy.optimize import nnls  # here, since it takes long to import

    start = np.array([1.0 if prior is None else prior[op] for op in OPS])
    rows = [[(seconds_by_class(cost), _positive(s)) for cost, s in board] for board in boards]
    factors = start.copy()
    for _ in range(_STEPS):
        design, target = (
            [math.sqrt(ridge) * np.eye(len(OPS))],
            [math.sqrt(ridge) * np.ones(len(OPS))],
        )
        for board in rows:
            speed = _speed(board, factors)
            design += [(t * start / (m / speed))[None] for t, m in board]
            target += [np.ones(1) for _ in board]
        factors = start * nnls(np.concatenate(design), np.concatenate(target))[0]
        factors = np.maximum(factors, 1e-3 * start)
    return dict(zip(OPS, factors.tolist(), strict=True))


def _speed(board: Sequence[tuple[np.ndarray, float]], factors: np.ndarray) -> float:
    return math.exp(np.mean([math.log(m / float(t @ factors)) for t, m in board]))


def _positive(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"measured seconds must be above 0, got {seconds!r}")
    return float(seconds)


def calibrate(
    measured: Sequence[Measured],
    *,
    factors: Mapping[str, float] | None = None,
    ridge: float = 0.1,
) -> Calibration:
    """Calibrates a device by measurements of networks on it.

    One measurement sets the speed; several also how the classes of layers relate.

    Args:
      measured: estimates, all of one device, with the seconds measured there.
      factors: how the classes relate so far, see `class_factors`; None: as the device file says.
      ridge: how much weight that keeps: the squared ratio of the spread of measurements to the
        spread of the factors between boards.

    Raises:
      ValueError: no measurements, of several devices, or not positive.

    >>> import jax, jax.numpy as jnp
    >>> from jaxcompress.cost import estimate
    >>> w, x = (jax.ShapeDtypeStruct(s, jnp.int8) for s in ((64, 10), (1, 64)))
    >>> cost = estimate(lambda w, x: x @ w, w, x, device="stm32l4r5")
    >>> round(calibrate([(cost, 2 * cost.latency_s)]).latency_s(cost) / cost.latency_s, 6)
    2.0
    """
    names = {(cost.device.name, cost.device.runtime) for cost, _ in measured}
    if len(names) != 1:
        raise ValueError(f"measured: need estimates of one device, got {sorted(names) or 'none'}")
    if len(measured) > 1:
        factors = class_factors([measured], prior=factors, ridge=ridge)
    start = np.array([1.0 if factors is None else factors[op] for op in OPS])
    board = [(seconds_by_class(cost), _positive(s)) for cost, s in measured]
    speed = _speed(board, start)
    return Calibration(dict(zip(OPS, (speed * start).tolist(), strict=True)), len(measured))
