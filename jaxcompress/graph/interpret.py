"""The way through jaxprs: values of any kind go in, and control flow is written here.

`Interpreter` goes through the equations of a jaxpr in order and knows which jaxprs lie inside them.
There are two kinds. An `evaluate.Evaluator` computes arrays: its loops are JAX's loops. A `Domain`
follows what may be said of arrays without computing them (which parameters they are made of, which
axes belong together, where they are zero): its loops are fixed points, its branches are joined.
"""

from collections.abc import Sequence
from typing import Any

from jaxcompress.graph import compat

CALLS = compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM
ENTERED = CALLS | frozenset(("scan", "while", "cond"))
"""Primitives whose jaxprs can be entered."""


class Interpreter:
    """Goes through jaxprs; a subclass says what equations do.

    Where an equation is, is told by `where`: of a jaxpr what `run` was given, of an equation
    `at(where, number, eqn)`, of a jaxpr inside it `within(at, number, eqn)`. By default these are
    the numbers on the way to it. Jaxprs of an equation are numbered as `compat.bodies` gives them.
    """

    def enters(self, eqn: Any, at: Any) -> bool:
        """Whether the jaxprs of an equation are gone through."""
        del at
        return eqn.primitive.name in ENTERED

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation that is not entered."""
        raise NotImplementedError

    def literal(self, v: Any) -> Any:
        """The value of a number in the program."""
        raise NotImplementedError

    def constant(self, v: Any, x: Any) -> Any:
        """The value of a constant of a jaxpr: a variable, and the array."""
        raise NotImplementedError

    def argument(self, v: Any, value: Any) -> Any:
        """What the variable of a jaxpr makes of the value that it is given."""
        del v
        return value

    def at(self, where: Any, number: int, eqn: Any) -> Any:
        """Where an equation is."""
        del eqn
        return (*where, number)

    def within(self, at: Any, number: int, eqn: Any) -> Any:
        """Where a jaxpr of an equation is."""
        del eqn
        return (*at, number)

    def run(self, body: compat.Body, values: Sequence[Any], where: Any = ()) -> list[Any]:
        """The results of a jaxpr."""
        jaxpr = body.jaxpr
        pairs = zip(jaxpr.invars, values, strict=True)
        known = {v: self.argument(v, value) for v, value in pairs}
        consts = body.consts or (None,) * len(jaxpr.constvars)
        known.update((v, self.constant(v, x)) for v, x in zip(jaxpr.constvars, consts, strict=True))
        last = _last_uses(jaxpr)

        def read(v: Any) -> Any:
            return self.literal(v) if compat.is_literal(v) else known[v]

        for number, eqn in enumerate(jaxpr.eqns):
            at, operands = self.at(where, number, eqn), [read(v) for v in eqn.invars]
            step = self.enter if self.enters(eqn, at) else self.equation
            known.update(zip(eqn.outvars, step(eqn, operands, at), strict=True))
            for v in last.get(number, ()):  # so that eager evaluation frees memory
                known.pop(v, None)
        return [read(v) for v in jaxpr.outvars]

    def enter(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The results of an equation by those of its jaxprs."""
        name = eqn.primitive.name
        if name in compat.CUSTOM:
            return self.custom(eqn, values, at)
        if name in CALLS:
            return self.call(eqn, values, at)
        return {"scan": self.scan, "while": self.loop, "cond": self.cond}[name](eqn, values, at)

    def call(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a call: those of what is called."""
        return self.run(compat.call_body(eqn), values, self.within(at, 0, eqn))

    def custom(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a function with a derivative rule of its own: those of the function."""
        return self.run(compat.call_body(eqn), values, self.within(at, 0, eqn))

    def scan(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a scan."""
        raise NotImplementedError

    def loop(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a while."""
        raise NotImplementedError

    def cond(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Of a cond or a switch."""
        raise NotImplementedError


class Domain(Interpreter):
    """Follows what may be said of values; what is said may only get less from trip to trip.

    A loop is followed without `record` until what is said of its carry holds in all trips, then
    once more with it. So its end takes a lattice without infinite descents.

    Attributes:
      record: whether what is seen now is final.
    """

    record = True

    def join(self, values: Sequence[Any], v: Any) -> Any:
        """What may be said of a variable that is any of these."""
        raise NotImplementedError

    def same(self, one: Any, other: Any) -> bool:
        """Whether as much is said of one as of the other."""
        return one == other

    def row(self, value: Any, v: Any) -> Any:
        """What a trip of a scan sees of an operand that it takes row by row."""
        del v
        return value

    def stacked(self, value: Any, v: Any) -> Any:
        """A result of a scan, of one trip's part in it."""
        del v
        return value

    def chosen(self, value: Any, by: Any, v: Any) -> Any:
        """A result that a scalar decided about: a branch, or the end of a loop."""
        del by, v
        return value

    def carried(self, before: Sequence[Any], after: Sequence[Any]) -> None:
        """A carry as the last, recorded trip was given it, and as it gave it on."""

    def scan(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Rows are those of any trip."""
        body = compat.body(eqn.params["jaxpr"])
        n_consts, n_carry = compat.scan_sizes(eqn.params)
        start, where = n_consts + n_carry, self.within(at, 0, eqn)
        rows = zip(values[start:], body.jaxpr.invars[start:], strict=True)
        given = [*values[:start], *(self.row(x, v) for x, v in rows)]
        given = self.settled(body, given, range(n_consts, start), where)
        results = self.run(body, given, where)
        self.carried(given[n_consts:start], results[:n_carry])
        stacks = zip(results[n_carry:], eqn.outvars[n_carry:], strict=True)
        return [*given[n_consts:start], *(self.stacked(x, v) for x, v in stacks)]

    def loop(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """The test is followed before the body, on the carry of any trip."""
        test, body = (compat.body(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
        n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        where = self.within(at, 1, eqn)
        given = self.settled(body, values[n_test:], range(n_body, len(values) - n_test), where)
        carry = given[n_body:]
        (going_on,) = self.run(test, [*values[:n_test], *carry], self.within(at, 0, eqn))
        results = self.run(body, given, where)
        self.carried(carry, results)
        return [self.chosen(x, going_on, v) for x, v in zip(carry, eqn.outvars, strict=True)]

    def cond(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        """Any of the branches."""
        index, *operands = values
        branches = [
            self.run(compat.body(branch), operands, self.within(at, number, eqn))
            for number, branch in enumerate(eqn.params["branches"])
        ]
        joined = (self.join(of, v) for of, v in zip(_columns(branches), eqn.outvars, strict=True))
        return [self.chosen(x, index, v) for x, v in zip(joined, eqn.outvars, strict=True)]

    def settled(
        self, body: compat.Body, values: Sequence[Any], slots: range, where: Any
    ) -> list[Any]:
        """What a loop's body is given in all trips; its first results are the carry, in `slots`."""
        variables = body.jaxpr.invars
        pairs = zip(variables, values, strict=True)
        values = [self.argument(v, value) for v, value in pairs]
        recording, self.record = self.record, False
        try:
            while True:
                again, results = list(values), self.run(body, values, where)
                for slot, result in zip(slots, results, strict=False):
                    again[slot] = self.join([values[slot], result], variables[slot])
                if all(map(self.same, again, values)):
                    return values
                values = again
        finally:
            self.record = recording


def _columns(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True))


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
