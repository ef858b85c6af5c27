"""The one evaluator of jaxprs: control flow is written here, what equations do is a subclass's say.

Passes that compute a network again with something changed (a visitor at its contractions, smaller
arrays, marked weights, moved roundings, exponents beside values) all go through its equations in
order and enter the jaxprs inside it. They differ in what an equation does, in which jaxprs they
enter, and in whether something is carried along. So `Evaluator` has a method for each of these.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxcompress.graph import compat

_CALLS = compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM
_LOOPS = frozenset(("scan", "while", "cond"))
ENTERED = _CALLS | _LOOPS
"""Primitives whose jaxprs can be entered."""


class Evaluator:
    """Evaluates jaxprs; what a subclass does not say is as JAX does it.

    A subclass says which equations are entered (`enters`: none by default) and what the others do
    (`equation`). Where an equation is, is told by `where`: of a jaxpr what `run` was given, of an
    equation `at(where, number)`, of a jaxpr inside it `within(at, number)`. By default these are
    the numbers on the way to it, as in `follow.Place`.

    Values may be any pytrees of arrays where loops are entered, and anything elsewhere.

    Attributes:
      state: a pytree of arrays that is carried along. Outside a scan it has an axis in front for
        its trips, a `while` carries it from trip to trip, a `cond` leaves what another branch does
        alone; so a subclass may set it anywhere.
      keeps_calls: whether `jit` and `checkpoint` stay around what they hold.
    """

    state: Any = ()
    keeps_calls = False

    def enters(self, eqn: Any, at: Any) -> bool:
        """Whether the jaxprs of an equation, of `ENTERED`, are evaluated here too."""
        del eqn, at
        return False

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation that is not entered."""
        del at
        return compat.evaluate(eqn, values)

    def literal(self, v: Any) -> Any:
        """The value of a number in the program."""
        return v.val

    def constant(self, x: Any, number: int, where: Any) -> Any:
        """The value of a constant of a jaxpr."""
        del number, where
        return x

    def at(self, where: Any, number: int) -> Any:
        """Where an equation is."""
        return (*where, number)

    def within(self, at: Any, number: int) -> Any:
        """Where a jaxpr of an equation is."""
        return (*at, number)

    def run(self, body: compat.Body, values: Sequence[Any], where: Any = ()) -> list[Any]:
        """The results of a jaxpr."""
        jaxpr = body.jaxpr
        consts = [self.constant(x, k, where) for k, x in enumerate(body.consts)]
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        last = _last_uses(jaxpr)

        def read(v: Any) -> Any:
            return self.literal(v) if compat.is_literal(v) else known[v]

        for number, eqn in enumerate(jaxpr.eqns):
            at, operands = self.at(where, number), [read(v) for v in eqn.invars]
            if self.enters(eqn, at):
                with compat.surroundings(eqn):
                    results = self.enter(eqn, operands, at)
            else:
                results = self.equation(eqn, operands, at)
            known.update(zip(eqn.outvars, results, strict=True))
            for v in last.get(number, ()):  # so that eager evaluation frees memory
                known.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def enter(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation by those of its jaxprs."""
        name = eqn.primitive.name
        if name in compat.CUSTOM:
            return self.custom(eqn, values, at)
        if name in compat.REMAT or (name in compat.JIT and self.keeps_calls):
            return self.call(eqn, values, at)
        if name in _CALLS:
            return self.run(compat.call_body(eqn), values, self.within(at, 0))
        return {"scan": self.scan, "while": self.loop, "cond": self.cond}[name](eqn, values, at)

    def custom(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a function with a derivative rule of its own: its body, and the rule is lost."""
        return self.run(compat.call_body(eqn), values, self.within(at, 0))

    def call(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of `checkpoint`, and of `jit` where it stays."""

        def inner(state: Any, *values: Any) -> tuple[list[Any], Any]:
            return self.carried(state, compat.call_body(eqn), values, self.within(at, 0))

        if eqn.primitive.name in compat.REMAT:
            outer = jax.checkpoint(inner, **compat.remat_options(eqn.params))
        else:
            inner.__name__ = eqn.params["name"]
            outer = jax.jit(inner, **compat.jit_options(eqn.params))
        results, self.state = outer(self.state, *values)
        return results

    def scan(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a scan: another one, with a row of the state for each trip."""
        params, body = eqn.params, compat.body(eqn.params["jaxpr"])
        num_consts, num_carry = compat.scan_sizes(params)
        start = num_consts + num_carry

        def step(carry: Any, row: Any) -> Any:
            state, xs = row
            operands = [*values[:num_consts], *carry, *xs]
            results, state = self.carried(state, body, operands, self.within(at, 0))
            return results[:num_carry], (results[num_carry:], state)

        carry, (ys, self.state) = lax.scan(
            step,
            values[num_consts:start],
            (self.state, values[start:]),
            length=self.length(eqn, at),
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]

    def length(self, eqn: Any, at: Any) -> Any:
        """How many trips a scan makes."""
        del at
        return eqn.params["length"]

    def loop(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a while: another one, with the state in its carry."""
        test, body = (compat.body(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
        num_test = eqn.params["cond_nconsts"]
        start = num_test + eqn.params["body_nconsts"]

        # The test renews the state too, so its answer is part of the carry.
        def tested(carry: Any, state: Any) -> Any:
            operands = [*values[:num_test], *carry]
            (going_on,), state = self.carried(state, test, operands, self.within(at, 0))
            return going_on, carry, state

        def step(loop: Any) -> Any:
            _, carry, state = loop
            operands = [*values[num_test:start], *carry]
            return tested(*self.carried(state, body, operands, self.within(at, 1)))

        first = tested(values[start:], self.state)
        _, carry, self.state = lax.while_loop(lambda loop: loop[0], step, first)
        return carry

    def cond(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a cond or a switch: another one."""

        def branch(number: int, body: compat.Body) -> Any:
            return lambda state, *operands: self.carried(
                state, body, operands, self.within(at, number)
            )

        branches = [branch(i, compat.body(b)) for i, b in enumerate(eqn.params["branches"])]
        results, self.state = lax.switch(values[0], branches, self.state, *values[1:])
        return results

    def carried(
        self, state: Any, body: compat.Body, values: Sequence[Any], where: Any
    ) -> tuple[list[Any], Any]:
        """The results of a jaxpr that starts in a state, and the state after it."""
        outside, self.state = self.state, state
        try:
            results = self.run(body, values, where)
            return results, self.state
        finally:
            self.state = outside


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    # Equation number -> variables to forget after it.
    last: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        last.update({v: number for v in (*eqn.invars, *eqn.outvars) if not compat.is_literal(v)})
    for v in jaxpr.outvars:
        if not compat.is_literal(v):
            last.pop(v, None)
    uses: dict[int, list[Any]] = {}
    for v, number in last.items():
        uses.setdefault(number, []).append(v)
    return uses
