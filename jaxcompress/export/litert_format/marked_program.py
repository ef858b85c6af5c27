"""An integer program as a float function with its grids marked: what exporters of runtimes read."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.packed import Grid
from jaxcompress.export.litert_format.runtimes import Runtime, why_not_four_bits
from jaxcompress.export.marks import mark, mark_grid
from jaxcompress.formats.integers import Integer
from jaxcompress.quantize.integer.constants import ADD_HEADROOM, MOVES, Node
from jaxcompress.quantize.integer.integer_program import IntegerProgram
from jaxcompress.quantize.integer.integer_steps import convolved, moved, over_windows


def marked_program(
    program: IntegerProgram,
    *,
    runtime: Runtime = "litert",
    widened: dict[str, str] | None = None,
) -> Callable[[Array], Array]:
    """x float32 [B, ...] -> the numbers of the result: the same network, grids and weights.

    Every tensor of the program is on its own grid, marked; weights are marked with their scales;
    biases are the float numbers of their int32 codes, S_x S_w q. A runtime that fuses marks has the
    program's integers, up to how it rounds an accumulator to the next grid.

    Args:
      program: weights whose codes have 4 bits are marked so.
      runtime: weights that it computes in 8 bits only are marked with 8.
      widened: gets these layers, and why, when the returned function is traced.
    """
    return lambda x: _run(program, x, runtime, {} if widened is None else widened)


class _Stored(NamedTuple):
    # How a file has the weights of a step.
    scale: np.ndarray  # float64, of size 1 off the output channels
    bits: int
    one: bool  # the scales are equal, and written as one


def _run(program: IntegerProgram, x: Array, runtime: Runtime, widened: dict[str, str]) -> Array:
    tensors = [mark_grid(x, program.grids[0], where="the input")]
    rows = zip(program.nodes, program.constants, program.weight_scales, strict=True)
    for number, (node, constants, scale) in enumerate(rows, 1):
        c = {key: np.asarray(value) for key, value in constants.items()}
        inputs = [tensors[k] for k in node.inputs]
        scales = [_place(program.grids[k])[0] for k in node.inputs]
        grid = program.grids[number]
        stored = _Stored(np.asarray(scale, np.float64), 8, False)
        if "weight" in c:
            stored, why = _stored(node, c["weight"], stored.scale, runtime)
            if why:
                widened[f"step {number}, {node.kind} at {node.scope!r}"] = why
        with jax.named_scope(node.scope):
            if node.kind in MOVES:
                size, zero = _place(grid)
                y = moved(node, inputs, (float(c["fill"]) - zero) * size if "fill" in c else None)
            else:
                y = _computed(node, c, stored, inputs, scales, grid)
            y = _clamped(y, c, grid)
            tensors.append(mark_grid(y, grid, where=f"{node.kind} at {node.scope!r}"))
    return tensors[program.output]


def _place(grid: Grid) -> tuple[float, int]:
    # Scale and zero point of a grid.
    assert isinstance(grid.format, Integer)
    zero = 0 if grid.format.symmetric else int(np.asarray(grid.qparams.zero_point).reshape(()))
    return float(np.asarray(grid.qparams.scale).reshape(())), zero


def _computed(
    node: Node,
    c: dict[str, np.ndarray],
    stored: _Stored,
    inputs: Sequence[Array],
    scales: Sequence[float],
    grid: Grid,
) -> Array:
    # What one step of the accumulator is worth, from M = S_acc / S_y in fixed point.
    shift = c["shift"].astype(np.float64) - 31
    step = c["multiplier"] * 2.0**shift * _place(grid)[0]
    if node.kind in ("conv", "dot"):
        y = _contraction(node, c["weight"], stored, inputs[0])
        unit = scales[0] * _along_result(node, stored.scale, y.ndim)
    else:
        y, unit = _core(node, c, inputs, scales)
    factor = step / unit
    # Multipliers have 31 bits: a factor that is 1 but for them is left out.
    if not np.allclose(factor, 1.0, rtol=1e-6, atol=0):
        y = y * _like(factor, y)
    bias = c["bias"] * step
    return y + _like(bias, y) if bias.any() else y


def _like(numbers: np.ndarray, y: Array) -> Array:
    # float32, of the rank of y where it has several numbers.
    if numbers.size == 1:
        return jnp.float32(numbers.reshape(()))
    return jnp.asarray(numbers.reshape((1,) * (y.ndim - numbers.ndim) + numbers.shape), jnp.float32)


def _clamped(y: Array, c: dict[str, np.ndarray], grid: Grid) -> Array:
    # Bounds that are those of the grid are the mark's own.
    assert isinstance(grid.format, Integer)
    size, zero = _place(grid)
    lowest, highest = grid.format.bounds
    if c["low"] > lowest:
        y = jnp.maximum(y, jnp.float32((float(c["low"]) - zero) * size))
    if c["high"] < highest:
        y = jnp.minimum(y, jnp.float32((float(c["high"]) - zero) * size))
    return y


def _stored(
    node: Node, codes: np.ndarray, scale: np.ndarray, runtime: Runtime
) -> tuple[_Stored, str]:
    # How the codes are stored, and why in more bits than they need.
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if low < -8 or high > 7:
        return _Stored(scale, 8, False), ""
    why, scales = "", len(np.unique(scale))
    if low == -8:
        why = "int8: int4 weights of integer programs are stored without the code -8"
    elif node.kind == "dot":
        why = why_not_four_bits(runtime, scales=scales, lowest=low)
    # TFLite-Micro knows one scale by the count; LiteRT's fast kernels have one per output.
    one = runtime == "micro" and node.kind == "dot" and scales == 1
    return _Stored(scale, 8 if why else 4, one), why


def _contraction(node: Node, codes: np.ndarray, stored: _Stored, x: Array) -> Array:
    scale = stored.scale
    sizes = [axis for axis, n in enumerate(scale.shape) if n > 1]
    if len(sizes) > 1:
        raise ValueError(
            f"{node.kind} at {node.scope!r}: its scales lie along the axes {sizes} of the weight; "
            "runtimes have one per tensor or per index of one axis"
        )
    numbers = scale.reshape(-1)
    if stored.one:
        sizes, numbers = [], numbers[:1]
    weight = mark(
        jnp.asarray(codes * scale, jnp.float32), scale=numbers, zero_point=0,
        bits=stored.bits, narrow=True, axis=sizes[0] if sizes else None,
    )  # fmt: skip
    if node.kind == "dot":
        return _product(x, weight, node.get("dimension_numbers"), node.get("side"))
    return convolved(node, x, weight)


def _product(x: Array, weight: Array, numbers: Any, side: int) -> Array:
    # Runtimes have the weight on the right.
    if side == 1:
        return lax.dot_general(x, weight, numbers)
    terms, batch = numbers
    y = lax.dot_general(x, weight, (terms[::-1], batch[::-1]))
    lead, free = len(batch[0]), weight.ndim - len(terms[0]) - len(batch[0])
    return jnp.moveaxis(y, range(y.ndim - free, y.ndim), range(lead, lead + free))


def _along_result(node: Node, scale: np.ndarray, rank: int) -> np.ndarray:
    # The scales of a weight along the result's channels.
    if scale.size == 1:
        return scale.reshape(())
    (axis,) = (a for a, n in enumerate(scale.shape) if n > 1)
    shape = [1] * rank
    shape[_result_axis(node, axis, scale.ndim)] = scale.size
    return scale.reshape(shape)


def _result_axis(node: Node, axis: int, weight_rank: int) -> int:
    if node.kind == "conv":
        return node.get("out_spec")[1]
    contracted, batch = node.get("dimension_numbers")
    side = node.get("side")
    if axis in batch[side]:
        return batch[side].index(axis)
    free = [a for a in range(weight_rank) if a not in (*contracted[side], *batch[side])]
    other = node.get("rank") - len(batch[side]) - len(free)
    return len(batch[side]) + (other if side == 1 else 0) + free.index(axis)


def _core(
    node: Node, c: dict[str, np.ndarray], inputs: Sequence[Array], scales: Sequence[float]
) -> tuple[Array, Any]:
    # A step without weights, and what one step of its accumulator is worth.
    if node.kind == "add":
        left, right = inputs
        y = left - right if c["multipliers"][1] < 0 else left + right
        return y, 2 * max(scales) / 2.0**ADD_HEADROOM
    if node.kind == "mul":
        y = inputs[0] * inputs[1]
    elif node.kind == "sum":
        y = jnp.sum(inputs[0], axis=node.get("axes"))
    elif node.kind == "window_sum":
        y = over_windows(node, inputs[0], jnp.float32(0), lax.add)
    else:
        y = inputs[0]
    return y, float(np.prod(scales)) / 2.0 ** node.get("headroom")
