"""How each primitive is lowered to steps of integers."""

import math
from collections.abc import Callable

import numpy as np

from jaxcompress.quantize.integer.lowering import Draft, Lowerer, refusal, scalar
from jaxcompress.quantize.integer.traced_ranges import Equation

Rule = Callable[[Lowerer, Equation], None]
RULES: dict[str, Rule] = {}
"""Primitive -> what lowers it."""


def registers(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """`@rule("add", "sub")` for a table."""

    def rule(*primitives: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            rules.update(dict.fromkeys(primitives, function))
            return function

        return register

    return rule


rule = registers(RULES)


def _data_first(low: Lowerer, e: Equation) -> tuple[int, np.ndarray | None, bool]:
    # The first activation, the known other operand (None if it is one as well), whether swapped.
    a, b = e.operands
    if low.known(a) is not None:
        return b, np.asarray(low.known(a), np.float64), True
    known = low.known(b)
    return a, None if known is None else np.asarray(known, np.float64), False


def _pair(low: Lowerer, e: Equation, kind: str, **config) -> None:
    inputs = tuple(low.tensor(number) for number in e.operands)
    low.settle(Draft(kind, inputs, tuple(config.items()), e.scope), e.outputs[0])


@rule("add", "add_any")
def _add(low: Lowerer, e: Equation) -> None:
    x, known, _ = _data_first(low, e)
    if known is None:
        return _pair(low, e, "add", sign=1)
    low.affine(e, x, offset=known)


@rule("sub")
def _sub(low: Lowerer, e: Equation) -> None:
    x, known, swapped = _data_first(low, e)
    if known is None:
        return _pair(low, e, "add", sign=-1)
    if swapped:
        return low.affine(e, x, factor=-1.0, offset=known)
    low.affine(e, x, offset=-known)


@rule("mul")
def _mul(low: Lowerer, e: Equation) -> None:
    x, known, _ = _data_first(low, e)
    if known is None:
        return _pair(low, e, "mul")
    low.affine(e, x, factor=known)


@rule("div")
def _div(low: Lowerer, e: Equation) -> None:
    x, known, swapped = _data_first(low, e)
    if known is None or swapped:
        raise refusal(e, "it divides by an activation")
    if not known.all():
        raise refusal(e, "it divides by zero")
    low.affine(e, x, factor=1.0 / known)


@rule("neg")
def _neg(low: Lowerer, e: Equation) -> None:
    low.affine(e, e.operands[0], factor=-1.0)


def _bound(low: Lowerer, e: Equation, number: int) -> float:
    known = low.known(number)
    value = None if known is None else scalar(known)
    if value is None or math.isnan(value):
        raise refusal(e, "its bounds must be single numbers")
    return value


@rule("max", "min")
def _extreme(low: Lowerer, e: Equation) -> None:
    x, known, swapped = _data_first(low, e)
    if known is None:
        raise refusal(e, "both operands are activations")
    bound = _bound(low, e, e.operands[0 if swapped else 1])
    is_max = e.primitive == "max"
    low.clamp(e, x, bound if is_max else -np.inf, np.inf if is_max else bound)


@rule("clamp")
def _clamp(low: Lowerer, e: Equation) -> None:
    smallest, x, largest = e.operands
    if low.known(x) is not None:
        raise refusal(e, "its bounds are activations")
    low.clamp(e, x, _bound(low, e, smallest), _bound(low, e, largest))


@rule("conv_general_dilated")
def _conv(low: Lowerer, e: Equation) -> None:
    x, w = e.operands
    kernel, p = low.known(w), e.eqn.params
    if kernel is None or low.known(x) is not None:
        raise refusal(e, "its kernel must be made of parameters, its left operand of the input")
    if p["batch_group_count"] != 1:
        raise refusal(e, "it has batch groups")
    numbers = p["dimension_numbers"]
    out, into, *space = numbers.rhs_spec
    config = {
        "lhs_spec": tuple(numbers.lhs_spec),
        "out_spec": tuple(numbers.out_spec),
        "strides": tuple(p["window_strides"]),
        "padding": tuple(map(tuple, p["padding"])),
        "lhs_dilation": tuple(p["lhs_dilation"]),
        "rhs_dilation": tuple(p["rhs_dilation"]),
        "groups": p["feature_group_count"],
    }
    kernel = np.asarray(kernel, np.float64).transpose(*space, into, out)
    draft = Draft("conv", (low.tensor(x),), tuple(config.items()), e.scope, weight=kernel)
    steps = low.steps(w)
    draft.steps = None if steps is None else steps.transpose(*space, into, out)
    draft.channels = ((kernel.ndim - 1, numbers.out_spec[1]),)
    batched = numbers.lhs_spec[0] == numbers.out_spec[0] == 0
    low.settle(draft, e.outputs[0], batched=batched)


@rule("dot_general")
def _dot(low: Lowerer, e: Equation) -> None:
    sides = [number for number in (0, 1) if low.known(e.operands[number]) is not None]
    if len(sides) != 1:
        raise refusal(e, "both operands are activations")
    (side,) = sides
    contracted, batch = e.eqn.params["dimension_numbers"]
    weight = np.asarray(low.known(e.operands[side]), np.float64)
    ranks = [len(low.shape(number)) for number in e.operands]
    free = [
        [axis for axis in range(ranks[i]) if axis not in (*contracted[i], *batch[i])]
        for i in (0, 1)
    ]
    first = len(batch[0]) + (len(free[0]) if side else 0)
    channels = list(zip(batch[side], range(len(batch[side])), strict=True))
    channels += [(axis, first + i) for i, axis in enumerate(free[side])]
    numbers = (tuple(map(tuple, contracted)), tuple(map(tuple, batch)))
    rank = len(low.shape(e.outputs[0]))
    config = (("dimension_numbers", numbers), ("side", side), ("rank", rank))
    draft = Draft("dot", (low.tensor(e.operands[1 - side]),), config, e.scope, weight=weight)
    draft.channels, draft.steps = tuple(channels), low.steps(e.operands[side])
    leads = side == 1 and not batch[0] and free[0][:1] == [0]
    low.settle(draft, e.outputs[0], batched=leads)


@rule("reduce_sum")
def _sum(low: Lowerer, e: Equation) -> None:
    axes = tuple(e.eqn.params["axes"])
    x = e.operands[0]
    count = math.prod(low.shape(x)[axis] for axis in axes)
    config = (("axes", axes), ("count", count))
    draft = Draft("sum", (low.tensor(x),), config, e.scope)
    low.settle(draft, e.outputs[0], batched=0 not in axes)


_WINDOW = (
    "window_dimensions",
    "window_strides",
    "padding",
    "base_dilation",
    "window_dilation",
)


def window(e: Equation) -> tuple[dict, bool]:
    """The settings of a `reduce_window`, and whether it leaves the first axis alone."""
    config = {key: tuple(e.eqn.params[key]) for key in _WINDOW}
    config["padding"] = tuple(map(tuple, config["padding"]))
    alone = all(config[key][0] == 1 for key in _WINDOW if key != "padding")
    return config, alone and config["padding"][0] == (0, 0)


@rule("reduce_window_sum")
def _window_sum(low: Lowerer, e: Equation) -> None:
    config, batched = window(e)
    config["count"] = math.prod(config["window_dimensions"])
    source = low.tensor(e.operands[0])
    draft = Draft("window_sum", (source,), tuple(config.items()), e.scope)
    low.settle(draft, e.outputs[0], batched=batched)
