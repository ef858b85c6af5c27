"""Evaluates a function again and lets a visitor see or change what enters its contractions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from jaxcompress.core.meshes import on_any_mesh
from jaxcompress.graph import compat
from jaxcompress.graph.checks import check_answer, check_states
from jaxcompress.graph.custom import keep_rule
from jaxcompress.graph.follow import Place
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.trace import Program, trace_program

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
        walker = _Walker(program, visit, around, frozenset(states))
        values = jax.tree.leaves((params, *inputs))
        results, new_states = walker.run(main, values, dict(states), ())
        return jax.tree.unflatten(jax.tree.structure(program.graph.out), results), new_states

    return walked


class _Walker:
    """Evaluates jaxprs; enters those that hold a visited tap, leaves all other code as it is."""

    def __init__(
        self, program: Program, visit: Visit, around: Around | None, names: frozenset[str]
    ):
        # The network runs on its mesh as its author wrote it, what visitors compute anywhere.
        self.visit, self.around = on_any_mesh(visit, like=lambda tap, *seen: seen), around
        self.taps: dict[Place, list[Tap]] = {}
        self.inside: dict[Place, list[str]] = {}  # names of the visited taps under a place
        for place, taps in program.places.items():
            chosen = [tap for tap in taps if tap.name in names]
            if chosen:
                self.taps[place] = chosen
            for depth in range(1, len(place)):
                self.inside.setdefault(place[:depth], []).extend(tap.name for tap in chosen)
        self.inside = {place: found for place, found in self.inside.items() if found}

    def run(
        self, body: compat.Body, values: Sequence[Any], states: States, place: Place
    ) -> tuple[list[Any], States]:
        """The results of a jaxpr, and the states after it."""
        jaxpr, states = body.jaxpr, dict(states)
        known = dict(zip(jaxpr.constvars, body.consts, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        last = _last_uses(jaxpr)

        def read(v):
            return v.val if compat.is_literal(v) else known[v]

        for number, eqn in enumerate(jaxpr.eqns):
            here, operands = (*place, number), [read(v) for v in eqn.invars]
            if here in self.inside:
                inner = {name: states[name] for name in self.inside[here]}
                with compat.surroundings(eqn):
                    results, inner = self._enter(eqn, operands, inner, here)
                states.update(inner)
            else:
                taps = self.taps.get(here, ())
                for tap in taps:
                    x = operands[tap.operand]
                    if tap.site.primitive == compat.RAGGED:
                        tap = dataclasses.replace(tap, sizes=operands[2])
                    operands[tap.operand], states[tap.name] = self._see(tap, x, states[tap.name])
                compute = functools.partial(compat.evaluate, eqn)
                if taps and self.around is not None:
                    name = taps[0].name
                    answer = self.around(taps[0], compute, operands, states[name])
                    results, states[name] = answer
                else:
                    results = compute(operands)
            known.update(zip(eqn.outvars, results, strict=True))
            for v in last.get(number, ()):
                known.pop(v, None)
        return [read(v) for v in jaxpr.outvars], states

    def _see(self, tap: Tap, x: Any, state: Any) -> tuple[Any, Any]:
        answer = self.visit(tap, x, state)
        check_answer(tap, x, state, answer=answer)
        return answer

    def _enter(
        self, eqn: Any, values: list[Any], states: States, here: Place
    ) -> tuple[list[Any], States]:
        name = eqn.primitive.name
        if name in compat.CALL:
            return self.run(compat.call_body(eqn), values, states, (*here, 0))
        if name in compat.JIT | compat.REMAT:
            return self._call(eqn, values, states, here)
        if name in compat.CUSTOM:
            body = compat.call_body(eqn)
            return keep_rule(eqn, values, states, lambda s, *v: self.run(body, v, s, (*here, 0)))
        special = {"scan": self._scan, "while": self._while, "cond": self._cond}
        return special[name](eqn, values, states, here)

    def _call(self, eqn, values, states, here):
        body = compat.call_body(eqn)

        def inner(states, *values):
            return self.run(body, values, states, (*here, 0))

        if eqn.primitive.name in compat.REMAT:
            call = jax.checkpoint(inner, **compat.remat_options(eqn.params))
        else:
            inner.__name__ = eqn.params["name"]
            call = jax.jit(inner, **compat.jit_options(eqn.params))
        return call(states, *values)

    def _scan(self, eqn, values, states, here):
        body, params = compat.body(eqn.params["jaxpr"]), eqn.params
        num_consts, num_carry = compat.scan_sizes(params)
        fixed, carry = values[:num_consts], values[num_consts : num_consts + num_carry]

        def step(carry, row):
            states, xs = row
            results, states = self.run(body, [*fixed, *carry, *xs], states, (*here, 0))
            return results[:num_carry], (results[num_carry:], states)

        rows = (states, values[num_consts + num_carry :])
        carry, (ys, states) = lax.scan(
            step,
            carry,
            rows,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys], states

    def _while(self, eqn, values, states, here):
        test, step = (compat.body(eqn.params[key]) for key in ("cond_jaxpr", "body_jaxpr"))
        num_test, num_fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test_fixed, fixed = values[:num_test], values[num_test : num_test + num_fixed]
        start = values[num_test + num_fixed :]

        # The test updates states too, so its answer is part of the carry.
        def tested(carry, states):
            (going_on,), states = self.run(test, [*test_fixed, *carry], states, (*here, 0))
            return going_on, carry, states

        def body(loop):
            _, carry, states = loop
            carry, states = self.run(step, [*fixed, *carry], states, (*here, 1))
            return tested(carry, states)

        _, carry, states = lax.while_loop(lambda loop: loop[0], body, tested(start, states))
        return carry, states

    def _cond(self, eqn, values, states, here):
        index, *operands = values

        def branch(number, body):
            return lambda states, *operands: self.run(body, operands, states, (*here, number))

        branches = [branch(i, compat.body(b)) for i, b in enumerate(eqn.params["branches"])]
        return lax.switch(index, branches, states, *operands)


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    # Equation number -> variables to forget after it, so that eager evaluation frees memory.
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
