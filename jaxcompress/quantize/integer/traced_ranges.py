"""A traced function as one flat list of equations, what is known of it in advance, and ranges."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.core.packed import Grid, unpack
from jaxcompress.formats import Format, Granularity
from jaxcompress.graph import compat
from jaxcompress.graph.equations import Equation, Flattener, needed
from jaxcompress.graph.tracing import trace_program
from jaxcompress.quantize.integer.trained_grids import Steps, fixed_grids, named
from jaxcompress.quantize.ranges.min_max import Calibrator, refuse_non_finite

_TENSOR = Granularity()


class Flat(NamedTuple):
    """A program without calls.

    Attributes:
      equations: in order; no code that the result does not need.
      avals: shape and dtype of every value by number.
      known: values that depend on no input (parameters and what is computed from them), float32 or
        as they are, on the host.
      input, output: numbers of the values.
      uses: how often each value is read, by equations that the input reaches or as the result.
      fixed: grids of values by number, where they are given.
      steps: of known values that are views of a packed leaf, the step of every element.
      behind: paths of the packed leaves that a known value is made of.
    """

    equations: tuple[Equation, ...]
    avals: dict[int, Any]
    known: dict[int, Any]
    input: int
    output: int
    uses: Mapping[int, int]
    fixed: Mapping[int, Grid]
    steps: Mapping[int, np.ndarray]
    behind: Mapping[int, frozenset[str]]


def flatten(fn: Callable[..., Any], packed: Any, x: Any, given: Mapping[str, Grid]) -> Flat:
    """Traces `fn(params, x)`, inlines its calls and computes all that does not depend on x.

    Args:
      fn: (params, x) -> one array.
      packed: the params, some leaves packed.
      x: the input.
      given: grids of what enters contractions, by name.

    Raises:
      ValueError: the result is not one array; it does not depend on x.
    """
    params = unpack(packed)
    program = trace_program(named(fn, given), params, x, dead_code=False)
    if len(program.closed.jaxpr.outvars) != 1:
        raise ValueError(
            f"apply_fn must return one array, got {len(program.closed.jaxpr.outvars)}: "
            "wrap it in a function that returns the logits alone"
        )
    flattener = Flattener(names=True)
    arguments = [flattener.value(v.aval) for v in program.closed.jaxpr.invars]
    flattener.known.update(zip(arguments, jax.tree.leaves(params), strict=False))
    (output,) = flattener.run(compat.body(program.closed), arguments, "")
    own = Steps(arguments[:-1], packed)
    own.follow(flattener.equations)
    live = flattener.split()
    if output in flattener.known:
        raise ValueError("apply_fn(params, x) does not depend on x: there is nothing to run")
    live, uses = needed(live, [output])
    known = {n: np.asarray(value) for n, value in flattener.known.items() if n in uses}
    fixed = fixed_grids(live, uses, given)
    values = flattener.avals, known, arguments[-1], output, uses
    return Flat(live, *values, fixed, own.steps, own.behind)


def calibrated_grids(
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
