"""Follows axes through a jaxpr and all jaxprs inside it: the terms of every value.

Every call of a jaxpr gets terms of its own: one that JAX shares between two layers would otherwise
tie their widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_rules import rule_of
from jaxcompress.graph.coupling.axis_shapes import Terms, shape, unknown
from jaxcompress.graph.coupling.terms import Atom, Term, atoms, fresh, frozen, unify
from jaxcompress.graph.interpret import Domain


@dataclass(frozen=True)
class Step:
    """An equation, the terms of its operands and results, and the jaxprs inside it.

    Of a function with a derivative rule the second jaxpr is that of the rule.
    """

    eqn: Any
    ins: tuple[Terms, ...]
    outs: tuple[Terms, ...]
    scopes: tuple["Scope", ...] = ()


@dataclass(frozen=True)
class Scope:
    """One call of a jaxpr, with the terms of its constants, arguments and results."""

    body: compat.Body
    consts: tuple[Terms, ...]
    ins: tuple[Terms, ...]
    steps: tuple[Step, ...]
    outs: tuple[Terms, ...]


class Follower(Domain):
    """Goes through jaxprs and notes the primitives that have no rule.

    Terms of two values that must be cut alike are unified, which holds for all trips of a loop at
    once: every jaxpr is gone through a single time for each call, and kept as a `Scope`.
    """

    def __init__(self):
        self.unknown: dict[str, None] = {}
        self._in_rule = False
        self._scopes: list[list[Scope]] = [[]]  # of the equations around
        self._steps: list[list[Step]] = []  # of the jaxprs around
        self._consts: list[list[Terms]] = []
        self._layers: list[Term] = []  # of the scans around

    def scope(self, body: compat.Body, ins: Sequence[Terms]) -> Scope:
        """The terms of all values of a jaxpr from those of its arguments."""
        self.run(body, ins)
        return self._scopes[-1].pop()

    def run(self, body: compat.Body, values: Sequence[Terms], where: Any = ()) -> list[Terms]:
        """Keeps the terms of all values."""
        self._steps.append([])
        self._consts.append([])
        outs = super().run(body, values, where)
        consts, steps = tuple(self._consts.pop()), tuple(self._steps.pop())
        self._scopes[-1].append(Scope(body, consts, tuple(values), steps, tuple(outs)))
        return outs

    def literal(self, v: Any) -> Terms:
        """Nothing can be cut off it."""
        return [frozen(n, "a number in the program") for n in shape(v)]

    def constant(self, v: Any, x: Any) -> Terms:
        """Cut where it must be."""
        del x
        self._consts[-1].append(fixed(shape(v)))
        return self._consts[-1][-1]

    def equation(self, eqn: Any, values: list[Terms], at: Any) -> Sequence[Terms]:
        """By the rule of its primitive."""
        del at
        rule = rule_of(eqn.primitive.name)
        if rule is None:
            self.unknown[eqn.primitive.name] = None
        outs = (rule or unknown)(eqn, values)
        self._steps[-1].append(Step(eqn, tuple(values), tuple(outs)))
        return outs

    def enter(self, eqn: Any, values: list[Terms], at: Any) -> Sequence[Terms]:
        """Keeps the scopes inside."""
        self._scopes.append([])
        outs = super().enter(eqn, values, at)
        inside = tuple(self._scopes.pop())
        self._steps[-1].append(Step(eqn, tuple(values), tuple(outs), inside))
        return outs

    def custom(self, eqn: Any, values: list[Terms], at: Any) -> Sequence[Terms]:
        """What the derivative rule ties is tied too."""
        outs = super().custom(eqn, values, at)
        # A rule may call its own function: within one, calls are differentiated like their bodies.
        rule = None if self._in_rule else derivative(eqn)
        if rule is None:
            return outs
        forward = eqn.primitive.name == "custom_jvp_call"
        floats = [t for t, v in zip(values, eqn.invars, strict=True) if is_float(v)]
        self._in_rule = True
        bent = self.run(rule, [*values, *(floats if forward else outs)])
        self._in_rule = False
        wanted = (*outs, *outs) if forward else floats
        for new, old in zip(bent, wanted, strict=True):
            tie(new, old)
        return outs

    def scan(self, eqn: Any, values: list[Terms], at: Any) -> Sequence[Terms]:
        """All that is stacked shares the axis of the layers."""
        layer = fresh(eqn.params["length"])
        for atom in atoms(layer):
            atom.rigid = atom.stack = True
        self._layers.append(layer)
        outs = super().scan(eqn, values, at)
        self._layers.pop()
        return outs

    def row(self, value: Terms, v: Any) -> Terms:
        """Without the axis of the layers."""
        del v
        unify(value[0], self._layers[-1])
        return value[1:]

    def stacked(self, value: Terms, v: Any) -> Terms:
        """With the axis of the layers."""
        del v
        return [self._layers[-1], *value]

    def carried(self, before: Sequence[Terms], after: Sequence[Terms]) -> None:
        """One is cut as the other."""
        for one, other in zip(before, after, strict=True):
            tie(one, other)

    def join(self, values: Sequence[Terms], v: Any) -> Terms:
        """One is cut as the others."""
        del v
        for other in values[1:]:
            tie(values[0], other)
        return values[0]

    def settled(
        self, body: compat.Body, values: Sequence[Terms], slots: range, where: Any
    ) -> list[Terms]:
        """As they are: ties hold in all trips."""
        del body, slots, where
        return list(values)


def fixed(sizes: Sequence[int]) -> Terms:
    """New axes of an array that is given: cut where they must be, but of no other size."""
    terms = [fresh(n) for n in sizes]
    for term in terms:
        if isinstance(term, Atom):
            term.rigid = True
    return terms


def tie(one: Terms, other: Terms) -> None:
    """Two values that must be cut alike."""
    for a, b in zip(one, other, strict=True):
        unify(a, b)


def is_float(v: Any) -> bool:
    """Whether a variable has derivatives."""
    return hasattr(v.aval, "dtype") and jnp.issubdtype(v.aval.dtype, jnp.inexact)


def derivative(eqn: Any) -> compat.Body | None:
    """The rule of a `custom_jvp` or `custom_vjp` call as a jaxpr at the shapes that were traced.

    Of a `custom_jvp`: operands and tangents of its floats -> results and their tangents. Of a
    `custom_vjp`: operands and cotangents of the results -> cotangents of its floats. None if a
    result is no float: such a call is differentiated like its body.
    """
    if not all(map(is_float, eqn.outvars)) or not any(map(is_float, eqn.invars)):
        return None
    avals = [jax.ShapeDtypeStruct(shape(v), v.aval.dtype) for v in eqn.invars]
    at = [i for i, v in enumerate(eqn.invars) if is_float(v)]

    def of_floats(values):
        def call(*floats):
            filled = list(values)
            for i, x in zip(at, floats, strict=True):
                filled[i] = x
            return compat.evaluate(eqn, filled)

        return call, [values[i] for i in at]

    def forward(values, tangents):
        call, floats = of_floats(values)
        return jax.jvp(call, floats, tangents)

    def backward(values, cotangents):
        call, floats = of_floats(values)
        return jax.vjp(call, *floats)[1](list(cotangents))

    if eqn.primitive.name == "custom_jvp_call":
        closed = jax.make_jaxpr(forward)(avals, [avals[i] for i in at])
    else:
        outs = [jax.ShapeDtypeStruct(shape(v), v.aval.dtype) for v in eqn.outvars]
        closed = jax.make_jaxpr(backward)(avals, outs)
    return compat.body(compat.without_dead_code(closed))
