"""How a scale per channel passes through products: of elements, of arrays, of convolutions.

A product of two factors is scaled if one of them is. Which one carries the scale may be a choice;
a weight takes the scale of its input out and gives its outputs one of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.primitives.contractions import numbers_of
from jaxcompress.graph.scaling.labelled_operation import Step, join, same
from jaxcompress.graph.scaling.labels import Labels, depends

_FACTOR = "it is a factor of a scaled value"


def product(step: Step) -> None:
    """Two arrays element by element."""
    flat, (a, b) = step.flat, step.op.operands
    if a is not None and a == b:
        return step.fix_all()
    fixed = [not (flat.is_data(n) or flat.is_made_of_params(n)) for n in (a, b)]
    if any(fixed):
        return same(step, int(fixed[0]), -1)
    seen = {port: any(step.see(port, s) is not None for s in (1, -1)) for port in (0, 1, -1)}
    if not any(seen.values()):
        return
    mode = step.choose(_product_options(step, seen))
    if mode == "fold":
        step.fix(-1, "it is multiplied out of one product and into another")
    elif mode == "cancel":
        same(step, 0, 1, opposite=True)
        step.fix(-1, "it is divided out of one product and multiplied into another")
    elif mode is not None:
        carrier = int(mode)
        same(step, carrier, -1)
        step.fix(1 - carrier, _FACTOR)


def _product_options(step: Step, seen: dict[int, bool]) -> list[str]:
    data = [step.is_data(port) for port in (0, 1)]
    if seen[-1]:
        options = ["0", "1"] if data[0] or not data[1] else ["1", "0"]
        return options[:1] if seen[int(options[0])] else options
    carrier = 0 if seen[0] else 1
    if all(data):
        return [str(carrier)]
    if step.trial.fold and not all(data) and data[carrier]:
        return ["fold"]  # the factor goes into what made the activations
    return [str(carrier), "cancel"]


def quotient(step: Step) -> None:
    """An array over another, element by element."""
    x, divisor = step.op.operands
    flat, known = step.flat, divisor is not None and step.flat.is_computed(divisor)
    if step.trial.fold and known and flat.is_data(x) and step.see(0) is not None:
        step.choose(["fold"])
        step.fix(-1, "it is multiplied out of one product and into another")
    else:
        same(step, 0, -1)
        step.fix(1, "it is a divisor")


class Roles(NamedTuple):
    """Axes of a product of arrays; those of its operands are pairs."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    out_batch: tuple[int, ...]
    out_free: tuple[tuple[int, ...], tuple[int, ...]]


def _roles(eqn: Any) -> Roles:
    # The experts of a ragged product have one scale: rows of all of them lie side by side.
    found = numbers_of(eqn)
    contracted, batch, (left, right) = found.contracted, found.batch, found.free
    n, m = len(batch[0]), len(batch[0]) + len(left)
    out_free = tuple(range(n, m)), tuple(range(m, m + len(right)))
    return Roles(contracted, batch, (left, right), tuple(range(n)), out_free)


def input_axes(eqn: Any, x: int) -> set[int]:
    """Axes of operand x of a contraction for which a weight may have an index.

    Those that are summed over, and batch axes.
    """
    if eqn.primitive.name == compat.CONV:
        return {eqn.params["dimension_numbers"].lhs_spec[1]}
    roles = _roles(eqn)
    return {*roles.contracted[x], *roles.batch[x]}


def output_axes(eqn: Any, w: int) -> set[int]:
    """Axes of the result of a contraction for which its weight, operand w, has an index."""
    if eqn.primitive.name == compat.CONV:
        return {eqn.params["dimension_numbers"].out_spec[1]}
    roles = _roles(eqn)
    return {*roles.out_batch, *roles.out_free[w]}


def product_of_arrays(step: Step) -> None:
    """A product; of activations and a weight, or of two arrays of which one has the scale."""
    same_twice = step.op.operands[0] == step.op.operands[1]
    if same_twice or numbers_of(step.op.eqn).parts == "summed":
        return step.fix_all()
    if step.op.primitive == compat.RAGGED:
        step.fix(2, "it says how many rows an expert has")
    roles = _roles(step.op.eqn)
    data = [step.is_data(port) for port in (0, 1)]
    for sign in (1, -1):
        if not _concerned(step, data, sign):
            continue
        mode = step.choose(_array_options(step, roles, data, sign), sign)
        if mode == "weight":
            _weighted(step, roles, data.index(True))
        elif mode is not None:
            _carried(step, roles, int(mode), sign)


def _concerned(step: Step, data: list[bool], sign: int) -> bool:
    if any(step.see(port, sign) is not None for port in (0, 1, -1)):
        return True
    # Where a weight is divided nothing else is, but its input is scaled.
    return sign == 1 and sum(data) == 1 and step.see(1 - data.index(True), -1) is not None


def _array_options(step: Step, roles: Roles, data: list[bool], sign: int) -> list[str]:
    out = step.see(-1, sign)
    along = [depends(out, roles.out_free[k]) for k in (0, 1)]
    if sum(data) == 1:
        x = data.index(True)
        seen = step.see(x, sign)
        mixes = depends(seen, roles.free[x]) and not depends(seen, roles.contracted[x])
        return [str(x)] if mixes or (along[x] and not along[1 - x]) else ["weight"]
    for k in (0, 1):
        if step.see(k, sign) is not None:
            return [str(k)]
    return ["1", "0"] if along[0] == along[1] else [str(int(along[1]))]


def _weighted(step: Step, roles: Roles, x: int) -> None:
    w = 1 - x
    into, gives = (*roles.batch[w], *roles.contracted[w]), (*roles.batch[w], *roles.free[w])
    join(step, x, (*roles.batch[x], *roles.contracted[x]), w, into, signs=(1, -1))
    join(step, w, gives, -1, (*roles.out_batch, *roles.out_free[w]))


def _carried(step: Step, roles: Roles, x: int, sign: int) -> None:
    axes = (*roles.batch[x], *roles.free[x])
    join(step, x, axes, -1, (*roles.out_batch, *roles.out_free[x]), signs=(sign, sign))
    if step.is_data(0) or step.is_data(1):
        step.fix(1 - x, _FACTOR)
    elif (labels := step.see(1 - x, sign)) is not None:
        step.classes.fix(labels, _FACTOR)


def convolution(step: Step) -> None:
    """A convolution of activations with a weight."""
    p, kernel = step.params, step.shape(1)
    if not step.is_data(0) or step.is_data(1) or p["batch_group_count"] > 1:
        return step.fix_all()
    numbers, move = p["dimension_numbers"], step.classes.move
    axes, channel = numbers.rhs_spec[:2], (numbers.lhs_spec[1],)
    join(step, 1, axes[:1], -1, (numbers.out_spec[1],))
    if (labels := step.see(0)) is not None:
        labels = move(labels, channel, channel, len(step.shape(0)))
        step.put(0, labels)
        matrix = _of_weights(step, labels.reshape(len(labels), -1))
        step.put(1, move(matrix, (0, 1), axes, len(kernel)), -1)
    if (labels := step.see(1, -1)) is not None:
        inputs = _of_inputs(step, move(labels, axes, (0, 1), 2))
        step.put(0, move(inputs, (0,), channel, len(step.shape(0))))


def _of_weights(step: Step, labels: Labels) -> Labels:
    # Labels [T, C] of the inputs as those of the kernel, [T, outputs, inputs of a group].
    if labels.shape[1] == 1:
        return labels[:, None]
    groups = step.params["feature_group_count"]
    outputs, inputs = _matrix(step)
    grouped = labels.reshape(len(labels), groups, 1, inputs)
    full = np.broadcast_to(grouped, (len(labels), groups, outputs // groups, inputs))
    return full.reshape(len(labels), outputs, inputs)


def _of_inputs(step: Step, labels: Labels) -> Labels:
    # And back: the outputs of a group share its inputs.
    groups = step.params["feature_group_count"]
    outputs, inputs = _matrix(step)
    full = np.broadcast_to(labels, (len(labels), outputs, inputs))
    full = full.reshape(len(labels), groups, outputs // groups, inputs)
    return step.classes.tie(full, [2]).reshape(len(labels), -1)


def _matrix(step: Step) -> tuple[int, int]:
    outputs, inputs = (
        step.shape(1)[axis] for axis in step.params["dimension_numbers"].rhs_spec[:2]
    )
    return outputs, inputs
