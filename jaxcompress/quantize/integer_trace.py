"""A traced function as one flat list of equations, what is known of it in advance, and ranges."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Grid
from jaxcompress.formats import Format, Granularity
from jaxcompress.graph import compat
from jaxcompress.graph.trace import trace_program
from jaxcompress.quantize.calibrate import Calibrator, refuse_non_finite

_TENSOR = Granularity()


class Equation(NamedTuple):
    """One operation; what it reads are numbers of values."""

    eqn: Any
    operands: tuple[int, ...]
    outputs: tuple[int, ...]
    scope: str

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def where(self) -> str:
        """For messages: the primitive and where it stands."""
        return f"{self.primitive} at {self.scope!r}" if self.scope else self.primitive


class Flat(NamedTuple):
    """A program without calls.

    Attributes:
      equations: in order; no code that the result does not need.
      avals: shape and dtype of every value by number.
      known: values that depend on no input (parameters and what is computed from them), float32 or
        as they are, on the host.
      input, output: numbers of the values.
      uses: how often each value is read, by equations that the input reaches or as the result.
    """

    equations: tuple[Equation, ...]
    avals: dict[int, Any]
    known: dict[int, Any]
    input: int
    output: int
    uses: dict[int, int]


class _Flattener:
    """Numbers values and collects equations, calls inlined."""

    def __init__(self):
        self.equations: list[Equation] = []
        self.avals: dict[int, Any] = {}
        self.known: dict[int, Any] = {}

    def value(self, aval: Any) -> int:
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def constant(self, aval: Any, value: Any) -> int:
        number = self.value(aval)
        self.known[number] = jnp.asarray(value, aval.dtype)
        return number

    def run(self, body: compat.Body, arguments: list[int], scope: str) -> list[int]:
        names = dict(zip(body.jaxpr.invars, arguments, strict=True))
        for v, value in zip(body.jaxpr.constvars, body.consts, strict=True):
            names[v] = self.constant(v.aval, value)

        def read(v):
            return self.constant(v.aval, v.val) if compat.is_literal(v) else names[v]

        for eqn in body.jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            here = "/".join(part for part in (scope, compat.scope(eqn)) if part)
            calls = compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM
            if eqn.primitive.name in calls:
                results = self.run(compat.call_body(eqn), operands, here)
            else:
                results = [self.value(v.aval) for v in eqn.outvars]
                self.equations.append(Equation(eqn, tuple(operands), tuple(results), here))
            names.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in body.jaxpr.outvars]


def flatten(fn: Callable[..., Any], params: Any, x: Any) -> Flat:
    """Traces `fn(params, x)`, inlines its calls and computes all that does not depend on x.

    Raises:
      ValueError: the result is not one array; it does not depend on x.
    """
    program = trace_program(fn, params, x, dead_code=False)
    if len(program.closed.jaxpr.outvars) != 1:
        raise ValueError(
            f"apply_fn must return one array, got {len(program.closed.jaxpr.outvars)}: "
            "wrap it in a function that returns the logits alone"
        )
    flattener = _Flattener()
    arguments = [flattener.value(v.aval) for v in program.closed.jaxpr.invars]
    flattener.known.update(zip(arguments, jax.tree.leaves(params), strict=False))
    (output,) = flattener.run(compat.body(program.closed), arguments, "")
    live = _split(flattener)
    if output in flattener.known:
        raise ValueError("apply_fn(params, x) does not depend on x: there is nothing to run")
    uses = {output: 1}
    for equation in live:
        for number in equation.operands:
            uses[number] = uses.get(number, 0) + 1
    known = {n: np.asarray(value) for n, value in flattener.known.items() if n in uses}
    return Flat(tuple(live), flattener.avals, known, arguments[-1], output, uses)


def _split(flattener: _Flattener) -> list[Equation]:
    # Evaluates what does not depend on the input; gives back the rest.
    known, live = flattener.known, []
    for equation in flattener.equations:
        if all(number in known for number in equation.operands):
            values = [known[number] for number in equation.operands]
            results = compat.evaluate(equation.eqn, values)
            known.update(zip(equation.outputs, results, strict=True))
        else:
            live.append(equation)
    return live


def grids(
    flat: Flat,
    batches: Iterable[Any],
    numbers: dict[int, str],
    *,
    format: Format,
    calibrate: Calibrator,
) -> dict[int, Grid]:
    """The grids of the values in `numbers` ({number: name for messages}): one jitted pass a batch.

    Raises:
      ValueError: NaN or Inf in a value, with its name.
    """

    def evaluate(known, x):
        values = {**known, flat.input: x}
        for equation in flat.equations:
            operands = [values[number] for number in equation.operands]
            results = compat.evaluate(equation.eqn, operands)
            values.update(zip(equation.outputs, results, strict=True))
        return values

    @jax.jit
    def observe(stats, known, x):
        values = evaluate(known, x)
        axes = {n: tuple(range(values[n].ndim)) for n in stats}
        return {
            n: calibrate.update(s, values[n], axes=axes[n], where=None) for n, s in stats.items()
        }

    stats = {n: calibrate.init(_TENSOR.scale_shape(flat.avals[n].shape)) for n in numbers}
    for x in batches:
        stats = observe(stats, flat.known, x)
    found = {}
    for n, state in stats.items():
        low, high = calibrate.range(state, format)
        refuse_non_finite(f"the calibration batches: {numbers[n]!r}", low, high)
        found[n] = Grid(jax.tree.map(lambda p: p.reshape(()), format.qparams(low, high)), format)
    return found
