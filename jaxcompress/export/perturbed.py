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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.export.marks import FAKE_QUANT
from jaxcompress.graph import compat
from jaxcompress.graph.evaluate import Evaluator
from jaxcompress.graph.interpret import CALLS
from jaxcompress.graph.primitives.table import row

_STRIDE = 7919


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


class _Evaluation(Evaluator):
    """On `_Value`s."""

    def __init__(self, noise: Array, operands: float):
        self.noise, self.operands, self.drawn = noise, operands, 0

    def enters(self, eqn: Any, at: Any) -> bool:
        """Calls and scans."""
        del at
        return eqn.primitive.name in CALLS or eqn.primitive.name == "scan"

    def literal(self, v: Any) -> _Value:
        """Depends on no input."""
        return _Value(v.val, False)

    def constant(self, v: Any, x: Any) -> _Value:
        """Depends on no input."""
        del v
        return _Value(x, False)

    def equation(self, eqn: Any, values: list[_Value], at: Any) -> list[_Value]:
        """With its operands and results moved."""
        with compat.surroundings(eqn):
            return self._moved(eqn, values, at)

    def _moved(self, eqn: Any, values: list[_Value], at: Any) -> list[_Value]:
        meaning, live = row(eqn.primitive.name), any(v.live for v in values)
        if meaning.name == "composite":
            mark, attributes = compat.composite(eqn)
            if mark != FAKE_QUANT:
                return self.run(compat.call_body(eqn), values, self.within(at, 0, eqn))
            return self._grid(eqn, attributes, values, live)
        arrays = [v.array for v in values]
        if live and (terms := _terms(eqn)) is not None:
            arrays = [
                self._operand(v.array, terms, product=meaning.kind == "contract")
                if v.live else v.array
                for v in values
            ]  # fmt: skip
        results = compat.evaluate(eqn, arrays)
        if not live or meaning.exact or meaning.order:
            steps = {v.step for v in values if v.live}
            step = steps.pop() if len(steps) == 1 and meaning.degree == 1 else 0.0
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

    def scan(self, eqn: Any, values: list[_Value], at: Any) -> list[_Value]:
        """Another scan, whose trips take their numbers from other places."""
        if not any(v.live for v in values):
            return [_Value(y, False) for y in compat.evaluate(eqn, [v.array for v in values])]
        params, body = eqn.params, compat.body(eqn.params["jaxpr"])
        consts, carried = compat.scan_sizes(params)
        arrays = [jnp.asarray(v.array) for v in values]
        fixed, carry, rows = (
            arrays[:consts], arrays[consts : consts + carried], arrays[consts + carried :]
        )  # fmt: skip

        def step(state: Any, xs: Any) -> Any:
            trip, carry = state
            inner = _Evaluation(jnp.roll(self.noise, _STRIDE * (trip + 1)), self.operands)
            found = inner.run(
                body, [_Value(x, True) for x in (*fixed, *carry, *xs)], self.within(at, 0, eqn)
            )
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
    meaning = row(name)
    sums = meaning.kind in ("reduce", "cumulative", "window") and not meaning.exact
    return math.prod(shapes[0]) if sums else None
