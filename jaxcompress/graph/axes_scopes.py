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
from jaxcompress.graph.axes_rules import RULES
from jaxcompress.graph.axes_shapes import Terms, shape, unknown
from jaxcompress.graph.axes_terms import Atom, atoms, fresh, frozen, unify

CALLS = compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM


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


class Follower:
    """Goes through jaxprs and notes the primitives that have no rule."""

    def __init__(self):
        self.unknown: dict[str, None] = {}
        self._in_rule = False

    def scope(self, body: compat.Body, ins: Sequence[Terms]) -> Scope:
        """The terms of all values of a jaxpr from those of its arguments."""
        jaxpr = body.jaxpr
        consts = [fixed(shape(v)) for v in jaxpr.constvars]
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, ins, strict=True))

        def read(v):
            if compat.is_literal(v):
                return [frozen(n, "a number in the program") for n in shape(v)]
            return known[v]

        steps = []
        for eqn in jaxpr.eqns:
            steps.append(self._step(eqn, tuple(read(v) for v in eqn.invars)))
            known.update(zip(eqn.outvars, steps[-1].outs, strict=True))
        outs = tuple(read(v) for v in jaxpr.outvars)
        return Scope(body, tuple(consts), tuple(ins), tuple(steps), outs)

    def _step(self, eqn: Any, ins: tuple[Terms, ...]) -> Step:
        name = eqn.primitive.name
        if name in CALLS:
            return self._call(eqn, ins)
        special = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        if special is not None:
            return special(eqn, ins)
        rule = RULES.get(name)
        if rule is None:
            self.unknown[name] = None
        outs = (rule or unknown)(eqn, ins)
        return Step(eqn, ins, tuple(outs))

    def _call(self, eqn: Any, ins: tuple[Terms, ...]) -> Step:
        main = self.scope(compat.call_body(eqn), ins)
        # A rule may call its own function: within one, calls are differentiated like their bodies.
        ruled = eqn.primitive.name in compat.CUSTOM and not self._in_rule
        rule = derivative(eqn) if ruled else None
        if rule is None:
            return Step(eqn, ins, main.outs, (main,))
        forward = eqn.primitive.name == "custom_jvp_call"
        floats = [t for t, v in zip(ins, eqn.invars, strict=True) if is_float(v)]
        extra = floats if forward else main.outs
        self._in_rule = True
        bent = self.scope(rule, (*ins, *extra))
        self._in_rule = False
        wanted = (*main.outs, *main.outs) if forward else floats
        for new, old in zip(bent.outs, wanted, strict=True):
            tie(new, old)
        return Step(eqn, ins, main.outs, (main, bent))

    def _scan(self, eqn: Any, ins: tuple[Terms, ...]) -> Step:
        n_consts, n_carry = compat.scan_sizes(eqn.params)
        start, rows = n_consts + n_carry, ins[n_consts + n_carry :]
        layer = fresh(eqn.params["length"])
        for atom in atoms(layer):
            atom.rigid = atom.stack = True
        for row in rows:
            unify(row[0], layer)
        inside = self.scope(
            compat.body(eqn.params["jaxpr"]), (*ins[:start], *(row[1:] for row in rows))
        )
        carry = ins[n_consts:start]
        for before, after in zip(carry, inside.outs[:n_carry], strict=True):
            tie(before, after)
        stacked = [[layer, *out] for out in inside.outs[n_carry:]]
        return Step(eqn, ins, (*carry, *stacked), (inside,))

    def _while(self, eqn: Any, ins: tuple[Terms, ...]) -> Step:
        n_test, n_step = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = ins[n_test + n_step :]
        test = self.scope(compat.body(eqn.params["cond_jaxpr"]), (*ins[:n_test], *carry))
        step = self.scope(compat.body(eqn.params["body_jaxpr"]), ins[n_test:])
        for before, after in zip(carry, step.outs, strict=True):
            tie(before, after)
        return Step(eqn, ins, tuple(carry), (test, step))

    def _cond(self, eqn: Any, ins: tuple[Terms, ...]) -> Step:
        branches = [self.scope(compat.body(b), ins[1:]) for b in eqn.params["branches"]]
        for branch in branches[1:]:
            for one, other in zip(branches[0].outs, branch.outs, strict=True):
                tie(one, other)
        return Step(eqn, ins, branches[0].outs, tuple(branches))


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
