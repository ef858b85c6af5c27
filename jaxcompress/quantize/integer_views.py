"""How primitives that only move or compare numbers are lowered: their results keep the grid."""

import math

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph import compat
from jaxcompress.quantize.integer_grids import grid_name
from jaxcompress.quantize.integer_lower import Draft, Lowerer, refusal, scalar
from jaxcompress.quantize.integer_rules import Rule, registers, window
from jaxcompress.quantize.integer_trace import Equation

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


@rule("reshape", "squeeze", "expand_dims")
def _reshape(low: Lowerer, e: Equation) -> None:
    before, after = low.shape(e.operands[0]), low.shape(e.outputs[0])
    if e.eqn.params.get("dimensions") is not None and e.primitive == "reshape":
        raise refusal(e, "it permutes dimensions")
    leads = before[:1] == after[:1] != ()
    low.move(e, "reshape", batched=leads, shape=(None, *after[1:]) if leads else after)


@rule("transpose")
def _transpose(low: Lowerer, e: Equation) -> None:
    order = tuple(e.eqn.params["permutation"])
    low.move(e, "transpose", batched=order[:1] == (0,), permutation=order)


@rule("rev")
def _rev(low: Lowerer, e: Equation) -> None:
    axes = tuple(e.eqn.params["dimensions"])
    low.move(e, "rev", batched=0 not in axes, axes=axes)


@rule("broadcast_in_dim")
def _broadcast(low: Lowerer, e: Equation) -> None:
    before, shape = low.shape(e.operands[0]), tuple(e.eqn.params["shape"])
    axes = tuple(e.eqn.params["broadcast_dimensions"])
    leads = axes[:1] == (0,) and before[:1] == shape[:1]
    sizes = (None, *shape[1:]) if leads else shape
    low.move(e, "broadcast", batched=leads, shape=sizes, axes=axes)


@rule("slice")
def _slice(low: Lowerer, e: Equation) -> None:
    p, shape = e.eqn.params, low.shape(e.operands[0])
    steps = p["strides"] or (1,) * len(shape)
    bounds = tuple(zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    whole = bounds[0] == (0, shape[0], 1)
    low.move(e, "slice", batched=whole, bounds=((0, None, 1), *bounds[1:]) if whole else bounds)


@rule("gather", "dynamic_slice")
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
    if found.size != taken.size or (found.reshape(out) != np.asarray(taken)).any():
        raise refusal(e, "what it takes is no slice")
    whole = bounds[0] == (0, shape[0], 1)
    kept = ((0, None, 1), *bounds[1:]) if whole else bounds
    draft = Draft("slice", (low.tensor(x),), (("bounds", kept),), e.scope)
    tensor = low.finish(draft)
    leads = whole and out[:1] == shape[:1]
    low.batched &= leads
    if found.shape != out:
        sizes = (None, *out[1:]) if leads else out
        tensor = low.finish(Draft("reshape", (tensor,), (("shape", sizes),), e.scope))
    low.tensors[e.outputs[0]] = tensor


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


@rule("split")
def _split(low: Lowerer, e: Equation) -> None:
    axis, start = e.eqn.params["axis"], 0
    source, rank = low.tensor(e.operands[0]), len(low.shape(e.operands[0]))
    low.batched &= axis != 0
    for number, size in zip(e.outputs, e.eqn.params["sizes"], strict=True):
        bounds = tuple((start, start + size, 1) if a == axis else (0, None, 1) for a in range(rank))
        draft = Draft("slice", (source,), (("bounds", bounds),), e.scope)
        low.tensors[number] = low.finish(draft)
        start += size


@rule("pad")
def _pad(low: Lowerer, e: Equation) -> None:
    config = tuple(map(tuple, e.eqn.params["padding_config"]))
    fill = low.known(e.operands[1])
    if fill is None or low.known(e.operands[0]) is not None:
        raise refusal(e, "it pads with an activation, or a constant around one")
    low.move(e, "pad", batched=config[:1] == ((0, 0, 0),), fill=float(fill), padding=config)


@rule("concatenate")
def _concatenate(low: Lowerer, e: Equation) -> None:
    axis, out = e.eqn.params["dimension"], e.outputs[0]
    low.batched &= axis != 0
    known = [low.known(number) for number in e.operands]
    if any(value is not None for value in known):
        return _joined_constants(low, e, axis)
    inputs = tuple(low.on_grid_of(number, out) for number in e.operands)
    low.tensors[out] = low.finish(Draft("concatenate", inputs, (("axis", axis),), e.scope))


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
    moved = e._replace(operands=(e.operands[data[0]],))
    low.move(moved, "pad", batched=axis != 0, fill=fill, padding=config)


@rule("convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "name")
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
