"""Elementwise primitives that ONNX has under another name, or as several operators."""

import numpy as np

from jaxcompress.export.onnx_format.onnx_elementwise import rule, together
from jaxcompress.export.onnx_format.onnx_lowering import Lowering
from jaxcompress.graph.equations import Equation


def number(low: Lowering, e: Equation, value: float) -> str:
    """A constant of no axes in the dtype of the result."""
    return low.graph.constant(np.asarray(value, low.avals[e.outputs[0]].dtype))


@rule("ne")
def _ne(low: Lowering, e: Equation) -> None:
    together(low, e, lambda names: low.emit("Not", [low.emit("Equal", names)]))


@rule("and", "or", "xor", "not")
def _logic(low: Lowering, e: Equation) -> None:
    op = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}[e.primitive]
    op = op if low.avals[e.outputs[0]].dtype == bool else f"Bitwise{op}"
    together(low, e, lambda names: low.emit(op, names))


@rule("is_finite")
def _is_finite(low: Lowering, e: Equation) -> None:
    def compute(names):
        odd = low.emit("Or", [low.emit("IsNaN", names), low.emit("IsInf", names)])
        return low.emit("Not", [odd])

    together(low, e, compute)


@rule("rem")
def _rem(low: Lowering, e: Equation) -> None:
    together(low, e, lambda names: low.emit("Mod", names, fmod=1))


@rule("rsqrt")
def _rsqrt(low: Lowering, e: Equation) -> None:
    together(low, e, lambda names: low.emit("Reciprocal", [low.emit("Sqrt", names)]))


@rule("square")
def _square(low: Lowering, e: Equation) -> None:
    together(low, e, lambda names: low.emit("Mul", [names[0], names[0]]))


@rule("integer_pow")
def _integer_pow(low: Lowering, e: Equation) -> None:
    power = e.eqn.params["y"]
    if power == 2:
        return _square(low, e)
    if power == -1:
        return together(low, e, lambda names: low.emit("Reciprocal", names))
    together(low, e, lambda names: low.emit("Pow", [names[0], number(low, e, power)]))


@rule("cbrt")
def _cbrt(low: Lowering, e: Equation) -> None:
    def compute(names):
        root = low.emit("Pow", [low.emit("Abs", names), number(low, e, 1 / 3)])
        return low.emit("Mul", [low.emit("Sign", names), root])

    together(low, e, compute)


@rule("round")
def _round(low: Lowering, e: Equation) -> None:
    if int(e.eqn.params["rounding_method"]) == 1:  # half to even
        return together(low, e, lambda names: low.emit("Round", names))

    def away(names):
        size = low.emit("Add", [low.emit("Abs", names), number(low, e, 0.5)])
        return low.emit("Mul", [low.emit("Sign", names), low.emit("Floor", [size])])

    together(low, e, away)


@rule("erfc")
def _erfc(low: Lowering, e: Equation) -> None:
    one = number(low, e, 1)
    together(low, e, lambda names: low.emit("Sub", [one, low.emit("Erf", names)]))


@rule("exp2")
def _exp2(low: Lowering, e: Equation) -> None:
    together(low, e, lambda names: low.emit("Pow", [number(low, e, 2), names[0]]))


@rule("log2")
def _log2(low: Lowering, e: Equation) -> None:
    def compute(names):
        return low.emit("Div", [low.emit("Log", names), number(low, e, np.log(2))])

    together(low, e, compute)


@rule("polynomial")
def _polynomial(low: Lowering, e: Equation) -> None:
    # a_0 + x (a_1 + x (a_2 + ...))
    def compute(names):
        x, *rest, sum_ = names
        for coefficient in reversed(rest):
            sum_ = low.emit("Add", [low.emit("Mul", [sum_, x]), coefficient])
        return sum_

    together(low, e, compute)


@rule("one_minus_square")
def _one_minus_square(low: Lowering, e: Equation) -> None:
    # (1 + x) (1 - x), which keeps digits where |x| is near 1.
    def compute(names):
        ends = [low.emit(op, [number(low, e, 1), *names]) for op in ("Add", "Sub")]
        return low.emit("Mul", ends)

    together(low, e, compute)


@rule("log1p")
def _log1p(low: Lowering, e: Equation) -> None:
    # log(u) x / (u - 1) with u = 1 + x: exact where 1 + x loses x's digits; x where u is 1.
    def compute(names):
        (x,), one = names, number(low, e, 1)
        u = low.emit("Add", [x, one])
        less = low.emit("Sub", [u, one])
        tiny = low.emit("Equal", [less, number(low, e, 0)])
        divisor = low.emit("Where", [tiny, one, less])
        endless = low.emit("IsInf", [u])
        found = low.emit("Mul", [low.emit("Log", [u]), low.emit("Div", [x, divisor])])
        return low.emit("Where", [tiny, x, low.emit("Where", [endless, u, found])])

    together(low, e, compute)


@rule("expm1")
def _expm1(low: Lowering, e: Equation) -> None:
    # exp(x) - 1 = 2 tanh(x / 2) / (1 - tanh(x / 2)) near zero, where the difference loses digits.
    def compute(names):
        (x,), one, two = names, number(low, e, 1), number(low, e, 2)
        far = low.emit("Sub", [low.emit("Exp", [x]), one])
        half = low.emit("Tanh", [low.emit("Div", [x, two])])
        near = low.emit("Div", [low.emit("Mul", [two, half]), low.emit("Sub", [one, half])])
        small = low.emit("Less", [low.emit("Abs", [x]), number(low, e, 0.5)])
        return low.emit("Where", [small, near, far])

    together(low, e, compute)
