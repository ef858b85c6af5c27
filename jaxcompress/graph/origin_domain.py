"""Follows origins through a jaxpr and all jaxprs inside it, and collects the contractions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcompress.graph import compat, provenance
from jaxcompress.graph.interpret import Domain
from jaxcompress.graph.primitives import row
from jaxcompress.graph.primitives.table import FOREIGN
from jaxcompress.graph.provenance import Origin

Place = tuple[int, ...]  # equation number, body number, equation number, ...


class Where(NamedTuple):
    """Where in the program an equation is."""

    place: Place = ()
    scope: str = ""  # name stack joined over all callers
    loops: tuple[int, ...] = ()
    branches: tuple[tuple[Place, int], ...] = ()
    in_while: bool = False
    unentered: str = ""  # the call that `walk` cannot enter
    given: frozenset[str] = frozenset()  # parameters that this call was given

    def equation(self, number: int, eqn: Any) -> "Where":
        """The place of an equation of this jaxpr."""
        scope = "/".join(part for part in (self.scope, compat.scope(eqn)) if part)
        return self._replace(place=(*self.place, number), scope=scope)

    def body(self, number: int = 0) -> "Where":
        """The place of a jaxpr of this equation."""
        return self._replace(place=(*self.place, number))


class Found(NamedTuple):
    """A contraction, or a call that may hold some."""

    eqn: Any
    origins: tuple[Origin, Origin]
    active: tuple[bool, bool]  # which operands are activations
    place: Place
    scope: str
    loops: tuple[int, ...]
    branches: tuple[tuple[Place, int], ...]
    in_while: bool
    unentered: str
    given: frozenset[str]


class Findings(NamedTuple):
    """What was seen on the way.

    Attributes:
      contractions: in order of execution.
      arguments: place of a jaxpr -> origins of its arguments, in all trips of a loop.
      results: place of an equation -> origins of its results.
    """

    contractions: list[Found]
    arguments: dict[Place, list[Origin]]
    results: dict[Place, list[Origin]]


def follow(body: compat.Body, origins: Sequence[Origin]) -> tuple[list[Origin], Findings]:
    """The origins of a jaxpr's results, and what is seen on the way."""
    origin = _Origins()
    results = origin.run(body, origins, Where())
    return results, origin.found


class _Origins(Domain):
    """Follows origins; what it cannot enter is looked at, but `walk` cannot change it."""

    def __init__(self):
        self.found = Findings([], {}, {})

    def literal(self, v: Any) -> Origin:
        """Made of nothing."""
        return provenance.constant(v.aval)

    def constant(self, v: Any, x: Any) -> Origin:
        """Made of nothing."""
        del x
        return provenance.constant(v.aval)

    def argument(self, v: Any, value: Origin) -> Origin:
        """May be a slice."""
        return value.within(v.aval)

    def at(self, where: Where, number: int, eqn: Any) -> Where:
        """With the name stack of all callers."""
        return where.equation(number, eqn)

    def within(self, at: Where, number: int, eqn: Any) -> Where:
        """With the loops and branches around it."""
        name = eqn.primitive.name
        if name == "scan":
            return at.body(number)._replace(loops=(*at.loops, eqn.params["length"]))
        if name == "while":
            return at.body(number)._replace(in_while=True)
        if name == "cond":
            return at.body(number)._replace(branches=(*at.branches, (at.place, number)))
        return at.body(number)

    def run(self, body: compat.Body, values: Sequence[Origin], where: Any = ()) -> list[Origin]:
        """Notes the arguments of every jaxpr."""
        if self.record:
            self.found.arguments[where.place] = list(values)
        return super().run(body, values, where)

    def enter(self, eqn: Any, values: list[Origin], at: Where) -> Sequence[Origin]:
        """Notes the results of every equation."""
        return self._noted(at, super().enter(eqn, values, at))

    def equation(self, eqn: Any, values: list[Origin], at: Where) -> Sequence[Origin]:
        """Notes contractions, and what may hold some."""
        name = eqn.primitive.name
        if row(name).kind == "identity":
            return self._noted(at, values)
        if row(name).kind != "contract":
            return self._noted(at, self._other(eqn, values, at))
        lhs, rhs, *sizes = values
        active, result = provenance.contract(lhs, rhs, eqn.outvars[0].aval)
        if sizes and sizes[0].moves and not any(active):  # rows of parameters, chosen by inputs
            active, result = (True, False), provenance.data(eqn.outvars[0].aval)
        self._contraction(eqn, (lhs, rhs), active, at)
        return self._noted(at, [result])

    def _noted(self, at: Where, results: Sequence[Origin]) -> Sequence[Origin]:
        if self.record:
            self.found.results[at.place] = list(results)
        return results

    def _contraction(self, eqn: Any, origins: Any, active: Any, at: Where) -> None:
        if self.record:
            self.found.contractions.append(Found(eqn, origins, active, *at))

    def _other(self, eqn: Any, origins: list[Origin], at: Where) -> list[Origin]:
        # Any other primitive.
        name = eqn.primitive.name
        unentered = at.unentered or (f"{name} at {at.scope!r}" if at.scope else name)
        given = at.given.union(*(o.params for o in origins))
        inside = at._replace(unentered=unentered, given=given)
        if name in FOREIGN:
            weights = [o for o in origins if not o.data]
            made = provenance.made_of(weights, eqn.invars[0].aval) if weights else Origin()
            self._contraction(eqn, (made, Origin(data=True)), (False, True), inside)
        for number, body in enumerate(compat.bodies(eqn.params)):
            matched = len(body.jaxpr.invars) == len(origins)
            operands = origins if matched else [provenance.data(v.aval) for v in body.jaxpr.invars]
            self.run(body, operands, inside.body(number))
        return [provenance.through(name, origins, v.aval) for v in eqn.outvars]

    def join(self, values: Sequence[Origin], v: Any) -> Origin:
        """Made of what any of them is made of."""
        joined = values[0]
        for more in values[1:]:
            joined = provenance.join(joined, more, v.aval)
        return joined

    def stacked(self, value: Origin, v: Any) -> Origin:
        """Of all trips."""
        return provenance.data(v.aval) if value.data else provenance.made_of([value], v.aval)

    def chosen(self, value: Origin, by: Origin, v: Any) -> Origin:
        """Mixed, if the choice depends on inputs."""
        return provenance.chosen(value, by, v.aval)
