"""Where masks make a network a known number, and which groups are therefore cut without a trace.

Removing a channel changes nothing if wherever the channel is summed over, it is zero in the masked
network. What masks make known is followed forward: a masked parameter is zero at its masked
indices, tanh of it too, exp of it is one, and what is divided by it is infinite or NaN.

A parameter may instead be one that goes with its channel whatever it is: the bias and the scale of
a norm. Adding it to a zero leaves a zero, multiplying by it makes none.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_shapes import shape
from jaxcompress.graph.coupling.masked_constants import Constant, Known, joined, times
from jaxcompress.graph.coupling.scopes import Scope
from jaxcompress.graph.coupling.terms import Atom, atoms
from jaxcompress.graph.coupling.zero_rules import (
    ZERO,
    Given,
    Marks,
    Value,
    constant_of,
    conv,
    dot,
    flags_of,
    results_of,
    within,
)
from jaxcompress.graph.interpret import Domain
from jaxcompress.graph.primitives import row
from jaxcompress.graph.primitives.contractions import numbers_of


class Zeroes(Domain):
    """Follows what masks make known; collects why a group is not cut without a trace.

    Where it is, is said by the scope of a jaxpr, or the step of an equation, and the name stack.

    Attributes:
      reasons: atom -> why.
      sums: atom -> where the program sums over it.
    """

    def __init__(self, every: Iterable[Atom], carried: Iterable[Atom] = ()):
        self.marks = Marks(frozenset(every), Atom(0), Atom(0), tuple(carried))
        self.reasons: dict[Atom, str] = {}
        self.sums: dict[Atom, str] = {}

    def scope(self, scope: Scope, ins: Sequence[Value]) -> list[Value]:
        """What is known of a jaxpr's results from what is known of its arguments."""
        return self.run(scope.body, ins, (scope, ""))

    def at(self, where: Any, number: int, eqn: Any) -> Any:
        """The step, and its name stack."""
        scope, outside = where
        inside = "/".join(part for part in (outside, compat.scope(eqn)) if part)
        return scope.steps[number], inside

    def within(self, at: Any, number: int, eqn: Any) -> Any:
        """The scope, and the name stack around it."""
        del eqn
        step, outside = at
        return step.scopes[number], outside

    def literal(self, v: Any) -> Value:
        """Its number."""
        return self.marks.value({}, constant_of(v))

    def constant(self, v: Any, x: Any) -> Value:
        """Nothing is known of it."""
        del v, x
        return Value()

    def equation(self, eqn: Any, values: list[Value], at: Any) -> Sequence[Value]:
        """By the rule of its kind."""
        given = Given(at[0], values, self.marks, at[1])
        name = eqn.primitive.name
        if row(name).kind == "contract":
            results = (self._conv if name == compat.CONV else self._dot)(given)
        else:
            summed = row(name).neutral is not None
            results = self._reduce(given) if summed else results_of(given)
        pairs = zip(results, flags_of(given), strict=True)
        return [Value(result.at, flags) for result, flags in pairs]

    def _reduce(self, given: Given) -> list[Value]:
        step, (value, *_) = given.step, given.values
        axes, name = step.eqn.params["axes"], step.eqn.primitive.name
        everywhere = self.marks.everywhere
        for axis in axes:
            for atom in self.marks.every.intersection(atoms(step.ins[0][axis])):
                c = self.marks.of(value, step.ins[0], atom)
                if c is None or c.value != row(name).neutral:
                    self._blame(atom, name, c)
                elif name == "reduce_sum":
                    self.sums.setdefault(atom, "a sum over the axis: a mean divides as before")
        sizes = shape(step.eqn.invars[0])
        count = math.prod(sizes[axis] for axis in axes)
        left = self.marks.every & within(step.outs[0])
        found = {atom: _reduced(name, c, count) for atom, c in value.at.items() if atom in left}
        every = value.at.get(everywhere)
        return [self.marks.value(found, None if every is None else _reduced(name, every, count))]

    def _blame(self, atom: Atom, name: str, c: Known) -> None:
        if c is not None and c.why:
            why = f"{name} over values that a mask makes infinite or NaN: {c.why}"
        elif name == "reduce_sum" or row(name).neutral is None:
            why = f"{name} over values that a mask leaves"
        else:
            why = f"{name} sees the masked zeros"
        self.reasons.setdefault(atom, why)

    def _contracted(self, given: Given, left: Any, right: Any) -> None:
        # Axes of the operands along which products are summed.
        for one, other in zip(left, right, strict=True):
            for atom in self.marks.every & within([one, other]):
                a, b = (
                    self.marks.of(value, [term], atom)
                    for value, term in zip(given.values[:2], (one, other), strict=True)
                )
                c = times(a, b, given.place)
                if c is None or not c.zero:
                    self._blame(atom, given.step.eqn.primitive.name, c)

    def _dot(self, given: Given) -> list[Value]:
        left, right = numbers_of(given.step.eqn).contracted
        lhs, rhs = given.step.ins[:2]
        self._contracted(given, [lhs[a] for a in left], [rhs[a] for a in right])
        return [dot(given)]

    def _conv(self, given: Given) -> list[Value]:
        spec = given.step.eqn.params["dimension_numbers"]
        # The channels of a group are summed over, the groups themselves are not.
        inputs = given.step.ins[1][spec.rhs_spec[1]]
        for atom in self.marks.every & within([inputs]):
            a, b = (self.marks.of(value, [inputs], atom) for value in given.values)
            c = times(a, b, given.place)
            if c is None or not c.zero:
                self._blame(atom, compat.CONV, c)
        return [conv(given)]

    def scan(self, eqn: Any, values: list[Value], at: Any) -> Sequence[Value]:
        """A layer that is masked must pass on what it is given."""
        step, _ = at
        n_consts, n_carry = compat.scan_sizes(eqn.params)
        start = n_consts + n_carry
        layers = within([terms[0] for terms in step.ins[start : start + 1]])
        for atom in self.marks.every & layers:
            masked = [value.zero(atom) for value in values[start:]]
            if not _passes(step.scopes[0], n_consts, n_carry, masked):
                self.reasons.setdefault(atom, "a layer of zeros changes what it passes on")
        return super().scan(eqn, values, at)

    def join(self, values: Sequence[Value], v: Any) -> Value:
        """What all of them say."""
        del v
        everywhere = self.marks.everywhere
        found = {
            atom: joined([v.at.get(atom) or v.at.get(everywhere) for v in values])
            for v in values
            for atom in v.at
        }
        every = joined([v.at.get(everywhere) for v in values])
        at = self.marks.value({a: c for a, c in found.items() if a is not everywhere}, every).at
        return Value(at, frozenset.intersection(*(v.flags for v in values)))

    def same(self, one: Value, other: Value) -> bool:
        """Numbers may be NaN."""
        alike = one.at.keys() == other.at.keys() and one.flags == other.flags
        return alike and all(c.same(other.at[atom]) for atom, c in one.at.items())


def _reduced(name: str, c: Constant, count: int) -> Known:
    # The reduction of equal numbers.
    if c.undefined or (row(name).exact and name != "reduce_xor"):
        return c
    if name == "reduce_sum":
        return c._replace(value=c.value * count)
    return c if name == "reduce_prod" and c.value in (0, 1) else None


def _passes(scope: Scope, n_consts: int, n_carry: int, masked: Sequence[bool]) -> bool:
    """Whether the body of a scan gives its carry on as it is where these rows are zero."""
    carried = [Atom(0) for _ in range(n_carry)]
    probe = Zeroes((), carried)
    ins = [Value()] * n_consts
    ins += [Value({}, frozenset({mark})) for mark in carried]
    ins += [probe.marks.value({}, ZERO) if zero else Value() for zero in masked]
    results = probe.scope(scope, ins)[:n_carry]
    return all(mark in value.flags for mark, value in zip(carried, results, strict=True))
