"""The program as one flat list of operations: calls inlined, loops once between two marks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcompress.graph import compat
from jaxcompress.graph.interpret import Interpreter
from jaxcompress.graph.origin_domain import Place, Where
from jaxcompress.graph.provenance import Origin
from jaxcompress.graph.tracing import Program

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
    results = inliner.run(compat.body(program.closed), arguments, _At())
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


class _At(NamedTuple):
    """Where a jaxpr or an equation is, how often it runs, and in which loops."""

    where: Where = Where()
    times: int = 1
    region: tuple[Place, ...] = ()


class _Inliner(Interpreter):
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

    def literal(self, v: Any) -> Operand:
        """Itself: it has no number."""
        return v

    def constant(self, v: Any, x: Any) -> Operand:
        """A new value."""
        del x
        return self.value(v.aval, Origin())

    def at(self, where: _At, number: int, eqn: Any) -> _At:
        """The place of the equation."""
        return where._replace(where=where.where.equation(number, eqn))

    def within(self, at: _At, number: int, eqn: Any) -> _At:
        """The place of the jaxpr."""
        del eqn
        return at._replace(where=at.where.body(number))

    def enters(self, eqn: Any, at: _At) -> bool:
        """Also what each device does, and the solver of a linear solve."""
        return super().enters(eqn, at) or eqn.primitive.name in _OTHERS

    def enter(self, eqn: Any, values: list[Operand], at: _At) -> Sequence[Operand]:
        """Of these too."""
        if eqn.primitive.name == "shard_map":  # shapes are those of one device
            inside = self.within(at._replace(times=at.times * eqn.params["mesh"].size), 0, eqn)
            return self.run(compat.body(eqn.params["jaxpr"]), values, inside)
        if eqn.primitive.name == "custom_linear_solve":
            number, solver, consts = compat.linear_solve(eqn)
            constants = values[consts]
            sides = values[len(values) - len(solver.jaxpr.invars) + len(constants) :]
            return self.run(solver, [*constants, *sides], self.within(at, number, eqn))
        return super().enter(eqn, values, at)

    def equation(self, eqn: Any, values: list[Operand], at: _At) -> Sequence[Operand]:
        """One operation."""
        return self._emit(eqn.primitive.name, eqn, values, self._results(eqn, at), at)

    def _results(self, eqn: Any, at: _At) -> list[tuple[Any, Origin]]:
        origins = self.found.results[at.where.place]
        return [(v.aval, o) for v, o in zip(eqn.outvars, origins, strict=True)]

    def _emit(
        self,
        name: str,
        eqn: Any,
        operands: Sequence[Operand],
        results: Sequence[tuple[Any, Origin]],
        at: _At,
    ) -> list[int]:
        outputs = [self.value(aval, origin) for aval, origin in results]
        self.ops.append(
            Op(
                name,
                eqn,
                tuple(None if compat.is_literal(n) else n for n in operands),
                tuple(outputs),
                at.times,
                at.where.scope,
                at.where.place,
                at.region,
                {port: n.val for port, n in enumerate(operands) if compat.is_literal(n)},
            )
        )
        return outputs

    def _loop(
        self, eqn: Any, values: list[Operand], at: _At, *, bodies, n_carry: int, length: int
    ) -> list[int]:
        # `bodies`: number of the jaxpr, the jaxpr, its constants; the last one gives the carry.
        number, main, consts = bodies[-1]
        variables = main.jaxpr.invars[len(consts) :]
        entering = self.found.arguments[(*at.where.place, number)][len(consts) :]
        results = self._results(eqn, at)
        inner = zip([v.aval for v in variables], entering, strict=True)
        marks = self._emit(LOOP, eqn, values, [*inner, *results[n_carry:]], at)
        given: Sequence[Operand] = ()
        region = (*at.region, at.where.place)
        for number, body, constants in bodies:
            inside = self.within(at, number, eqn)
            inside = inside._replace(times=at.times * length, region=region)
            given = self.run(body, [*constants, *marks[: len(variables)]], inside)
            if body is not main:
                self.tests += [n for n in given if isinstance(n, int)]
        start = len(values) - len(variables)  # the first carry is not needed to the end
        kept = [*values[:start], *values[start + n_carry :]]
        ends = self._emit(END, eqn, [*kept, *given], results[:n_carry], at)
        return [*ends, *marks[len(variables) :]]

    def scan(self, eqn: Any, values: list[Operand], at: _At) -> Sequence[Operand]:
        """Its body once, between two marks."""
        n_consts, n_carry = compat.scan_sizes(eqn.params)
        body = (0, compat.body(eqn.params["jaxpr"]), values[:n_consts])
        length = eqn.params["length"]
        return self._loop(eqn, values, at, bodies=[body], n_carry=n_carry, length=length)

    def loop(self, eqn: Any, values: list[Operand], at: _At) -> Sequence[Operand]:
        """Its test and its body once, between two marks."""
        params, scope = eqn.params, "/".join(filter(None, (at.where.scope, "while")))
        trips = self.trips.get(scope) if isinstance(self.trips, Mapping) else self.trips
        self.loops.append(scope)
        if trips is None:
            self.assumed.append(scope)
        n_test, n_step = params["cond_nconsts"], params["body_nconsts"]
        test = (0, compat.body(params["cond_jaxpr"]), values[:n_test])
        step = (1, compat.body(params["body_jaxpr"]), values[n_test : n_test + n_step])
        n_carry = len(eqn.outvars)
        return self._loop(eqn, values, at, bodies=[test, step], n_carry=n_carry, length=trips or 1)

    def cond(self, eqn: Any, values: list[Operand], at: _At) -> Sequence[Operand]:
        """The branch that weighs most, or all."""
        before, branches = self.ops, []
        for number, branch in enumerate(eqn.params["branches"]):
            self.ops = []
            results = self.run(compat.body(branch), values[1:], self.within(at, number, eqn))
            branches.append((self.ops, results))
        self.choices.append("/".join(filter(None, (at.where.scope, "cond"))))
        if self.weigh is None:
            self.ops = [*before, *(op for ops, _ in branches for op in ops)]
            operands = [values[0], *(n for _, results in branches for n in results)]
            return self._emit("cond", eqn, operands, self._results(eqn, at), at)
        weights = [self.weigh(ops) for ops, _ in branches]
        ops, results = branches[weights.index(max(weights))]
        self.ops = [*before, *ops]
        return results


_OTHERS = frozenset(("shard_map", "custom_linear_solve"))
