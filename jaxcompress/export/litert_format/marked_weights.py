"""A function evaluated again with its packed weights marked where they meet activations.

Runtimes know a dense layer as rows [..., K] times a matrix [K, N] with one scale per column, so
that is how contractions with weights are written here: weights on the right, contracted axes last
and joined, free ones joined. The steps of a weight follow it through views to where it is used:
kernels of several axes, transposed ones and layers stacked for a scan keep their grids. Loops are
unrolled, calls inlined.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from jaxcompress.core.packed import QTensor, is_packed, unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.pytrees import stored_bits as stored_width
from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.export.litert_format.rewritten_convolutions import (
    convolved,
    in_two_dimensions,
    padded,
    simpler,
)
from jaxcompress.export.litert_format.runtimes import Runtime, why_not_four_bits
from jaxcompress.export.marks import FAKE_QUANT, mark, mark_dynamic, stored_bits
from jaxcompress.graph import compat
from jaxcompress.graph.evaluate import Evaluator
from jaxcompress.graph.interpret import CALLS
from jaxcompress.graph.primitives import move, row, taken


class _Steps(ValueError):
    """Steps of a weight that a runtime does not have."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.names = name.split(" and ")


class Weight(NamedTuple):
    """A constant on a grid: its numbers, and the step of each of them."""

    name: str
    array: np.ndarray
    step: np.ndarray  # of the array's shape
    bits: int
    narrow: bool


def marked_weights(
    apply_fn: Callable[..., Any],
    packed: Any,
    *,
    dynamic: bool,
    runtime: Runtime = "litert",
    widened: dict[str, str] | None = None,
) -> Callable[..., Any]:
    """`apply_fn` of the inputs alone, on packed weights that are marked.

    Args:
      apply_fn: (params, *inputs) -> outputs.
      packed: its params; packed leaves are symmetric integers, with scales along whole axes.
      dynamic: whether what meets a weight is on dynamic grids (`mark_dynamic`).
      runtime: dense weights of 4 bits that it does not compute right are stored in 8.
      widened: gets the weights that are stored in more bits than they have, and why, when the
        returned function is traced.

    The returned function raises:
      ValueError: the steps of a weight vary along an axis along which a runtime has one.
    """
    flat = leaves_with_paths(packed, is_leaf=is_packed)
    weights = [_weight(name, leaf) if is_packed(leaf) else _raw(name, leaf) for name, leaf in flat]
    arrays = [w.array if isinstance(w, Weight) else w for w in weights]
    params = jax.tree.unflatten(jax.tree.structure(packed, is_leaf=is_packed), arrays)
    wide = {} if widened is None else widened
    raw = [w for w in weights if isinstance(w, Weight) and stored_width(w.array.dtype) < w.bits]
    wide.update((w.name, f"int8: LiteRT has no {w.array.dtype}") for w in raw if w.bits == 8)

    def marked(*inputs: Any) -> Any:
        closed, out = traced_anywhere(apply_fn, params, *inputs)
        values = [*weights, *jax.tree.leaves(inputs)]
        evaluation = _Evaluation(dynamic, runtime, wide)
        while True:
            try:
                results = evaluation.run(compat.body(closed), values)
                break
            except _Steps as error:
                # Integers that no method packed are what the network makes of them: constants.
                at = [i for i, w in enumerate(weights) if _is_integer(w) and w.name in error.names]
                if not any(_is_integer(values[i]) for i in at):
                    raise
                for i in at:
                    wide[weights[i].name] = "float32: LiteRT has no scales along these axes"
                    values[i] = jnp.asarray(weights[i].array)
        return jax.tree.unflatten(jax.tree.structure(out), list(map(evaluation.result, results)))

    return marked


def _weight(name: str, leaf: Any) -> Weight:
    with jax.ensure_compile_time_eval():
        values = leaf if isinstance(leaf, QTensor) else leaf.values
        array = np.asarray(unpack(leaf))
        scale = jnp.asarray(values.qparams.scale)
        step = np.asarray(values.granularity.expand(scale, leaf.shape))
    form: Any = values.format
    narrow = form.narrow or form.bits not in (4, 8)
    return Weight(name, array, np.broadcast_to(step, array.shape), stored_bits(leaf), narrow)


def _raw(name: str, leaf: Any) -> Any:
    """An array of integers that int4 or int8 hold, in steps of 1; other arrays as they are."""
    array = np.asarray(leaf)
    if array.ndim < 2 or not array.size or not jnp.issubdtype(array.dtype, jnp.integer):
        return leaf
    least, most = jnp.iinfo(array.dtype).min, jnp.iinfo(array.dtype).max
    if least < -128 or most > 127:
        return leaf
    bits = 4 if least >= -8 and most <= 7 else 8
    return Weight(name, array, np.ones(array.shape, np.float32), bits, False)


def _axes(w: Weight) -> list[int]:
    # Along which the steps vary.
    moved = (np.moveaxis(w.step, axis, 0) for axis in range(w.step.ndim))
    return [axis for axis, steps in enumerate(moved) if not (steps == steps[:1]).all()]


def _marked(x: Any, axis: int | None = None) -> Any:
    """A weight as a marked array, its steps along one axis or none; other values as they are."""
    if not isinstance(x, Weight):
        return x
    vary = _axes(x)
    if axis is None and len(vary) == 1:
        (axis,) = vary
    if set(vary) - {axis}:
        raise _Steps(
            x.name,
            f"litert: {x.name}: its scales vary along the axes {vary} of the {list(x.array.shape)} "
            "array that is used, where LiteRT has one per tensor or output channel: quantize it "
            "along the axis of the outputs, or give jc.unpack of the leaf, stored in float32",
        )
    if axis is not None:
        scale = np.moveaxis(x.step, axis, 0).reshape(x.step.shape[axis], -1)[:, 0]
        axis = None if len(scale) == 1 else axis
    else:
        scale = x.step.reshape(-1)[:1]
    array = jnp.asarray(x.array)
    return mark(array, scale=scale, zero_point=0, bits=x.bits, narrow=x.narrow, axis=axis)


class _Evaluation(Evaluator):
    """On values of which some are weights."""

    def __init__(self, dynamic: bool, runtime: Runtime, widened: dict[str, str]):
        self.dynamic, self.widened = dynamic, widened
        self.runtime: Runtime = runtime
        self.grids: dict[int, tuple[Any, dict[str, Any]]] = {}  # id of an array -> its mark

    def enters(self, eqn: Any, at: Any) -> bool:
        """Calls and loops of some trips."""
        del at
        name = eqn.primitive.name
        return name in CALLS or (name == "scan" and bool(eqn.params["length"]))

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Views of weights are weights, and what else meets them is marked."""
        del at
        with compat.surroundings(eqn):
            return self._evaluate(eqn, values)

    def _evaluate(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if row(name).kind == "identity":
            return values
        viewed = _viewed(eqn, values)
        if viewed is not None:
            return viewed
        # Only numbers lie on grids of the runtime.
        values = [self._whole(eqn, x) for x in values]
        weights = [isinstance(x, Weight) for x in values]
        if name == "mul" and sum(weights) == 1:
            scaled = _scaled(*values)
            if scaled is not None:
                return [scaled]
        if name == compat.CONV and not weights[0]:
            return [self._conv(eqn, *values)]
        if name == "pad" and not any(weights):
            return [self._pad(eqn, *values)]
        if name == "composite" and not any(weights):
            return self._composite(eqn, values)
        if name == compat.DOT and sum(weights) == 1:
            return [self._dot(eqn, values, weights.index(True))]
        if name == "gather" and weights == [True, False] and _is_lookup(eqn, *values):
            return [_looked_up(*values)]
        values = [self._moved(eqn, x) for x in values]
        if not _is_position(eqn) or any(isinstance(x, Tracer) for x in values):
            return compat.evaluate(eqn, values)
        with jax.ensure_compile_time_eval():
            return compat.evaluate(eqn, values)

    def _whole(self, eqn: Any, x: Any) -> Any:
        # Integers that an operation computes with as integers are constants like others.
        if not _is_integer(x):
            return x
        self.widened[x.name] = f"whole numbers: {eqn.primitive.name} of it is computed beforehand"
        return jnp.asarray(x.array)

    def _moved(self, eqn: Any, x: Any) -> Any:
        # The runtime moves codes, and has no steps of their own for parts that were moved.
        name = eqn.primitive.name
        moves = row(name).moves or row(name).kind == "sort" or name == "select_n"
        if isinstance(x, Weight) and _axes(x) and moves:
            self.widened[x.name] = f"float32: LiteRT has no {name} of its steps"
            return jnp.asarray(x.array)
        return _marked(x)

    def result(self, x: Any) -> Any:
        """A result of the network: LiteRT has no codes as results, and crashes on such a file."""
        if not isinstance(x, Weight):
            return x
        if stored_width(x.array.dtype) > x.bits:
            self.widened[x.name] = f"{x.array.dtype}: it is a result"
        return jnp.asarray(x.array)

    def scan(self, eqn: Any, values: list[Any], at: Any) -> list[Any]:
        """One trip after the other."""
        constants, carried = compat.scan_sizes(eqn.params)
        fixed, carry = values[:constants], values[constants : constants + carried]
        rows, length = values[constants + carried :], eqn.params["length"]
        steps = range(length)[::-1] if eqn.params["reverse"] else range(length)
        body, stacked = compat.body(eqn.params["jaxpr"]), {}
        for i in steps:
            results = self.run(
                body, [*fixed, *carry, *(_row(x, i) for x in rows)], self.within(at, 0, eqn)
            )
            carry, stacked[i] = results[:carried], [_marked(y) for y in results[carried:]]
        columns = zip(*(stacked[i] for i in range(length)), strict=True)
        return [*carry, *map(jnp.stack, columns)]

    def _dot(self, eqn: Any, values: list[Any], side: int) -> Any:
        terms, batch = eqn.params["dimension_numbers"]
        w, x = values[side], values[1 - side]
        if batch[0] or not terms[0]:
            return compat.evaluate(eqn, list(map(_marked, values)))[0]
        # x [*free, K], w [K, N]
        free = [a for a in range(x.ndim) if a not in terms[1 - side]]
        rows = jnp.transpose(x, (*free, *terms[1 - side]))
        rows = rows.reshape(*rows.shape[: len(free)], -1)
        columns = [a for a in range(w.array.ndim) if a not in terms[side]]
        sizes = [w.array.shape[a] for a in columns]
        order = (*terms[side], *columns)
        matrix = w._replace(
            array=w.array.transpose(order).reshape(rows.shape[-1], math.prod(sizes)),
            step=w.step.transpose(order).reshape(rows.shape[-1], math.prod(sizes)),
        )
        if self.dynamic:
            rows = mark_dynamic(rows, axes=(rows.ndim - 1,))
        y = lax.dot_general(
            rows, self._matrix(matrix), (((rows.ndim - 1,), (0,)), ((), ())),
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )  # fmt: skip
        y = y.reshape(*y.shape[:-1], *sizes)
        if side == 1:
            return y
        return jnp.moveaxis(y, range(len(free)), range(len(sizes), y.ndim))

    def _matrix(self, w: Weight) -> Array:
        # Of a dense layer, marked as the runtime computes it right.
        why = w.bits == 4 and why_not_four_bits(
            self.runtime,
            scales=len(np.unique(w.step)),
            lowest=np.rint(w.array / w.step).min(initial=0),
            dynamic=self.dynamic,
        )
        if why:
            self.widened[w.name] = why
            w = w._replace(bits=8)
        # TFLite-Micro knows one scale by the count; LiteRT's fast kernels have one per output.
        return _marked(w, 1 if self.runtime == "litert" or _axes(w) else None)

    def _conv(self, eqn: Any, x: Array, w: Any) -> Any:
        numbers = eqn.params["dimension_numbers"]
        params, x = simpler(eqn.params, x, self._remark(x))
        if not isinstance(w, Weight):
            return convolved(params, x, w)
        # What kernels for dynamic ranges do not do is computed in floats.
        grouped = params["feature_group_count"] > 1 and w.bits == 4
        if not self.dynamic or grouped:
            return convolved(params, x, _marked(w, numbers.rhs_spec[0]))
        if x.ndim == 3:
            params, (at, kernel, result) = in_two_dimensions(params)
            w = w._replace(
                array=np.expand_dims(w.array, kernel), step=np.expand_dims(w.step, kernel)
            )
            return jnp.squeeze(self._dynamic_conv(params, jnp.expand_dims(x, at), w), result)
        return self._dynamic_conv(params, x, w)

    def _dynamic_conv(self, params: dict[str, Any], x: Array, w: Weight) -> Array:
        numbers = params["dimension_numbers"]
        x = mark_dynamic(x, axes=tuple(a for a in range(x.ndim) if a != numbers.lhs_spec[0]))
        return convolved(params, x, _marked(w, numbers.rhs_spec[0]))

    def _pad(self, eqn: Any, x: Any, fill: Any) -> Any:
        config = eqn.params["padding_config"]
        holes = any(interior for *_, interior in config)
        if not holes or not compat.is_literal(eqn.invars[1]) or fill != 0:
            return compat.evaluate(eqn, [x, fill])[0]
        return padded(x, config, self._remark(x))

    def _composite(self, eqn: Any, values: list[Any]) -> Any:
        found = compat.evaluate(eqn, values)
        name, attributes = compat.composite(eqn)
        if name == FAKE_QUANT and np.size(attributes["scale"]) == 1:
            # The array is kept too: its id belongs to it for as long.
            self.grids[id(found[0])] = (found[0], attributes)
        return found

    def _remark(self, x: Any) -> Callable[[Array], Array]:
        """Puts moved numbers of an array on its grid, if it lies on a marked one."""
        if id(x) not in self.grids:
            return lambda moved: moved
        attributes = self.grids[id(x)][1]
        return lambda moved: mark(
            moved, scale=attributes["scale"], zero_point=attributes["zero_point"],
            bits=int(attributes["dtype"][1:]), narrow=attributes["narrow_range"],
        )  # fmt: skip


def _is_integer(x: Any) -> bool:
    return isinstance(x, Weight) and jnp.issubdtype(x.array.dtype, jnp.integer)


def _scaled(x: Any, y: Any) -> Weight | None:
    """The product of a weight and a constant, if it has steps along one axis at most."""
    w, factor = (x, y) if isinstance(x, Weight) else (y, x)
    if isinstance(factor, Tracer):
        return None
    factor = np.asarray(factor)
    step = w.step * np.abs(factor.astype(np.float32))
    if not (np.isfinite(step) & (step > 0)).all():
        return None
    found = w._replace(array=np.asarray(w.array * factor), step=step)
    # A factor below 0 turns the lowest code around, which the others have no room for.
    turned = np.rint(found.array / step).max(initial=0) > 2 ** (w.bits - 1) - 1
    return None if len(_axes(found)) > 1 or turned else found


def _is_position(eqn: Any) -> bool:
    # Few numbers that may say which elements of a weight are taken.
    meaning = row(eqn.primitive.name)
    if not (meaning.elementwise or meaning.moves or meaning.name == "iota"):
        return False
    return all(v.aval.size <= 4096 and v.aval.dtype.kind in "iub" for v in eqn.outvars)


def _is_lookup(eqn: Any, table: Weight, indices: Any) -> bool:
    # Rows of a matrix.
    numbers = eqn.params["dimension_numbers"]
    return (
        table.array.ndim == 2
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == (indices.ndim - 1,)
        and tuple(eqn.params["slice_sizes"]) == (1, table.array.shape[1])
    )


def _looked_up(table: Weight, indices: Any) -> Any:
    # The runtime has no rows of quantized numbers: rows of codes, times steps. Clips the indices.
    rows = indices[..., 0]
    codes = jnp.asarray(np.rint(table.array / table.step), jnp.int8)
    found = jnp.take(codes, rows, axis=0, mode="clip").astype(table.array.dtype)
    if 0 not in _axes(table):
        step = jnp.asarray(table.step[0])
        return found * step.reshape((1,) * rows.ndim + step.shape)
    if 1 in _axes(table):
        _marked(table, 0)  # raises
    return found * jnp.take(jnp.asarray(table.step[:, 0]), rows, axis=0, mode="clip")[..., None]


def _row(x: Any, i: int) -> Any:
    if isinstance(x, Weight):
        return x._replace(array=x.array[i], step=x.step[i])
    return x[i]


def _viewed(eqn: Any, values: Sequence[Any]) -> list[Weight] | None:
    """The results of an equation that takes elements of weights from known places, else None."""
    weights = [x for x in values if isinstance(x, Weight)]
    if not weights or not isinstance(values[0], Weight):
        return None
    if row(eqn.primitive.name).kind == "index":
        found = _picked(eqn, *values)
    elif len(weights) < len(values):
        return None
    elif eqn.primitive.name == "convert_element_type":
        found = _converted(weights[0], eqn.params["new_dtype"])
    else:
        found = move(eqn, [w.array for w in weights]), move(eqn, [w.step for w in weights])
    if found is None or found[0] is None or found[1] is None:
        return None
    bits, narrow = max(w.bits for w in weights), all(w.narrow for w in weights)
    name = " and ".join(dict.fromkeys(w.name for w in weights))
    return [Weight(name, a, step, bits, narrow) for a, step in zip(*found, strict=True)]


def _picked(eqn: Any, w: Weight, *positions: Any) -> list[list[np.ndarray]] | None:
    if any(isinstance(x, Tracer | Weight) for x in positions):
        return None
    with jax.ensure_compile_time_eval():
        at = taken(eqn, w.array.shape, positions)
    if at is None or (at < 0).any():
        return None
    return [[a.reshape(-1)[at]] for a in (w.array, w.step)]


def _converted(w: Weight, dtype: Any) -> list[list[np.ndarray]] | None:
    if jnp.issubdtype(dtype, jnp.integer) and not _is_integer(w):
        return None
    return [[a.astype(dtype)] for a in (w.array, w.step)]
