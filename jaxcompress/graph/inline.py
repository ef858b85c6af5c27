"""The program as one flat list of operations: calls inlined, loops once between two marks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcompress.graph import compat
from jaxcompress.graph.flow import Origin
from jaxcompress.graph.follow import Place, Where
from jaxcompress.graph.trace import Program

LOOP, END = "loop", "loop_end"
"""Names of the marks around the body of a loop.

`LOOP` takes all that the loop takes, and gives the carry and the rows inside its body, then the
stacked results; `END` takes constants and rows and what the body gives, and gives the final carry.
"""

Trips = int | Mapping[str, int] | None
Operand = Any  # the number of a value, or a literal


class Value(NamedTuple):
    """An array of the program: shape and dtype (of one pass, inside a loop), and its origin."""

    aval: Any
    origin: Origin


class Op(NamedTuple):
    """One operation.

    Attributes:
      primitive: name of the primitive, `LOOP` or `END`.
      eqn: its equation.
      operands: numbers of its values, None for numbers in the program itself (literals).
      outputs: numbers of its results.
      times: how often it runs: trips of the loops around it, multiplied.
      scope: name stack, joined over callers.
      place: where it is in the jaxpr, as in `trace.Program`.
      region: places of the loops around it.
      constants: the literals by position, those handed to calls around it too.
    """

    primitive: str
    eqn: Any
    operands: tuple[int | None, ...]
    outputs: tuple[int, ...]
    times: int
    scope: str
    place: Place
    region: tuple[Place, ...]
    constants: Mapping[int, Any]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The operands without literals."""
        return tuple(n for n in self.operands if n is not None)


class Inlined(NamedTuple):
    """A program as a list.

    Attributes:
      ops: in order of execution; of a `cond` only the branch that weighs most, or all of them.
      values: all arrays by number.
      inputs: numbers of the arguments that are no parameters.
      outputs: numbers of the results.
      tests: numbers of the tests of `while` loops, on which depends how often they run.
      assumed_trips: scopes of the loops of unknown length for which no number of trips was given.
      choices: scopes of the conditionals.
    """

    ops: tuple[Op, ...]
    values: dict[int, Value]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tests: tuple[int, ...]
    assumed_trips: tuple[str, ...]
    choices: tuple[str, ...]


Weigh = Callable[[list[Op]], Any]


def inline(program: Program, *, weigh: Weigh | None, trips: Trips = None) -> Inlined:
    """The operations of a traced program.

    Args:
      program: what `trace_program` gave.
      weigh: weight of a list of operations; decides which branch of a `cond` stands for it. None:
        all branches are listed, and then a "cond" that takes the results of all of them.
      trips: how often `while` loops of unknown length run: for all, or by scope ("decode/while");
        1 if it is not given.

    Raises:
      ValueError: trips of a loop that is not there, or that are no positive integer.
    """
    jaxpr = program.closed.jaxpr
    inliner = _Inliner(program, weigh, trips)
    origins = program.found.arguments[()]
    arguments = [inliner.value(v.aval, o) for v, o in zip(jaxpr.invars, origins, strict=True)]
    results = inliner.run(jaxpr, arguments, Where(), 1, region=())
    inliner.check_trips()
    return Inlined(
        tuple(inliner.ops),
        inliner.values,
        tuple(arguments[len(program.graph.params) :]),
        tuple(n for n in results if isinstance(n, int)),
        tuple(inliner.tests),
        tuple(inliner.assumed),
        tuple(inliner.choices),
    )


def carried(loop: Op) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The carry and the rows of a `LOOP` mark: as they enter it, and as its body sees them."""
    inside = loop.outputs[: len(loop.outputs) - _stacked(loop.eqn)]
    return loop.operands[len(loop.operands) - len(inside) :], inside


def rows(loop: Op) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Of these, what a scan takes row by row."""
    entering, inside = carried(loop)
    carry = len(loop.eqn.outvars) - _stacked(loop.eqn)
    return entering[carry:], inside[carry:]


def _stacked(eqn: Any) -> int:
    # How many results are collected trip by trip.
    if eqn.primitive.name != "scan":
        return 0
    return len(eqn.outvars) - compat.scan_sizes(eqn.params)[1]


class _Inliner:
    """Numbers values and collects operations while it goes through a jaxpr."""

    def __init__(self, program: Program, weigh: Weigh | None, trips: Trips):
        self.found, self.weigh, self.trips = program.found, weigh, trips
        self.ops: list[Op] = []
        self.values: dict[int, Value] = {}
        self.assumed: list[str] = []
        self.loops: list[str] = []
        self.choices: list[str] = []
        self.tests: list[int] = []

    def value(self, aval: Any, origin: Origin) -> int:
        """The number of a new value."""
        number = len(self.values)
        self.values[number] = Value(aval, origin)
        return number

    def check_trips(self) -> None:
        """Raises ValueError unless `trips` are positive integers of loops that were met."""
        given = self.trips if isinstance(self.trips, Mapping) else {None: self.trips}
        for scope, n in given.items():
            if scope is not None and scope not in self.loops:
                known = ", ".join(map(repr, self.loops)) or "there are none"
                raise ValueError(f"trips: {scope!r} is no loop of unknown length; known: {known}")
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise ValueError(f"trips: must be integers from 1, got {n!r}")

    def run(
        self, jaxpr: Any, arguments: Sequence[Operand], where: Where, times: int, *, region
    ) -> list[Operand]:
        """Collects the operations of a jaxpr; the numbers of its results."""
        known: dict[Any, Operand] = {}
        for v in jaxpr.constvars:
            known[v] = self.value(v.aval, Origin())
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(v):
            return v if compat.is_literal(v) else known[v]

        for number, eqn in enumerate(jaxpr.eqns):
            call = _Call(
                eqn, [read(v) for v in eqn.invars], where.equation(number, eqn), times, region
            )
            known.update(zip(eqn.outvars, self._equation(call), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, call: "_Call") -> Sequence[Operand]:
        name = call.eqn.primitive.name
        if name in compat.JIT | compat.CALL | compat.REMAT | compat.CUSTOM:
            inner = compat.call_body(call.eqn).jaxpr
            return self.run(inner, call.operands, call.where.body(), call.times, region=call.region)
        if name == "shard_map":  # shapes are those of one device
            inner, devices = (
                compat.body(call.eqn.params["jaxpr"]).jaxpr,
                call.eqn.params["mesh"].size,
            )
            times = call.times * devices
            return self.run(inner, call.operands, call.where.body(), times, region=call.region)
        if name == "custom_linear_solve":
            number, solver, consts = compat.linear_solve(call.eqn)
            constants = call.operands[consts]
            sides = call.operands[len(call.operands) - len(solver.jaxpr.invars) + len(constants) :]
            inside = call.where.body(number)
            operands = [*constants, *sides]
            return self.run(solver.jaxpr, operands, inside, call.times, region=call.region)
        special = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        if special is not None:
            return special(call)
        origins = self.found.results[call.where.place]
        return self._emit(call, name, call.operands, call.results(origins))

    def _emit(self, call, name, operands, results) -> list[int]:
        outputs = [self.value(aval, origin) for aval, origin in results]
        where = call.where
        self.ops.append(
            Op(
                name,
                call.eqn,
                tuple(None if compat.is_literal(n) else n for n in operands),
                tuple(outputs),
                call.times,
                where.scope,
                where.place,
                call.region,
                {port: n.val for port, n in enumerate(operands) if compat.is_literal(n)},
            )
        )
        return outputs

    def _loop(self, call, *, bodies, n_carry, length) -> list[int]:
        # `bodies`: number of the jaxpr, the jaxpr, its constants; the last one gives the carry.
        number, main, consts = bodies[-1]
        n_inner = len(main.invars) - len(consts)
        entering = self.found.arguments[(*call.where.place, number)][len(consts) :]
        results = call.results(self.found.results[call.where.place])
        inner = zip([v.aval for v in main.invars[len(consts) :]], entering, strict=True)
        marks = self._emit(call, LOOP, call.operands, [*inner, *results[n_carry:]])
        given: Sequence[Operand] = ()
        for number, jaxpr, constants in bodies:
            given = self.run(
                jaxpr,
                [*constants, *marks[:n_inner]],
                call.where.body(number),
                call.times * length,
                region=(*call.region, call.where.place),
            )
            if jaxpr is not main:
                self.tests += [n for n in given if isinstance(n, int)]
        start = len(call.operands) - n_inner  # the first carry is not needed to the end
        kept = [*call.operands[:start], *call.operands[start + n_carry :]]
        ends = self._emit(call, END, [*kept, *given], results[:n_carry])
        return [*ends, *marks[n_inner:]]

    def _scan(self, call: "_Call") -> list[int]:
        params = call.eqn.params
        n_consts, n_carry = compat.scan_sizes(params)
        body = (0, compat.body(params["jaxpr"]).jaxpr, call.operands[:n_consts])
        return self._loop(call, bodies=[body], n_carry=n_carry, length=params["length"])

    def _while(self, call: "_Call") -> list[int]:
        params, scope = call.eqn.params, "/".join(filter(None, (call.where.scope, "while")))
        trips = self.trips.get(scope) if isinstance(self.trips, Mapping) else self.trips
        self.loops.append(scope)
        if trips is None:
            self.assumed.append(scope)
        n_test, n_step = params["cond_nconsts"], params["body_nconsts"]
        test = (0, compat.body(params["cond_jaxpr"]).jaxpr, call.operands[:n_test])
        step = (1, compat.body(params["body_jaxpr"]).jaxpr, call.operands[n_test : n_test + n_step])
        n_carry = len(call.eqn.outvars)
        return self._loop(call, bodies=[test, step], n_carry=n_carry, length=trips or 1)

    def _cond(self, call: "_Call") -> Sequence[Operand]:
        before, branches = self.ops, []
        for number, branch in enumerate(call.eqn.params["branches"]):
            self.ops = []
            results = self.run(
                compat.body(branch).jaxpr,
                call.operands[1:],
                call.where.body(number),
                call.times,
                region=call.region,
            )
            branches.append((self.ops, results))
        self.choices.append("/".join(filter(None, (call.where.scope, "cond"))))
        if self.weigh is None:
            self.ops = [*before, *(op for ops, _ in branches for op in ops)]
            operands = [call.operands[0], *(n for _, results in branches for n in results)]
            origins = self.found.results[call.where.place]
            return self._emit(call, "cond", operands, call.results(origins))
        weights = [self.weigh(ops) for ops, _ in branches]
        ops, results = branches[weights.index(max(weights))]
        self.ops = [*before, *ops]
        return results


class _Call(NamedTuple):
    """An equation with the values it is given, and where it is."""

    eqn: Any
    operands: list[Operand]
    where: Where
    times: int
    region: tuple[Place, ...]

    def results(self, origins: Sequence[Origin]) -> list[tuple[Any, Origin]]:
        """Shape and origin of every result."""
        return [(v.aval, o) for v, o in zip(self.eqn.outvars, origins, strict=True)]
