"""How a scale per channel passes through a program: a rule per kind of primitive.

Every operation that touches a labelled value ties labels together (what it adds must be scaled
alike), passes them on, or fixes them (t_c = 1: what it does depends on the size of its operand).

Which of the three follows from the degree of homogeneity in the table of primitives. Of degree 1,
f(t x) = t f(x): the result has the labels of the operands, and several operands have the same ones,
because a maximum or a sum of values that are scaled differently is no scaled value. Of degree 0 the
result is not scaled. Without a degree (exp, tanh) only t = 1 is left, which is the default: what
has no rule fixes what it touches, and the function stays the same.
"""

from collections.abc import Callable

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.flat_list import END, LOOP
from jaxcompress.graph.primitives import row
from jaxcompress.graph.scaling.labelled_operation import Step, link, same
from jaxcompress.graph.scaling.scale_loops import enter_loop, leave_loop
from jaxcompress.graph.scaling.scale_moves import moving, taking
from jaxcompress.graph.scaling.scale_products import (
    convolution,
    product,
    product_of_arrays,
    quotient,
)


def apply(step: Step) -> bool:
    """What an operation does with the labels at its ports; by default it fixes them.

    Returns:
      False if a choice must be made first, and `step.decide` does not allow it.
    """
    _rule(step)(step)
    return not step.waits


def _rule(step: Step) -> Callable[[Step], None]:
    name = step.op.primitive
    if name in _NAMED:
        return _NAMED[name]
    meaning, ports = row(name), len(step.op.operands)
    if meaning.kind == "contract":
        return product_of_arrays
    if meaning.kind in ("identity", "move"):
        return _pairs if meaning.kind == "identity" else moving
    if meaning.kind == "index" and not meaning.update:
        return taking
    if meaning.kind == "compare":
        return _compare
    if meaning.kind == "elementwise" and meaning.degree == 1:
        return _pairs if ports == 1 else _alike
    if meaning.kind == "elementwise" and meaning.degree == 0 and ports == 1:
        return _scaleless
    if meaning.kind == "window" and (ports > 1 or "window_dimensions" not in step.params):
        return Step.fix_all
    return _ALONG.get(meaning.kind, Step.fix_all) if meaning.degree == 1 else Step.fix_all


def _alike(step: Step) -> None:
    # Sums and maxima: all operands are scaled as the result.
    for port in range(len(step.op.operands)):
        same(step, -1, port)


def _select(step: Step) -> None:
    for port in range(1, len(step.op.operands)):
        same(step, -1, port)


def _pairs(step: Step) -> None:
    for port in range(len(step.op.operands)):
        same(step, port, -1 - port)


def _compare(step: Step) -> None:
    same(step, 0, 1)


def _scaleless(step: Step) -> None:
    step.fix(-1, f"it is the result of {step.op.primitive!r}")


def _reduce(step: Step) -> None:
    axes = tuple(axis + 1 for axis in step.params["axes"])
    link(
        step,
        0,
        -1,
        to=lambda labels: np.squeeze(step.classes.tie(labels, axes), axes),
        back=lambda labels: np.expand_dims(labels, axes),
    )


def _pool(step: Step) -> None:
    window = step.params["window_dimensions"]
    shapes = zip(window, step.shape(0), step.shape(-1), strict=True)
    axes = [axis + 1 for axis, (size, n, m) in enumerate(shapes) if size > 1 or n != m]
    tied = lambda labels: step.classes.tie(labels, axes)
    link(step, 0, -1, to=tied, back=tied)


def _cumulative(step: Step) -> None:
    tied = lambda labels: step.classes.tie(labels, [step.params["axis"] + 1])
    link(step, 0, -1, to=tied, back=tied)


_ALONG: dict[str, Callable[[Step], None]] = {
    "reduce": _reduce,
    "window": _pool,
    "cumulative": _cumulative,
}
_NAMED: dict[str, Callable[[Step], None]] = {
    "select_n": _select,
    "mul": product,
    "div": quotient,
    compat.CONV: convolution,
    LOOP: enter_loop,
    END: leave_loop,
}
