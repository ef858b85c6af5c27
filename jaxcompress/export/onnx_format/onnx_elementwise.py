"""How elementwise primitives are lowered to ONNX operators."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.export.onnx_format.onnx_lowering import Lowering, Tensor, compressed, joined
from jaxcompress.graph.equations import Equation
from jaxcompress.graph.primitives.table import row

Rule = Callable[[Lowering, Equation], None]
RULES: dict[str, Rule] = {}
"""Primitive -> what lowers it."""
KINDS: dict[str, Rule] = {}
"""Kind of primitives -> what lowers all of them that have no rule of their own."""


def lowering(primitive: str) -> Rule | None:
    """What lowers a primitive, if anything does."""
    return RULES.get(primitive) or KINDS.get(row(primitive).kind)


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Puts a rule into the table."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


_ONE = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf",
    "sqrt": "Sqrt", "abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh",
}  # fmt: skip
_TWO = {
    "pow": "Pow", "eq": "Equal", "lt": "Less",
    "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip


def together(
    low: Lowering, e: Equation, compute: Callable[[list[str]], str], operands: Sequence[int] = ()
) -> None:
    """The result of an elementwise operation on the tensors of its operands."""
    operands = operands or e.operands
    order = low.common_order(operands)
    rank = len(order)
    tensors = [
        low.tensor(n, order=order if len(low.shape(n)) == rank else None, loose=True)
        for n in operands
    ]
    name = compute([t.name for t in tensors])
    low.put(e.outputs[0], name, order=order, shape=joined([t.shape for t in tensors]))


def _plain(op: str) -> Rule:
    return lambda low, e: together(low, e, lambda names: low.emit(op, names))


RULES.update({primitive: _plain(op) for primitive, op in (_ONE | _TWO).items()})


@rule("add", "add_any")
def _add(low: Lowering, e: Equation) -> None:
    for x, other in (e.operands, e.operands[::-1]):
        if (array := low.array(other)) is not None and _joins_as_bias(low, e, x, array):
            return
    together(low, e, lambda names: low.emit("Add", names))


@rule("sub")
def _sub(low: Lowering, e: Equation) -> None:
    array = low.array(e.operands[1])
    if array is None or not _joins_as_bias(low, e, e.operands[0], -array):
        together(low, e, lambda names: low.emit("Sub", names))


def _joins_as_bias(low: Lowering, e: Equation, x: int, array: np.ndarray) -> bool:
    # Whether the sum of x and a constant is an operator that has a bias.
    if x not in low.biased or low.uses[x] != 1:
        return False
    axis, with_bias = low.biased[x]
    bias = compressed(array)
    if any(n != 1 for a, n in enumerate(bias.shape) if a != axis):
        return False
    first = np.broadcast_to(bias.reshape(-1), (low.shape(x)[axis],))
    found = with_bias(first)
    if found is not None:
        low.put(e.outputs[0], found.name, order=found.order, shape=found.shape)
        low.biased[e.outputs[0]] = axis, lambda more: with_bias(first + more)
    return found is not None


@rule("max", "min")
def _extreme(low: Lowering, e: Equation) -> None:
    for x, other in (e.operands, e.operands[::-1]):
        array = low.array(other)
        if array is None or not _is_float(low, x) or compressed(array).size != 1:
            continue
        bound = float(compressed(array).reshape(()))
        low.clamped[e.outputs[0]] = (
            (x, bound, np.inf) if e.primitive == "max" else (x, -np.inf, bound)
        )
        if e.primitive == "max" and bound == 0:
            return together(low, e, lambda names: low.emit("Relu", names), [x])
    op = {"max": "Max", "min": "Min"}[e.primitive]
    together(low, e, lambda names: low.emit(op, names))


def _is_float(low: Lowering, number: int) -> bool:
    return jnp.issubdtype(low.avals[number].dtype, jnp.floating)


@rule("div")
def _div(low: Lowering, e: Equation) -> None:
    count = low.array(e.operands[1])
    if count is None or not _is_mean(low, e, e.operands[0], lambda n: count == n):
        together(low, e, lambda names: low.emit("Div", names))


@rule("mul")
def _mul(low: Lowering, e: Equation) -> None:
    # A sum times 1 / N, as integer programs have it: a mean too, up to how 1 / N is rounded.
    for x, other in (e.operands, e.operands[::-1]):
        factor = low.array(other)
        near = lambda n, f=factor: np.abs(np.asarray(f, np.float64) * n - 1) <= 2.0**-23
        if factor is not None and _is_mean(low, e, x, near):
            return
    together(low, e, lambda names: low.emit("Mul", names))


def _is_mean(low: Lowering, e: Equation, x: int, of: Callable[[int], Any]) -> bool:
    # Whether the result is the mean of which x is the sum: `of` says it of the count.
    if x not in low.sums or low.uses[x] != 1:
        return False
    count, emit = low.sums[x]
    if not np.all(of(count)):
        return False
    found: Tensor = emit()
    low.put(e.outputs[0], found.name, order=found.order, shape=found.shape)
    return True


@rule("clamp")
def _clamp(low: Lowering, e: Equation) -> None:
    lowest, x, highest = e.operands
    bounds = [low.array(n) for n in (lowest, highest)]
    if all(b is not None and b.size == 1 for b in bounds) and _is_float(low, x):
        ends = [low.graph.constant(b.reshape(())) for b in bounds if b is not None]
        low.clamped[e.outputs[0]] = x, *(float(b.reshape(())) for b in bounds if b is not None)
        return together(low, e, lambda names: low.emit("Clip", [*names, *ends]), [x])
    together(low, e, lambda n: low.emit("Min", [low.emit("Max", [n[1], n[0]]), n[2]]))


@rule("select_n")
def _select(low: Lowering, e: Equation) -> None:
    if low.avals[e.operands[0]].dtype != bool or len(e.operands) != 3:
        raise low.refuse(e, "only a choice of two by bools is lowered")
    bools = low.avals[e.outputs[0]].dtype == bool
    choose = _chosen_bool if bools else lambda low, c, no, yes: low.emit("Where", [c, yes, no])
    together(low, e, lambda names: choose(low, *names))


def _chosen_bool(low: Lowering, which: str, no: str, yes: str) -> str:
    # ONNX Runtime has no Where of bools.
    other = low.emit("And", [low.emit("Not", [which]), no])
    return low.emit("Or", [low.emit("And", [which, yes]), other])


@rule("convert_element_type")
def _convert(low: Lowering, e: Equation) -> None:
    before, after = (low.avals[n].dtype for n in (e.operands[0], e.outputs[0]))
    if before == after:
        return low.alias(e.outputs[0], e.operands[0])
    kind = onnx_kind(after)
    together(low, e, lambda names: low.emit("Cast", names, to=kind))


def onnx_kind(dtype: Any) -> int:
    """The number of a dtype in ONNX."""
    # From the schema: TensorProto.DataType.
    numbers = {
        "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7,
        "bool": 9, "float16": 10, "float64": 11, "uint32": 12, "uint64": 13, "bfloat16": 16,
    }  # fmt: skip
    if jnp.dtype(dtype).name not in numbers:
        raise ValueError(f"export.onnx: no tensor of {jnp.dtype(dtype).name} is written")
    return numbers[jnp.dtype(dtype).name]


@rule("reduce_precision")
def _reduce_precision(low: Lowering, e: Equation) -> None:
    p, dtype = e.eqn.params, low.avals[e.outputs[0]].dtype
    own, target = jnp.finfo(dtype), (p["exponent_bits"], p["mantissa_bits"])
    if target[0] >= own.nexp and target[1] >= own.nmant:
        return low.alias(e.outputs[0], e.operands[0])
    kind = {(8, 7): "bfloat16", (5, 10): "float16", (8, 23): "float32"}.get(target)
    if kind is None:
        raise low.refuse(e, "ONNX has no floats of these bits")
    there, back = onnx_kind(kind), onnx_kind(dtype)
    cast = lambda names: low.emit("Cast", [low.emit("Cast", names, to=there)], to=back)
    together(low, e, cast)
