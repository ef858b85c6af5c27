"""A program as a list of operations, with the readers and the origin of every value."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph import compat
from jaxcompress.graph.flat_list import END, LOOP, Op, carried, inline, rows
from jaxcompress.graph.layers.views import views
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.tracing import Program


class Flat:
    """A program as a list of operations, with the readers and the origin of every value.

    Attributes:
      program: what was traced.
      values: all arrays by number, those of the parameters first.
      paths: of the parameters.
      weights: those that a contraction takes as its weight.
      conditional: scopes of the conditionals.
      outputs: numbers of the results, and of the tests of `while` loops that inputs or parameters
        reach: their values must not change.
      ops: what the results need, in order of execution.
      at: place of an operation -> its position in `ops`.
      trips: places of the loops around an operation -> how often it runs.
      definition: number of a value -> the operation that gives it.
      readers: number of a value -> the operations that take it.
    """

    def __init__(self, program: Program):
        self.program = program
        flat = inline(program, weigh=len)
        self.values, self.paths = flat.values, list(program.graph.params)
        self.weights = {view.path for view in views(program).values()}
        self.conditional = ", ".join(flat.choices)
        origins = {n: flat.values[n].origin for n in flat.tests}
        tests = {n for n, origin in origins.items() if origin.moves or origin.params}
        self.outputs = frozenset(flat.outputs).union(tests)
        self.ops = _live(flat.ops, self.outputs)
        self.at = {op.place: k for k, op in enumerate(self.ops) if op.primitive not in (LOOP, END)}
        self.trips: dict[tuple[Any, ...], int] = {(): 1}
        self.definition: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self._region: dict[int, tuple[Any, ...]] = {}
        self._free: set[int] = set()  # constants that no scale changes: 0 and infinity
        for at, op in enumerate(self.ops):
            self._enter(at, op)

    def _enter(self, at: int, op: Op) -> None:
        inside = (*op.region, op.place)
        if op.primitive == LOOP:
            self.trips[inside] = self.trips[op.region] * op.eqn.params.get("length", 1)
        inner = len(carried(op)[1]) if op.primitive == LOOP else 0
        for k, number in enumerate(op.outputs):
            self.definition[number] = at
            self._region[number] = inside if k < inner else op.region
        for number in op.inputs:
            self.readers.setdefault(number, []).append(at)
        if op.primitive in ("broadcast_in_dim", "convert_element_type", "reshape"):
            if self.is_free(op, 0):
                self._free.add(op.outputs[0])

    def trips_of(self, number: int) -> int:
        """How often a value is made."""
        return self.trips[self._region.get(number, ())]

    def is_free(self, op: Op, port: int) -> bool:
        """Whether an operand is known to be 0 or infinite everywhere."""
        number = op.operands[port]
        if number is not None:
            return number in self._free
        value = self.literal(op, port)
        if value is None or value.dtype == bool:
            return False
        return bool(np.all((value == 0) | np.isinf(value)))

    def literal(self, op: Op, port: int) -> np.ndarray | None:
        """The value of an operand that is a number in the program; None if it is not known."""
        return np.asarray(op.constants[port]) if port in op.constants else None

    def is_data(self, number: int | None) -> bool:
        """Whether inputs reach a value."""
        return number is not None and self.values[number].origin.data

    def is_made_of_params(self, number: int | None) -> bool:
        """Whether a value is made of parameters."""
        return number is not None and bool(self.values[number].origin.params)

    def layers(self) -> Iterator[tuple[Op, Tap]]:
        """The contractions of activations with weights."""
        for op in self.ops:
            taps = self.program.places.get(op.place, ())
            if taps and taps[0].site.weight is not None:
                yield op, taps[0]

    def site_name(self, op: Op) -> str:
        """The name of the site of a contraction; "" for any other operation."""
        site = self.program.contractions.get(op.place)
        return site.name if site is not None else ""

    def is_computed(self, number: int) -> bool:
        """Whether a value is made of parameters alone, with a root or a quotient among it."""
        if self.is_data(number) or not self.is_made_of_params(number):
            return False
        op = self.ops[self.definition[number]] if number in self.definition else None
        if op is None or op.primitive in (LOOP, END):
            return False
        return op.primitive in _ROOTS or any(map(self.is_computed, op.inputs))

    def evaluate(self, number: int, leaves: Sequence[Any]) -> Array:
        """A value made of parameters and constants, [trips of the loops around it, *shape].

        Args:
          number: of the value.
          leaves: of the parameters.

        Raises:
          ValueError: a loop carries it, or it depends on an input.
        """
        consts = self.program.closed.consts
        start = len(self.program.closed.jaxpr.invars)
        if number < len(leaves):
            return jnp.asarray(leaves[number])[None]
        if start <= number < start + len(consts):
            return jnp.asarray(consts[number - start])[None]
        op = self.ops[self.definition[number]] if number in self.definition else None
        if op is None or op.primitive == END or self.is_data(number):
            raise ValueError("it is made of more than parameters")
        if op.primitive == LOOP:
            outer = {inner: outer for outer, inner in zip(*rows(op), strict=True)}.get(number)
            if outer is None:
                raise ValueError("a loop carries it")
            value = self._within(self.evaluate(outer, leaves), op)
            return value.reshape(-1, *value.shape[2:])
        given = [
            self._constant(op, port)[None] if n is None else self.evaluate(n, leaves)
            for port, n in enumerate(op.operands)
        ]
        trips = max(len(x) for x in given)
        at = op.outputs.index(number)
        if trips == 1:
            return compat.evaluate(op.eqn, [x[0] for x in given])[at][None]
        given = [self._within(x, op) for x in given]
        return jax.vmap(lambda *values: compat.evaluate(op.eqn, list(values))[at])(*given)

    def _within(self, value: Array, op: Op) -> Array:
        # In the trips of an operation: what a loop around it does not change is the same in all.
        return jnp.repeat(value, self.trips[op.region] // len(value), axis=0)

    def _constant(self, op: Op, port: int) -> Array:
        return jnp.asarray(self.literal(op, port), op.eqn.invars[port].aval.dtype)


_ROOTS = frozenset("sqrt rsqrt div pow integer_pow".split())


def _live(ops: Sequence[Op], outputs: frozenset[int]) -> tuple[Op, ...]:
    needed, kept = set(outputs), []
    for op in reversed(ops):
        if op.primitive in (LOOP, END) or needed.intersection(op.outputs):
            needed.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))
