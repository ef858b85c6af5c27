"""How primitives that only move or compare numbers are lowered: their results keep the grid."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.primitives import Pad, Permute, Regroup, Spread, Take, moved, row
from jaxcompress.quantize.integer.lowering import Draft, Lowerer, Shape, refusal, scalar
from jaxcompress.quantize.integer.lowering_rules import Rule, registers, window
from jaxcompress.quantize.integer.traced_ranges import Equation
from jaxcompress.quantize.integer.trained_grids import grid_name

RULES: dict[str, Rule] = {}
rule = registers(RULES)


@rule("reduce_window_max")
def _window_max(low: Lowerer, e: Equation) -> None:
    config, batched = window(e)
    low.move(e, "window_max", batched=batched, **config)


@rule("reduce_max", "reduce_min")
def _reduce(low: Lowerer, e: Equation) -> None:
    axes = tuple(e.eqn.params["axes"])
    low.move(e, e.primitive, batched=0 not in axes, axes=axes)


def moving(low: Lowerer, e: Equation) -> None:
    """What only moves elements: a step of integers for each step."""
    for out, result in zip(e.outputs, moved(e.eqn) or [], strict=True):
        known = [low.known(number) is not None for number in e.operands]
        if result.axis is not None and any(known):
            _joined_constants(low, e, result.axis)
            continue
        tensors = []
        for k in result.operands:
            number, shape = e.operands[k], low.shape(e.operands[k])
            joined = result.axis is not None
            tensor = low.on_grid_of(number, out) if joined else low.tensor(number)
            for step in result.steps:
                if isinstance(step, Pad) and (known[0] or not known[1]):
                    raise refusal(e, "it pads with an activation, or a constant around one")
                tensor, shape = _stepped(low, e, tensor, shape, step)
            tensors.append(tensor)
        if result.axis is not None:
            low.batched &= result.axis != 0
            draft = Draft("join", tuple(tensors), (("axis", result.axis),), e.scope)
            tensors = [low.finish(draft)]
        (low.tensors[out],) = tensors


def _stepped(low: Lowerer, e: Equation, tensor: int, shape: Shape, step: Any) -> tuple[int, Shape]:
    # The tensor behind a step, and its shape. A first axis that stays is that of any batch.
    kind, after, fill = type(step).__name__.lower(), tuple(step.shape(shape)), None
    leads = shape[:1] == after[:1] != ()
    sizes = ("sizes", (None, *after[1:]) if leads else after)
    if isinstance(step, Permute):
        leads, config = step.order[:1] == (0,), (("order", step.order),)
    elif isinstance(step, Regroup):
        config = (sizes,)
    elif isinstance(step, Spread):
        leads &= step.axes[:1] == (0,)
        config = (sizes if leads else ("sizes", after), ("axes", step.axes))
    elif isinstance(step, Take):
        leads = step.whole(shape)[:1] == (True,)
        bounds = [(None, None, -1) if n < 0 else (a, b, n) for a, b, n in step.bounds]
        config = (("bounds", tuple([(0, None, 1), *bounds[1:]] if leads else bounds)),)
    else:
        leads, config = step.config[:1] == ((0, 0, 0),), (("config", step.config),)
        fill = float(np.asarray(low.known(e.operands[1])))
    low.batched &= leads
    return low.finish(Draft(kind, (tensor,), config, e.scope, fill=fill)), after


def _indexed(low: Lowerer, e: Equation) -> None:
    # At known positions, which must be those of a slice: x[:, ::2] is a gather in JAX 0.8.
    x, *positions = e.operands
    shape, out = low.shape(x), low.shape(e.outputs[0])
    if low.known(x) is not None or any(low.known(n) is None for n in positions):
        raise refusal(e, "its positions depend on the input")
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    operands = [jnp.asarray(value) for value in (numbers, *map(low.known, positions))]
    (taken,) = compat.evaluate(e.eqn, operands)
    bounds = _bounds(np.asarray(taken), shape)
    found = numbers[tuple(slice(*bound) for bound in bounds)]
    tensor = low.tensor(x)
    if found.size == taken.size and (found.reshape(out) == np.asarray(taken)).all():
        tensor, at = _stepped(low, e, tensor, shape, Take(bounds))
        if at != out:
            tensor, _ = _stepped(low, e, tensor, at, Regroup(out))
    else:
        tensor = _picked(low, e, tensor, np.asarray(taken))
    low.tensors[e.outputs[0]] = tensor


def _picked(low: Lowerer, e: Equation, tensor: int, taken: np.ndarray) -> int:
    # The same elements of every example.
    shape, out = low.shape(e.operands[0]), low.shape(e.outputs[0])
    rows = shape[0] if shape else 0
    each = taken.reshape(rows, -1) if rows and out[:1] == shape[:1] else taken[:0]
    size = math.prod(shape[1:])
    index = each - size * np.arange(len(each))[:, None] if len(each) else each
    if not index.size or (index != index[:1]).any() or ((index < 0) | (index >= size)).any():
        raise refusal(e, "what it takes is not the same of every example")
    config = (("index", tuple(index[0].tolist())), ("sizes", (None, *out[1:])))
    return low.finish(Draft("pick", (tensor,), config, e.scope))


def _bounds(taken: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    # Start, end and step along each axis, if the elements are those of a slice.
    bounds = []
    inside = np.clip(taken, 0, math.prod(shape) - 1)
    for along in np.unravel_index(inside, shape):
        places = np.unique(along)
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        end = int(places[-1]) + 1
        bounds.append((int(places[0]), end, step))
    return tuple(bounds)


def _joined_constants(low: Lowerer, e: Equation, axis: int) -> None:
    # One activation between constants: padding.
    data = [i for i, number in enumerate(e.operands) if low.known(number) is None]
    rest = [n for n in e.operands if low.known(n) is not None]
    fills = {scalar(jnp.asarray(low.known(n))) for n in rest}
    if len(data) != 1 or len(fills) != 1 or None in fills:
        raise refusal(e, "it joins activations with constants that are not one number")
    sizes = [low.shape(n)[axis] for n in e.operands]
    ends = (sum(sizes[: data[0]]), sum(sizes[data[0] + 1 :]), 0)
    rank = len(low.shape(e.outputs[0]))
    config = tuple(ends if a == axis else (0, 0, 0) for a in range(rank))
    (fill,) = fills
    if axis == 0:
        low.batched = False
    tensor = low.tensor(e.operands[data[0]])
    draft = Draft("pad", (tensor,), (("config", config),), e.scope, fill=fill)
    low.tensors[e.outputs[0]] = low.finish(draft)


@rule("convert_element_type", "reduce_precision", "name")
def _same(low: Lowerer, e: Equation) -> None:
    if not jnp.issubdtype(e.eqn.outvars[0].aval.dtype, jnp.floating):
        raise refusal(e, "it turns an activation into integers")
    x, out = e.operands[0], e.outputs[0]
    if x in low.pending:
        draft = low.pending.pop(x)
        return low.settle(draft, out)
    if grid_name(e) is not None:
        return low.place(e)
    low.tensors[out] = low.tensors[x]


def rule_of(name: str) -> Rule | None:
    """How a primitive that moves or compares is lowered; None of others."""
    meaning = row(name)
    if meaning.kind == "index" and not meaning.update:
        return _indexed
    return RULES.get(name) or (moving if meaning.kind == "move" else None)
