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
from jaxcompress.graph.interpret import Interpreter


class Evaluator(Interpreter):
    """Evaluates jaxprs; what a subclass does not say is as JAX does it.

    A subclass says which equations are entered (`enters`: none by default) and what the others do
    (`equation`). Values may be any pytrees of arrays where loops are entered, and anything
    elsewhere.

    Attributes:
      state: a pytree of arrays that is carried along. Outside a scan it has an axis in front for
        its trips, a `while` carries it from trip to trip, a `cond` leaves what another branch does
        alone; so a subclass may set it anywhere.
      keeps: names of the calls that stay around what they hold: `compat.JIT`, `compat.REMAT`.
    """

    state: Any = ()
    keeps: frozenset[str] = frozenset()

    def enters(self, eqn: Any, at: Any) -> bool:
        """Whether the jaxprs of an equation are evaluated here too."""
        del eqn, at
        return False

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation that is not entered."""
        del at
        return compat.evaluate(eqn, values)

    def literal(self, v: Any) -> Any:
        """The number itself."""
        return v.val

    def constant(self, v: Any, x: Any) -> Any:
        """The array itself."""
        del v
        return x

    def enter(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation by those of its jaxprs."""
        with compat.surroundings(eqn):
            return super().enter(eqn, values, at)

    def call(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of `jit` and `checkpoint` where they stay: another one."""
        if eqn.primitive.name not in self.keeps:
            return super().call(eqn, values, at)

        def inner(state: Any, *values: Any) -> tuple[list[Any], Any]:
            return self.from_state(state, compat.call_body(eqn), values, self.within(at, 0, eqn))

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
            results, state = self.from_state(state, body, operands, self.within(at, 0, eqn))
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
            (going_on,), state = self.from_state(state, test, operands, self.within(at, 0, eqn))
            return going_on, carry, state

        def step(loop: Any) -> Any:
            _, carry, state = loop
            operands = [*values[num_test:start], *carry]
            return tested(*self.from_state(state, body, operands, self.within(at, 1, eqn)))

        first = tested(values[start:], self.state)
        _, carry, self.state = lax.while_loop(lambda loop: loop[0], step, first)
        return carry

    def cond(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a cond or a switch: another one."""

        def branch(number: int, body: compat.Body) -> Any:
            return lambda state, *operands: self.from_state(
                state, body, operands, self.within(at, number, eqn)
            )

        branches = [branch(i, compat.body(b)) for i, b in enumerate(eqn.params["branches"])]
        results, self.state = lax.switch(values[0], branches, self.state, *values[1:])
        return results

    def from_state(
        self, state: Any, body: compat.Body, values: Sequence[Any], where: Any
    ) -> tuple[list[Any], Any]:
        """The results of a jaxpr that starts in a state, and the state after it."""
        outside, self.state = self.state, state
        try:
            results = self.run(body, values, where)
            return results, self.state
        finally:
            self.state = outside
