"""Evaluates a program again on parameters of which channels were removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import compat
from jaxcompress.graph.axes import Axes
from jaxcompress.graph.axes_scopes import CALLS, Scope, Step, is_float
from jaxcompress.graph.axes_shapes import Terms
from jaxcompress.graph.axes_terms import Atom, Term, Whole, count, keep_of, resolve, size
from jaxcompress.graph.replay_means import renormalised
from jaxcompress.graph.replay_rules import Cut, resized

Kept = Mapping[Atom, np.ndarray]


def take(x: Any, terms: Terms, keep: Callable[[Term], Any]) -> Any:
    """The part of an array that stays, axis by axis."""
    for axis, term in enumerate(terms):
        stays = keep(term)
        if not stays.all():
            x = jnp.take(x, np.flatnonzero(stays), axis=axis)
    return x


def keeper(kept: Mapping[Atom, Any]) -> Callable[[Term], Any]:
    """Which indices of an axis stay, from those of some atoms; of the others all do."""

    def keep(term: Term) -> np.ndarray:
        return keep_of(term, lambda atom: kept.get(atom, np.ones(atom.size, bool)))

    return keep


def replay(axes: Axes, kept: Kept, *, renormalise: bool = False) -> Callable[..., Any]:
    """The traced function on smaller arrays, `small_fn(small_params, *inputs)`.

    Pure, for jit, grad, vmap and export. The first axis of the inputs may have another length than
    when it was traced, a symbol too (`jax.export`), unless the program contains that length: sums
    over it, or is of length 1.

    Args:
      axes: what `axes` found.
      kept: atom -> bool [size], of those of which something is removed.
      renormalise: whether means over cut axes divide by what is left, not by what was there.
    """
    program = axes.program
    keep = keeper(kept)
    shapes = {p: tuple(count(keep(t)) for t in ts) for p, ts in program.leaves.items()}

    def small_fn(params: Any, *inputs: Any) -> Any:
        _check(params, inputs, shapes=shapes, expected=program.inputs)
        leaves = jax.tree.leaves(inputs)
        every: dict[Atom, Any] = dict(kept)
        _rebind(every, program.scope.ins[len(shapes) :], leaves, inputs)
        runner = _Replay(keeper(every), renormalise)
        results = runner.run(program.scope, [*jax.tree.leaves(params), *leaves])
        return jax.tree.unflatten(jax.tree.structure(program.traced.graph.out), results)

    return small_fn


def _check(params: Any, inputs: Any, *, shapes: Mapping[str, Any], expected: Any) -> None:
    given = leaves_with_paths(params)
    if [path for path, _ in given] != list(shapes):
        raise ValueError(
            f"params: the small network takes the leaves {list(shapes)[:5]}..., got "
            f"{[path for path, _ in given][:5]}..."
        )
    for path, leaf in given:
        if jnp.shape(leaf) != shapes[path]:
            raise ValueError(
                f"params: {path!r} must have the shape {shapes[path]}, got {jnp.shape(leaf)}"
            )
    if jax.tree.structure(inputs) != jax.tree.structure(expected):
        raise ValueError(
            f"inputs: the structure must be {jax.tree.structure(expected)}, got "
            f"{jax.tree.structure(inputs)}"
        )


def _rebind(
    kept: dict[Atom, Any], terms: Sequence[Terms], leaves: Sequence[Any], inputs: Any
) -> None:
    # Enters new lengths of the inputs' first axes.
    for (path, _), axes, leaf in zip(leaves_with_paths(inputs), terms, leaves, strict=True):
        shape = jnp.shape(leaf)
        wanted = tuple(size(term) for term in axes)
        if len(shape) != len(wanted):
            raise ValueError(f"inputs: {path!r} must have {len(wanted)} axes, got {shape}")
        for axis, (term, n) in enumerate(zip(map(resolve, axes), shape, strict=True)):
            if isinstance(term, Atom) and not term.rigid:
                new = np.ones(n, bool) if isinstance(n, int) else Whole(n)
                good = kept.setdefault(term, new).size == n
            else:
                good = n == size(term)
            if not good:
                raise ValueError(
                    f"inputs: {path!r} has the shape {shape}, traced was {wanted}; axis {axis} "
                    "cannot have another length, trace again"
                )


class _Replay:
    """Evaluates jaxprs with new sizes."""

    def __init__(self, keep: Callable[[Term], Any], renormalise: bool):
        self.keep, self.renormalise = keep, renormalise

    def run(self, scope: Scope, values: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr."""
        jaxpr, consts = scope.body.jaxpr, scope.body.consts
        known = {
            v: take(x, terms, self.keep)
            for v, x, terms in zip(jaxpr.constvars, consts, scope.consts, strict=True)
        }
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(v):
            return v.val if compat.is_literal(v) else known[v]

        divided = renormalised(scope, self.keep) if self.renormalise else {}
        for place, step in enumerate(scope.steps):
            step = replace(step, eqn=divided[place]) if place in divided else step
            with compat.surroundings(step.eqn):
                results = self._step(step, [read(v) for v in step.eqn.invars])
            known.update(zip(step.eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _step(self, step: Step, values: list[Any]) -> Sequence[Any]:
        name = step.eqn.primitive.name
        if name in compat.REMAT:
            return self._remat(step, values)
        if name in CALLS:
            return self._call(step, values)
        special = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        if special is not None:
            return special(step, values)
        return self._evaluate(step, values)

    def _evaluate(self, step: Step, values: list[Any]) -> list[Any]:
        cut = Cut(step, self.keep, values)
        new = [cut.shape(i) for i in range(len(step.outs))]
        same = all(
            n == tuple(map(size, terms)) for n, terms in zip(new, step.outs, strict=True)
        ) and all(
            tuple(np.shape(x)) == tuple(map(size, terms))
            for x, terms in zip(values, step.ins, strict=True)
        )
        if same:
            return compat.evaluate(step.eqn, values)
        eqn = compat.with_shapes(step.eqn, [jnp.shape(x) for x in values], new, params=resized(cut))
        return compat.evaluate(eqn, values)

    def _remat(self, step: Step, values: list[Any]) -> list[Any]:
        options = compat.remat_options(step.eqn.params)
        if isinstance(options["prevent_cse"], tuple):
            options["prevent_cse"] = options["prevent_cse"][1:]
        inner = lambda *values: self.run(step.scopes[0], values)
        return jax.checkpoint(inner, **options)(*values)

    def _call(self, step: Step, values: list[Any]) -> list[Any]:
        if len(step.scopes) == 1:
            return self.run(step.scopes[0], values)
        main, rule = step.scopes
        at = [i for i, v in enumerate(step.eqn.invars) if is_float(v)]
        others = [i for i in range(len(values)) if i not in at]

        def merged(floats, rest):
            filled = dict(zip(at, floats, strict=True)) | dict(zip(others, rest, strict=True))
            return [filled[i] for i in range(len(filled))]

        split = [values[i] for i in at], [values[i] for i in others]
        if step.eqn.primitive.name == "custom_jvp_call":
            return self._with_jvp(main, rule, merged)(*split)
        return self._with_vjp(main, rule, merged)(*split)

    def _with_jvp(self, main: Scope, rule: Scope, merged: Callable[..., list[Any]]):
        call = jax.custom_jvp(lambda floats, rest: self.run(main, merged(floats, rest)))

        @call.defjvp
        def _(primals, tangents):
            floats, rest = primals
            results = self.run(rule, [*merged(floats, rest), *tangents[0]])
            return results[: len(main.outs)], results[len(main.outs) :]

        return call

    def _with_vjp(self, main: Scope, rule: Scope, merged: Callable[..., list[Any]]):
        call = jax.custom_vjp(lambda floats, rest: self.run(main, merged(floats, rest)))

        def forward(floats, rest):
            return self.run(main, merged(floats, rest)), (floats, rest)

        def backward(residuals, cotangents):
            floats, rest = residuals
            return self.run(rule, [*merged(floats, rest), *cotangents]), None

        call.defvjp(forward, backward)
        return call

    def _scan(self, step: Step, values: list[Any]) -> list[Any]:
        params = step.eqn.params
        n_consts, n_carry = compat.scan_sizes(params)
        fixed, start = values[:n_consts], values[n_consts : n_consts + n_carry]
        along = [*step.ins[n_consts + n_carry :], *step.outs[n_carry:]]
        length = count(self.keep(along[0][0])) if along else params["length"]

        def body(carry, rows):
            results = self.run(step.scopes[0], [*fixed, *carry, *rows])
            return results[:n_carry], results[n_carry:]

        carry, stacked = lax.scan(
            body,
            start,
            values[n_consts + n_carry :],
            length=length,
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked]

    def _while(self, step: Step, values: list[Any]) -> list[Any]:
        params = step.eqn.params
        n_test = params["cond_nconsts"]
        start = n_test + params["body_nconsts"]
        test, body = step.scopes
        return lax.while_loop(
            lambda carry: self.run(test, [*values[:n_test], *carry])[0],
            lambda carry: self.run(body, [*values[n_test:start], *carry]),
            values[start:],
        )

    def _cond(self, step: Step, values: list[Any]) -> list[Any]:
        branches = [
            lambda *operands, scope=scope: self.run(scope, operands) for scope in step.scopes
        ]
        return lax.switch(values[0], branches, *values[1:])
