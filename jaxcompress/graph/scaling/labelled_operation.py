"""One operation that labelled values pass: the labels at its operands and results.

A scale may be found at a result first (the seed lies behind) or at an operand (before), and a rule
must work in both directions. So rules do not compute results from operands: they relate *ports*,
the operands 0, 1, ... and the results -1, -2, ..., and whatever is known at one of them is put to
the others. `link` is for maps that can be inverted (a transpose), `join` where some axes are those
of another port and the rest says nothing (a contraction), `same` for elementwise ones.

Every port has two sets of labels: what is multiplied by t, and what is divided by it. A quotient
turns one into the other, and a weight that takes the scale out of its input has the second.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress.graph.scaling.labels import Labels

Map = Callable[[Labels], Labels]


class Step:
    """One operation of a trial, and the labels at its ports.

    Ports are the operands 0, 1, ... and the results -1, -2, ...; signs are +1 for what is
    multiplied by t and -1 for what is divided by it.

    Args:
      trial: a `propagation.Trial`.
      at: the position of the operation in its list.
      decide: whether a choice may be made that further labels could make needless.
    """

    def __init__(self, trial: Any, at: int, *, decide: bool = False):
        self.trial, self.at, self.decide = trial, at, decide
        self.flat, self.op = trial.flat, trial.flat.ops[at]
        self.classes, self.params = trial.classes, self.op.eqn.params
        self.waits = False  # for a choice

    def number(self, port: int) -> int | None:
        """The value at a port; None for a literal."""
        return self.op.operands[port] if port >= 0 else self.op.outputs[-1 - port]

    def shape(self, port: int) -> tuple[int, ...]:
        """The shape of a port."""
        eqn = self.op.eqn
        variable = eqn.invars[port] if port >= 0 else eqn.outvars[-1 - port]
        return tuple(variable.aval.shape)

    def is_data(self, port: int) -> bool:
        """Whether inputs reach the value at a port."""
        return self.flat.is_data(self.number(port))

    def free(self, port: int) -> bool:
        """Whether an operand is known to be 0 or infinite everywhere."""
        return port >= 0 and self.flat.is_free(self.op, port)

    def see(self, port: int, sign: int = 1) -> Labels | None:
        """Labels at a port, in the trips of the operation; None if there are none."""
        number = self.number(port)
        labels = None if number is None else self.trial.see(number, sign)
        if labels is None or number is None:
            return None
        if self._is_split(number, port):
            return self.classes.fix(labels, _SPLIT)
        if labels.shape[0] == 1:
            return labels
        inner = self.flat.trips[self.op.region] // self.flat.trips_of(number)
        return np.repeat(labels, inner, axis=0)

    def put(self, port: int, labels: Labels | None, sign: int = 1) -> None:
        """The value at a port has these labels too."""
        if labels is None or self.free(port):
            return
        number, classes = self.number(port), self.classes
        if number is None:
            value = self.flat.literal(self.op, port)
            what = "a number" if value is None else value
            return classes.fix(labels, f"{self.op.primitive!r} combines it with {what}")
        if self._is_split(number, port):
            return classes.fix(labels, _SPLIT)
        if labels.shape[0] > 1:
            labels = labels.reshape(self.flat.trips_of(number), -1, *labels.shape[1:])
            labels = np.squeeze(classes.tie(labels, [1]), 1)
        self.trial.assign(number, labels, sign)

    def _is_split(self, number: int, port: int) -> bool:
        return self.flat.values[number].aval.shape != self.shape(port)

    def fix(self, port: int, reason: str) -> None:
        """What is at a port must not be scaled."""
        for sign in (1, -1):
            if (labels := self.see(port, sign)) is not None:
                self.classes.fix(labels, reason)

    def fix_all(self) -> None:
        """Neither operands nor results may be scaled."""
        name = self.op.primitive
        for port in range(len(self.op.operands)):
            self.fix(port, f"it enters {name!r}, which does not pass a scale on")
        for port in range(len(self.op.outputs)):
            self.fix(-1 - port, f"it comes from {name!r}, which does not pass a scale on")

    def choose(self, options: Sequence[str], sign: int = 1) -> str | None:
        """What the operation does with the labels of a sign; None if it has to wait for that."""
        mode = self.trial.mode((self.at, sign), options, self.decide)
        self.waits |= mode is None
        return mode


_SPLIT = "it is split over devices"


def link(step: Step, a: int, b: int, *, to: Map, back: Map) -> None:
    """The labels of two ports are those of the other one, mapped."""
    for sign in (1, -1):
        if (labels := step.see(a, sign)) is not None:
            step.put(b, to(labels), sign)
        if (labels := step.see(b, sign)) is not None:
            step.put(a, back(labels), sign)


def same(step: Step, a: int, b: int, *, opposite: bool = False) -> None:
    """Two ports are scaled alike, element by element; or inversely."""
    if step.free(a) or step.free(b):
        return
    for sign in (1, -1):
        other = -sign if opposite else sign
        step.put(b, _spread(step, step.see(a, sign), step.shape(b)), other)
        step.put(a, _spread(step, step.see(b, other), step.shape(a)), sign)


def _spread(step: Step, labels: Labels | None, shape: tuple[int, ...]) -> Labels | None:
    if labels is None:
        return None
    if labels.ndim == len(shape) + 1:  # sizes of 1 may stand for all
        return step.classes.tie(labels, [axis + 1 for axis, n in enumerate(shape) if n == 1])
    if labels.ndim == 1:
        return labels.reshape(-1, *(1 for _ in shape))
    return step.classes.tie(labels, range(1, labels.ndim)).reshape(-1)


def join(
    step: Step,
    a: int,
    axes: Sequence[int],
    b: int,
    at: Sequence[int],
    *,
    signs: tuple[int, int] = (1, 1),
) -> None:
    """The axes `axes` of port a are the axes `at` of port b; on others labels do not depend.

    Args:
      step: the operation.
      a, axes, b, at: two ports, and axes of each.
      signs: of the labels at a and at b.
    """
    move, sign, other = step.classes.move, *signs
    if (labels := step.see(a, sign)) is not None:
        step.put(b, move(labels, axes, at, len(step.shape(b))), other)
        step.put(a, move(labels, axes, axes, len(step.shape(a))), sign)
    if (labels := step.see(b, other)) is not None:
        step.put(a, move(labels, at, axes, len(step.shape(a))), sign)
        step.put(b, move(labels, at, at, len(step.shape(b))), other)
