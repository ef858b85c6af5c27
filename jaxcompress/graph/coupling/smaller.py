"""Evaluates a program again on parameters of which channels were removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import compat
from jaxcompress.graph.coupling.axis_shapes import Terms
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.coupling.scopes import Scope, Step, is_float
from jaxcompress.graph.coupling.smaller_means import renormalised
from jaxcompress.graph.coupling.smaller_sizes import Cut, resized
from jaxcompress.graph.coupling.terms import Atom, Term, Whole, count, keep_of, resolve, size
from jaxcompress.graph.evaluate import Evaluator

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
        values = [*jax.tree.leaves(params), *leaves]
        results = runner.run(program.scope.body, values, program.scope)
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


class _Replay(Evaluator):
    """Evaluates jaxprs with new sizes. Where it is, is said by a scope, or a step."""

    keeps = compat.REMAT

    def __init__(self, keep: Callable[[Term], Any], renormalise: bool):
        self.keep, self.renormalise = keep, renormalise
        self._constants: dict[Any, Terms] = {}
        self._divided: Mapping[int, Any] = {}

    def run(self, body: compat.Body, values: Sequence[Any], where: Any = ()) -> list[Any]:
        """With what is known of the scope."""
        outside = self._constants, self._divided
        self._constants = dict(zip(body.jaxpr.constvars, where.consts, strict=True))
        self._divided = renormalised(where, self.keep) if self.renormalise else {}
        results = super().run(body, values, where)
        self._constants, self._divided = outside
        return results

    def constant(self, v: Any, x: Any) -> Any:
        """The part that stays."""
        return take(x, self._constants[v], self.keep)

    def at(self, where: Scope, number: int, eqn: Any) -> Step:
        """The step, its division renormalised."""
        step = where.steps[number]
        return replace(step, eqn=self._divided[number]) if number in self._divided else step

    def within(self, at: Step, number: int, eqn: Any) -> Scope:
        """The scope of a jaxpr."""
        return at.scopes[number]

    def enters(self, eqn: Any, at: Step) -> bool:
        """What has scopes."""
        return bool(at.scopes)

    def equation(self, eqn: Any, values: list[Any], at: Step) -> Sequence[Any]:
        """The equation with the sizes that its axes have now."""
        cut, eqn = Cut(at, self.keep, values), at.eqn
        new = [cut.shape(i) for i in range(len(at.outs))]
        same = all(
            n == tuple(map(size, terms)) for n, terms in zip(new, at.outs, strict=True)
        ) and all(
            tuple(np.shape(x)) == tuple(map(size, terms))
            for x, terms in zip(values, at.ins, strict=True)
        )
        if not same:
            shapes = [jnp.shape(x) for x in values]
            eqn = compat.with_shapes(eqn, shapes, new, params=resized(cut))
        with compat.surroundings(eqn):
            return compat.evaluate(eqn, values)

    def length(self, eqn: Any, at: Step) -> Any:
        """How many layers of a stack are left."""
        n_consts, n_carry = compat.scan_sizes(eqn.params)
        along = [*at.ins[n_consts + n_carry :], *at.outs[n_carry:]]
        return count(self.keep(along[0][0])) if along else eqn.params["length"]

    def custom(self, eqn: Any, values: list[Any], at: Step) -> Sequence[Any]:
        """With its derivative rule, of the new sizes too."""
        if len(at.scopes) == 1:
            return super().custom(eqn, values, at)
        main, rule = at.scopes
        floats = [i for i, v in enumerate(eqn.invars) if is_float(v)]
        others = [i for i in range(len(values)) if i not in floats]

        def merged(some, rest):
            filled = dict(zip(floats, some, strict=True)) | dict(zip(others, rest, strict=True))
            return [filled[i] for i in range(len(filled))]

        split = [values[i] for i in floats], [values[i] for i in others]
        if eqn.primitive.name == "custom_jvp_call":
            return self._with_jvp(main, rule, merged)(*split)
        return self._with_vjp(main, rule, merged)(*split)

    def _with_jvp(self, main: Scope, rule: Scope, merged: Callable[..., list[Any]]):
        call = jax.custom_jvp(lambda some, rest: self.run(main.body, merged(some, rest), main))

        @call.defjvp
        def _(primals, tangents):
            some, rest = primals
            results = self.run(rule.body, [*merged(some, rest), *tangents[0]], rule)
            return results[: len(main.outs)], results[len(main.outs) :]

        return call

    def _with_vjp(self, main: Scope, rule: Scope, merged: Callable[..., list[Any]]):
        call = jax.custom_vjp(lambda some, rest: self.run(main.body, merged(some, rest), main))

        def forward(some, rest):
            return self.run(main.body, merged(some, rest), main), (some, rest)

        def backward(residuals, cotangents):
            some, rest = residuals
            return self.run(rule.body, [*merged(some, rest), *cotangents], rule), None

        call.defvjp(forward, backward)
        return call
