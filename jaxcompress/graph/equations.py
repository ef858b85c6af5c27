"""A traced function as one flat list of equations: calls inlined, what is known in advance apart.

Unlike `flat_list`, which counts, this is for those who compute: the values of parameters flow
through the equations that depend on nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.graph import compat
from jaxcompress.graph.interpret import CALLS, Interpreter
from jaxcompress.graph.primitives.table import row


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


class Flattener(Interpreter):
    """Numbers values and collects equations, calls inlined and identities left out.

    Args:
      expand: equation -> a closed jaxpr that computes the same and is entered instead, or None:
        what to do besides the calls that are always entered (jit, remat, custom derivatives).
      names: whether equations that give values names stay; other identities never do.

    Attributes:
      equations: in order.
      avals: shape and dtype of every value by number.
      known: values by number; at first those of literals and constants, give those of parameters.
    """

    def __init__(self, expand: Callable[[Any], Any] = lambda eqn: None, *, names: bool = False):
        self.equations: list[Equation] = []
        self.avals: dict[int, Any] = {}
        self.known: dict[int, Any] = {}
        self._expand, self._names = expand, names

    def value(self, aval: Any) -> int:
        """The number of a new value."""
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def literal(self, v: Any) -> int:
        """A value that is known."""
        return self.constant(v, v.val)

    def constant(self, v: Any, x: Any) -> int:
        """A value that is known."""
        number = self.value(v.aval)
        self.known[number] = jnp.asarray(x, v.aval.dtype)
        return number

    def at(self, where: str, number: int, eqn: Any) -> str:
        """The name stack of all callers."""
        del number
        return "/".join(part for part in (where, compat.scope(eqn)) if part)

    def within(self, at: str, number: int, eqn: Any) -> str:
        """The same."""
        del number, eqn
        return at

    def enters(self, eqn: Any, at: str) -> bool:
        """Calls alone."""
        return eqn.primitive.name in CALLS

    def equation(self, eqn: Any, values: list[int], at: str) -> Sequence[int]:
        """One equation, or what stands for it."""
        name = eqn.primitive.name
        if row(name).kind == "identity" and not (self._names and name == "name"):
            return values
        expanded = self._expand(eqn)
        if expanded is not None:
            return self.run(compat.body(expanded), values, at)
        results = [self.value(v.aval) for v in eqn.outvars]
        self.equations.append(Equation(eqn, tuple(values), tuple(results), at))
        return results

    def split(self, evaluate: Callable[[Equation, list[Any]], Any] | None = None) -> list[Equation]:
        """Evaluates what depends on known values only, into `known`; gives back the rest.

        Args:
          evaluate: (equation, values) -> results, or None where it must stay an operation;
            default: all of them by JAX.
        """
        known, live = self.known, []
        for equation in self.equations:
            results = None
            if all(number in known for number in equation.operands):
                values = [known[number] for number in equation.operands]
                results = (evaluate or _by_jax)(equation, values)
            if results is None:
                live.append(equation)
            else:
                known.update(zip(equation.outputs, results, strict=True))
        return live


def _by_jax(equation: Equation, values: list[Any]) -> list[Any]:
    return compat.evaluate(equation.eqn, values)


def needed(
    equations: list[Equation], outputs: list[int]
) -> tuple[tuple[Equation, ...], Mapping[int, int]]:
    """The equations that some output needs, and how often each value is read or given out."""
    uses: dict[int, int] = {}
    for number in outputs:
        uses[number] = uses.get(number, 0) + 1
    kept = []
    for equation in reversed(equations):
        if any(number in uses for number in equation.outputs):
            kept.append(equation)
            for number in equation.operands:
                uses[number] = uses.get(number, 0) + 1
    return tuple(reversed(kept)), uses


def unrolled(eqn: Any) -> Any:
    """The closed jaxpr of a `scan`, its trips one after the other; same operands and results."""
    params = eqn.params
    n_consts, n_carry = compat.scan_sizes(params)
    body, length = params["jaxpr"], params["length"]
    step = compat.as_function(body)

    def run(*operands):
        consts, carry = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])
        rows, trips = operands[n_consts + n_carry :], range(length)
        stacked: list[Any] = [None] * length
        for k in reversed(trips) if params["reverse"] else trips:
            row = [jax.lax.squeeze(jax.lax.slice_in_dim(r, k, k + 1), (0,)) for r in rows]
            results = step(*consts, *carry, *row)
            carry, stacked[k] = list(results[:n_carry]), results[n_carry:]
        ys = [jnp.stack(parts) for parts in zip(*stacked, strict=True)]
        return [*carry, *ys]

    return jax.make_jaxpr(run)(*[v.aval for v in eqn.invars])
