"""How a scale per channel passes into a scan over stacked layers, and what loops do not pass on.

Rows of a scan are labelled trip by trip; what a loop carries or collects is left alone.
"""

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.flat_list import carried, rows
from jaxcompress.graph.scaling.labelled_operation import Step


def enter_loop(step: Step) -> None:
    """The mark in front of a loop's body."""
    count = len(step.op.operands)
    (_, by_row), (_, inside) = rows(step.op), carried(step.op)
    first = count - len(by_row)
    for port in range(count - len(inside), first):
        step.fix(port, "a loop carries it")
    for number in step.op.outputs:
        if number not in by_row:
            _fix(step, number, "a loop carries or collects it")
    for port, number in zip(range(first, count), by_row, strict=True):
        _pass_rows(step, port, number)


def _pass_rows(step: Step, port: int, number: int) -> None:
    # Labels at the port have the trips of the loops around and an axis of rows in front, those of
    # the row inside all trips.
    outer = step.flat.trips[step.op.region]
    trips = outer, step.flat.trips_of(number) // outer
    for sign in (1, -1):
        if (labels := step.see(port, sign)) is not None:
            shape = labels.shape[2:]
            if labels.shape[:2] != (1, 1):
                labels = np.broadcast_to(labels, (*trips, *shape))
            step.trial.assign(number, labels.reshape(-1, *shape), sign)
        if (labels := step.trial.see(number, sign)) is not None:
            lead = (1, 1) if len(labels) == 1 else trips
            step.put(port, labels.reshape(*lead, *labels.shape[1:]), sign)


def leave_loop(step: Step) -> None:
    """The mark behind a loop's body."""
    params = step.op.eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["body_jaxpr"]
    given = len(compat.body(body).jaxpr.outvars)
    for number in step.op.operands[len(step.op.operands) - given :]:
        _fix(step, number, "a loop carries or collects it")
    for number in step.op.outputs:
        _fix(step, number, "a loop carries it")


def _fix(step: Step, number: int | None, reason: str) -> None:
    for sign in (1, -1):
        if number is not None and (labels := step.trial.see(number, sign)) is not None:
            step.classes.fix(labels, reason)
