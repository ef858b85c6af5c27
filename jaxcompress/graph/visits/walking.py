"""Evaluates a function again and lets a visitor see or change what enters its contractions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph import compat
from jaxcompress.graph.evaluate import Evaluator
from jaxcompress.graph.origin_domain import Place
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.tracing import Program, trace_program
from jaxcompress.graph.visits.custom_rules import keep_rule
from jaxcompress.graph.visits.visit_checks import check_answer, check_states

States = dict[str, Any]
Visit = Callable[[Tap, jax.Array, Any], tuple[jax.Array, Any]]
Compute = Callable[[list[Any]], list[Any]]
Around = Callable[[Tap, Compute, list[Any], Any], tuple[list[Any], Any]]


def walk(
    fn: Callable[..., Any], visit: Visit, *, around: Around | None = None
) -> Callable[..., tuple[Any, States]]:
    """`fn`, with a visitor at the activation operands of its contractions.

    Returns `walked(states, params, *inputs) -> (fn's results, states)`, a pure function for jit,
    grad, vmap and scan. `states` maps names of taps (`trace(fn, params, *inputs).taps`) to pytrees
    of arrays; only these taps are visited. With a visitor that changes nothing the results and
    gradients are those of `fn`, bit for bit, when both are compiled.

    `visit(tap, x, state) -> (x, state)` is called while tracing; it keeps the shapes and dtypes of
    both. Inside a scan it sees one trip: outside, the state has a leading axis for every enclosing
    scan (`tap.site.loops`), so every layer of a scanned stack has its own. A `cond` leaves the
    states of the other branch alone; a `while` carries states from trip to trip. In the body of a
    `custom_jvp` or `custom_vjp` function the author's derivative stays in force, at the function's
    own arguments: what a visitor does there has no gradient, and states are constants.

    `around(tap, compute, operands, state) -> (results, state)` takes the place of a contraction,
    after its taps were seen: it may give `compute(operands)`, or what it knows already. It is
    called with the first of the contraction's taps that is visited.

    Jit the walked function: it traces `fn` at every call.

    Raises:
      ValueError: (when called) a state whose name is no tap or whose tap cannot be reached; a state
        without the axes of the scans around it; a visitor that changes a shape, a dtype or the
        structure of its state; a gradient with respect to a state in a custom derivative.

    >>> import jax.numpy as jnp
    >>> fn = lambda params, x: x @ params["w"]
    >>> double = walk(fn, lambda tap, x, count: (2 * x, count + x.shape[0]))
    >>> params, x = {"w": jnp.eye(2)}, jnp.ones((3, 2))
    >>> out, states = double({"w": jnp.int32(0)}, params, x)
    >>> print(out[0], states["w"])
    [2. 2.] 3
    """

    def walked(states: Mapping[str, Any], params: Any, *inputs: Any) -> tuple[Any, States]:
        program = trace_program(fn, params, *inputs, shardings=True)
        check_states(states, program)
        main = compat.body(program.closed)
        walker = _Walker(program, visit, around, states)
        results = walker.run(main, jax.tree.leaves((params, *inputs)))
        return jax.tree.unflatten(jax.tree.structure(program.graph.out), results), walker.state

    return walked


class _Walker(Evaluator):
    """Enters jaxprs that hold a visited tap, leaves all other code as it is.

    Its state are the states of the taps that lie in the jaxpr at hand, by name.
    """

    keeps = compat.JIT | compat.REMAT

    def __init__(
        self, program: Program, visit: Visit, around: Around | None, states: Mapping[str, Any]
    ):
        # The network runs on its mesh as its author wrote it, what visitors compute anywhere.
        self.visit, self.around = on_any_mesh(visit, like=lambda tap, *seen: seen), around
        self.state = dict(states)
        self.taps: dict[Place, list[Tap]] = {}
        self.inside: dict[Place, list[str]] = {}  # names of the visited taps under a place
        for place, taps in program.places.items():
            chosen = [tap for tap in taps if tap.name in states]
            if chosen:
                self.taps[place] = chosen
            for depth in range(1, len(place)):
                self.inside.setdefault(place[:depth], []).extend(tap.name for tap in chosen)
        self.inside = {place: found for place, found in self.inside.items() if found}

    def enters(self, eqn: Any, at: Place) -> bool:
        """Only what holds a visited tap."""
        return at in self.inside

    def enter(self, eqn: Any, values: list[Any], at: Place) -> Sequence[Any]:
        """With the states of the taps inside alone."""
        states = self.state
        self.state = {name: states[name] for name in self.inside[at]}
        results = super().enter(eqn, values, at)
        self.state = {**states, **self.state}
        return results

    def custom(self, eqn: Any, values: list[Any], at: Place) -> Sequence[Any]:
        """The body is walked, the rule stays in force."""
        body, where = compat.call_body(eqn), self.within(at, 0, eqn)
        walked = lambda states, *values: self.from_state(states, body, values, where)
        results, self.state = keep_rule(eqn, values, self.state, walked)
        return results

    def equation(self, eqn: Any, values: list[Any], at: Place) -> Sequence[Any]:
        """Taps are visited on the way into an equation."""
        taps = self.taps.get(at, ())
        for tap in taps:
            x, state = values[tap.operand], self.state[tap.name]
            if tap.site.primitive == compat.RAGGED:
                tap = dataclasses.replace(tap, sizes=values[2])
            answer = self.visit(tap, x, state)
            check_answer(tap, x, state, answer=answer)
            values[tap.operand], self.state[tap.name] = answer
        compute = functools.partial(compat.evaluate, eqn)
        if not taps or self.around is None:
            return compute(values)
        name = taps[0].name
        results, self.state[name] = self.around(taps[0], compute, values, self.state[name])
        return results
