"""How a scale per channel passes through a program: a rule per primitive.

Every operation that touches a labelled value ties labels together (what it adds must be scaled
alike), passes them on, or fixes them (t_c = 1: what it does depends on the size of its operand).
"""

from collections.abc import Callable

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.affine_loops import enter_loop, leave_loop
from jaxcompress.graph.affine_products import convolution, product, product_of_arrays, quotient
from jaxcompress.graph.affine_views import VIEWS
from jaxcompress.graph.inline import END, LOOP
from jaxcompress.graph.ports import Step, link, same


def apply(step: Step) -> bool:
    """What an operation does with the labels at its ports; by default it fixes them.

    Returns:
      False if a choice must be made first, and `step.decide` does not allow it.
    """
    _RULES.get(step.op.primitive, Step.fix_all)(step)
    return not step.waits


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


def _sign(step: Step) -> None:
    step.fix(-1, "it is the result of 'sign'")


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


_RULES: dict[str, Callable[[Step], None]] = {
    **dict.fromkeys("add add_any sub max min clamp".split(), _alike),
    **dict.fromkeys("eq ne lt le gt ge".split(), _compare),
    **dict.fromkeys(
        "neg abs copy copy_p convert_element_type reduce_precision sharding_constraint name "
        "optimization_barrier".split(),
        _pairs,
    ),
    **dict.fromkeys("reduce_sum reduce_max reduce_min".split(), _reduce),
    **dict.fromkeys("reduce_window_sum reduce_window_max reduce_window_min".split(), _pool),
    **dict.fromkeys("cumsum cummax cummin".split(), _cumulative),
    "select_n": _select,
    "div": quotient,
    "sign": _sign,
    "mul": product,
    **dict.fromkeys(compat.PRODUCTS, product_of_arrays),
    compat.CONV: convolution,
    LOOP: enter_loop,
    END: leave_loop,
    **VIEWS,
}
