"""How far rounding moves the results of a function: its trace evaluated with random roundings.

A runtime adds in another order, multiplies by reciprocals, has its own exp, and brings a tie to the
other code. Every such choice moves a number by less than a known amount: here each of them is moved
by a random share of that amount, all at once, so that one run is one way in which the network may
legitimately be computed:

- a result of floats by u |y|, |u| <= 4 eps, of any operation that computes (moves do not);
- an operand of a sum of K terms by u |x|, |u| <= sqrt(K) eps: errors of a sum of K products are
  those of its exact value at such operands (backward error analysis; sqrt, as roundings vary in
  sign: Higham and Mary 2019, https://epubs.siam.org/doi/10.1137/18M1226312);
- what is brought to a grid by u S, |u| <= 1/2, before it is rounded: a code moves by one at most.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.meshes import traced_anywhere
from jaxcompress.export.marks import FAKE_QUANT
from jaxcompress.graph import compat

_MOVES = frozenset(
    "reshape transpose squeeze expand_dims slice rev broadcast_in_dim concatenate pad gather split "
    "dynamic_slice dynamic_update_slice select_n copy copy_p stop_gradient max min clamp neg abs "
    "sign iota reduce_max reduce_min reduce_window_max sort argmax argmin round floor ceil "
    "convert_element_type optimization_barrier".split()
)
_SUMS = frozenset("reduce_sum cumsum reduce_window_sum reduce_prod cumprod".split())
_STRIDE = 7919
_OPEN = compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM


def with_rounding(
    fn: Callable[..., Any], *, operands: float = 0.0
) -> Callable[..., tuple[list[Array], list[float]]]:
    """`fn` whose roundings are moved at random.

    Args:
      fn: pure, (params, *inputs) -> pytree of arrays.
      operands: steps of 8-bit grids over whole tensors by which operands of products move, 0.5
        where a runtime quantizes them by itself.

    Returns:
      `(noise, params, *inputs) -> (leaves of the results, step of the grid of each or 0)`, for
      `jit`. The noise, float32 [N], is uniform between -1 and 1; every operation takes its numbers
      from another place in it. Zeros give the results of `fn`.
    """

    def moved(noise: Array, params: Any, *inputs: Any) -> tuple[list[Array], list[float]]:
        closed, _ = traced_anywhere(fn, params, *inputs)
        evaluation = _Evaluation(noise, operands)
        body = compat.body(closed)
        values = [_Value(x, False) for x in jax.tree.leaves(params)]
        values += [_Value(x, True) for x in jax.tree.leaves(inputs)]
        found = evaluation.run(body, values)
        return [jnp.asarray(v.array) for v in found], [v.step for v in found]

    return moved


class _Value:
    """An array; whether it depends on an input; the step of the grid that it lies on, or 0."""

    def __init__(self, array: Any, live: bool, step: float = 0.0):
        self.array, self.live, self.step = array, live, step


class _Evaluation:
    def __init__(self, noise: Array, operands: float):
        self.noise, self.operands, self.drawn = noise, operands, 0

    def run(self, body: compat.Body, values: Sequence[_Value]) -> list[_Value]:
        """The results of a jaxpr."""
        known = {
            v: _Value(x, False) for v, x in zip(body.jaxpr.constvars, body.consts, strict=True)
        }
        known.update(zip(body.jaxpr.invars, values, strict=True))
        read = lambda v: _Value(v.val, False) if compat.is_literal(v) else known[v]
        for eqn in body.jaxpr.eqns:
            with compat.surroundings(eqn):
                results = self._evaluate(eqn, [read(v) for v in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in body.jaxpr.outvars]

    def _evaluate(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name, live = eqn.primitive.name, any(v.live for v in values)
        if name in _OPEN:
            return self.run(compat.call_body(eqn), values)
        if name == "scan" and live:
            return self._scan(eqn, values)
        if name == "composite":
            mark, attributes = compat.composite(eqn)
            if mark != FAKE_QUANT:
                return self.run(compat.call_body(eqn), values)
            return self._grid(eqn, attributes, values, live)
        arrays = [v.array for v in values]
        if live and (terms := _terms(eqn)) is not None:
            arrays = [
                self._operand(v.array, terms, product=name in (compat.DOT, compat.CONV))
                if v.live else v.array
                for v in values
            ]  # fmt: skip
        results = compat.evaluate(eqn, arrays)
        if not live or name in _MOVES:
            steps = {v.step for v in values if v.live}
            step = steps.pop() if len(steps) == 1 else 0.0
            return [_Value(y, live, step) for y in results]
        return [_Value(self._relative(y, 4.0), True) for y in results]

    def _grid(
        self, eqn: Any, attributes: dict[str, Any], values: list[_Value], live: bool
    ) -> list[_Value]:
        # The last operand: what the mark closes over comes first.
        arrays, x, scale = [v.array for v in values], values[-1].array, attributes["scale"]
        if live and scale.size == 1:
            step: Any = float(scale[0])
        elif live and not scale.size:
            step = _step(x)  # of all rows: those of single rows are smaller
        else:
            return [_Value(y, live) for y in compat.evaluate(eqn, arrays)]
        arrays[-1] = x + (0.5 * step * self._draw(x)).astype(x.dtype)
        (y,) = compat.evaluate(eqn, arrays)
        return [_Value(y, True, step if scale.size else 0.0)]

    def _scan(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        params, body = eqn.params, compat.body(eqn.params["jaxpr"])
        consts, carried = compat.scan_sizes(params)
        arrays = [jnp.asarray(v.array) for v in values]
        fixed, carry, rows = (
            arrays[:consts], arrays[consts : consts + carried], arrays[consts + carried :]
        )  # fmt: skip

        def step(state: Any, row: Any) -> Any:
            trip, carry = state
            inner = _Evaluation(jnp.roll(self.noise, _STRIDE * (trip + 1)), self.operands)
            found = inner.run(body, [_Value(x, True) for x in (*fixed, *carry, *row)])
            results = [v.array for v in found]
            return (trip + 1, results[:carried]), results[carried:]

        (_, carry), rows = lax.scan(
            step, (jnp.int32(0), carry), rows, length=params["length"], reverse=params["reverse"]
        )
        return [_Value(x, True) for x in (*carry, *rows)]

    def _operand(self, x: Any, terms: int, *, product: bool) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        x = self._relative(x, math.sqrt(max(terms, 1)))
        if product and self.operands:
            x = x + (self.operands * _step(x) * self._draw(x)).astype(x.dtype)
        return x

    def _relative(self, x: Any, size: float) -> Any:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        # Not x * (1 + u): no noise leaves x as it is, infinities too.
        unit = jnp.where(jnp.isfinite(x), x, 0) * jnp.asarray(
            jnp.finfo(x.dtype).eps * size, x.dtype
        )
        return x + unit * self._draw(x).astype(x.dtype)

    def _draw(self, x: Any) -> Array:
        shape, count = np.shape(x), self.noise.shape[0]
        self.drawn += 1
        start, size = self.drawn * _STRIDE % count, math.prod(shape)
        # No generator in the program: it would take longer to compile than the network.
        repeats = -(-(start + size) // count)
        return jnp.tile(self.noise, repeats)[start : start + size].reshape(shape)


def _step(x: Any) -> Array:
    # Of a grid of 256 codes over all numbers and zero.
    return (jnp.maximum(jnp.max(x), 0) - jnp.minimum(jnp.min(x), 0)) / 255


def _terms(eqn: Any) -> int | None:
    """How many terms each number of a sum has; None: it is no sum."""
    name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.invars]
    if name == compat.DOT:
        ((axes, _), _) = eqn.params["dimension_numbers"]
        return math.prod(shapes[0][a] for a in axes)
    if name == compat.CONV:
        outputs = eqn.params["dimension_numbers"].rhs_spec[0]
        return math.prod(shapes[1]) // max(shapes[1][outputs], 1)
    return math.prod(shapes[0]) if name in _SUMS else None
