"""Follows origins through a jaxpr and all jaxprs inside it, and collects the contractions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcompress.graph import compat, flow
from jaxcompress.graph.flow import Origin

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


Sink = Findings | None  # None while a loop is followed only to find its fixed point


def follow(
    jaxpr: Any, origins: Sequence[Origin], found: Sink, *, where: Where | None = None
) -> list[Origin]:
    """The origins of a jaxpr's results; what is seen is added to `found`."""
    where = where or Where()
    if found is not None:
        found.arguments[where.place] = list(origins)
    known = {v: flow.constant(v.aval) for v in jaxpr.constvars}
    known.update((v, o.within(v.aval)) for v, o in zip(jaxpr.invars, origins, strict=True))

    def read(v):
        return flow.constant(v.aval) if compat.is_literal(v) else known[v]

    for number, eqn in enumerate(jaxpr.eqns):
        here = where.equation(number, eqn)
        results = _equation(eqn, [read(v) for v in eqn.invars], here, found)
        if found is not None:
            found.results[here.place] = results
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, origins: list[Origin], here: Where, found: Sink) -> list[Origin]:
    name = eqn.primitive.name
    if name in compat.CONTRACTIONS:
        lhs, rhs, *sizes = origins
        active, result = flow.contract(lhs, rhs, eqn.outvars[0].aval)
        if sizes and sizes[0].moves and not any(active):  # rows of parameters, chosen by inputs
            active, result = (True, False), flow.data(eqn.outvars[0].aval)
        _record(found, here, eqn, origins=(lhs, rhs), active=active)
        return [result]
    if name in compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM:
        return follow(compat.call_body(eqn).jaxpr, origins, found, where=here.body())
    if name == "optimization_barrier":
        return origins
    special = {"scan": _scan, "while": _while, "cond": _cond}.get(name, _other)
    return special(eqn, origins, here, found)


def _record(found: Sink, here: Where, eqn: Any, *, origins, active) -> None:
    if found is not None:
        found.contractions.append(Found(eqn, origins, active, *here))


def _fixed_point(
    jaxpr: Any, origins: list[Origin], slots: range, here: Where
) -> tuple[list[Origin], list[Origin]]:
    # The operands of a loop body in all trips, and its results: the carry (the operands in `slots`,
    # the first results) may come from the start or from an earlier trip. It only rises, so it ends.
    while True:
        results = follow(jaxpr, origins, None, where=here)
        again = list(origins)
        for result, slot in zip(results, slots, strict=False):
            again[slot] = flow.join(origins[slot], result, jaxpr.invars[slot].aval)
        if again == origins:
            return origins, results
        origins = again


def _scan(eqn: Any, origins: list[Origin], here: Where, found: Sink) -> list[Origin]:
    jaxpr = compat.body(eqn.params["jaxpr"]).jaxpr
    num_consts, num_carry = compat.scan_sizes(eqn.params)
    inside = here.body()._replace(loops=(*here.loops, eqn.params["length"]))
    start = [o.within(v.aval) for o, v in zip(origins, jaxpr.invars, strict=True)]
    slots = range(num_consts, num_consts + num_carry)
    operands, results = _fixed_point(jaxpr, start, slots, inside)
    follow(jaxpr, operands, found, where=inside)
    rows = zip(results[num_carry:], eqn.outvars[num_carry:], strict=True)
    return [
        *(operands[slot] for slot in slots),
        *(flow.data(v.aval) if o.data else flow.made_of([o], v.aval) for o, v in rows),
    ]


def _while(eqn: Any, origins: list[Origin], here: Where, found: Sink) -> list[Origin]:
    test, step = (compat.body(eqn.params[key]).jaxpr for key in ("cond_jaxpr", "body_jaxpr"))
    num_test, num_step = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts = origins[:num_test]
    here = here._replace(in_while=True)
    start = [o.within(v.aval) for o, v in zip(origins[num_test:], step.invars, strict=True)]
    slots = range(num_step, len(start))
    operands, _ = _fixed_point(step, start, slots, here.body(1))
    carry = operands[num_step:]
    (going_on,) = follow(test, [*test_consts, *carry], found, where=here.body(0))
    follow(step, operands, found, where=here.body(1))
    return [flow.chosen(o, going_on, v.aval) for o, v in zip(carry, eqn.outvars, strict=True)]


def _cond(eqn: Any, origins: list[Origin], here: Where, found: Sink) -> list[Origin]:
    index, *operands = origins
    results: list[list[Origin]] = []
    for number, branch in enumerate(eqn.params["branches"]):
        inside = here.body(number)._replace(branches=(*here.branches, (here.place, number)))
        results.append(follow(compat.body(branch).jaxpr, operands, found, where=inside))
    joined = results[0]
    for more in results[1:]:
        joined = [
            flow.join(a, b, v.aval) for a, b, v in zip(joined, more, eqn.outvars, strict=True)
        ]
    return [flow.chosen(o, index, v.aval) for o, v in zip(joined, eqn.outvars, strict=True)]


def _other(eqn: Any, origins: list[Origin], here: Where, found: Sink) -> list[Origin]:
    # Any other primitive. What it holds is looked at, but `walk` cannot change it.
    name = eqn.primitive.name
    unentered = here.unentered or (f"{name} at {here.scope!r}" if here.scope else name)
    given = here.given.union(*(o.params for o in origins))
    inside = here._replace(unentered=unentered, given=given)
    if name in compat.OPAQUE:
        weights = [o for o in origins if not o.data]
        pair = flow.made_of(weights, eqn.invars[0].aval) if weights else Origin(), Origin(data=True)
        _record(found, inside, eqn, origins=pair, active=(False, True))
    for number, body in enumerate(compat.bodies(eqn.params)):
        matched = len(body.jaxpr.invars) == len(origins)
        operands = origins if matched else [flow.data(v.aval) for v in body.jaxpr.invars]
        follow(body.jaxpr, operands, found, where=inside.body(number))
    return [flow.through(name, origins, v.aval) for v in eqn.outvars]
