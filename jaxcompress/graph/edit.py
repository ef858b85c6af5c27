"""A function without some of its operations: each gives one of its operands on as it is."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import compat
from jaxcompress.graph.origin_domain import Place
from jaxcompress.graph.tracing import trace_program

Skips = Mapping[Place, tuple[str, int]]  # where -> the primitive and the operand that is its result
ENTERED = compat.JIT | compat.CALL | compat.REMAT | frozenset({"scan"})


def reachable(closed: Any, place: Place) -> bool:
    """Whether an operation can be skipped: only calls and scans lie around it."""
    jaxpr = compat.body(closed).jaxpr
    for number in place[:-1:2]:
        eqn = jaxpr.eqns[number]
        if eqn.primitive.name not in ENTERED:
            return False
        jaxpr = next(compat.bodies(eqn.params)).jaxpr
    return True


def without_operations(
    fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], skips: Skips
) -> tuple[Callable[..., Any], Any]:
    """The function without some operations, and the parameters that it still needs.

    Args:
      fn, params, inputs: the function and what it is traced with.
      skips: what to leave out; the operand has the shape and dtype of the result.

    Returns:
      (small_fn, small_params): leaves that only those operations needed are gone, keys of dicts
      with them; elsewhere None stands in their place. `small_fn(small_params, *inputs)` traces `fn`
      at every call, so inputs may have other shapes as long as `fn` computes the same operations.
    """
    params, inputs = strong(params), strong(inputs)
    full = [path for path, _ in leaves_with_paths(params)]
    structure = jax.tree.structure(params)
    before = trace_program(fn, params, *inputs).closed
    count = len(full)
    needed = compat.needed_inputs(compat.skipping(before, skips))[:count]
    once = compat.needed_inputs(before)[:count]
    gone = {path for path, old, new in zip(full, once, needed, strict=True) if old and not new}
    missing = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves_with_paths(params)
        if path in gone
    }
    kept = [path for path in full if path not in gone]

    def small_fn(params: Any, *inputs: Any) -> Any:
        inputs, given = strong(inputs), dict(leaves_with_paths(strong(params)))
        _check(given, kept)
        leaves = [missing[path] if path in missing else given[path] for path in full]
        program = trace_program(fn, structure.unflatten(leaves), *inputs)
        _compare(program.closed, skips)
        closed = compat.skipping(program.closed, skips)
        values = [*leaves, *jax.tree.leaves(inputs)]
        results = compat.on_needed(closed, values)
        return jax.tree.unflatten(jax.tree.structure(program.graph.out), results)

    return small_fn, without_leaves(params, gone)


def strong(tree: Any) -> Any:
    """The same without weak types, on which depends what operations a function traces to."""

    def one(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        x = jnp.asarray(x)
        return lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x

    return jax.tree.map(one, tree)


def _check(given: Mapping[str, Any], kept: list[str]) -> None:
    wrong = [path for path in kept if path not in given] or [p for p in given if p not in kept]
    if wrong:
        what = "lacks" if wrong[0] not in given else "has besides"
        raise ValueError(
            f"params {what} {wrong[0]!r}: the function without its normalizations takes the leaves "
            f"{kept[:5]}... ({len(kept)})"
        )


def _compare(closed: Any, skips: Skips) -> None:
    for place, (primitive, _) in skips.items():
        jaxpr, found = compat.body(closed).jaxpr, "nothing"
        for depth, number in enumerate(place):
            if depth % 2 == 0:
                if number >= len(jaxpr.eqns):
                    break
                eqn = jaxpr.eqns[number]
                found = eqn.primitive.name
                if depth + 1 < len(place):
                    inner = next(compat.bodies(eqn.params), None)
                    if inner is None:
                        break
                    jaxpr = inner.jaxpr
        if found != primitive:
            raise ValueError(
                f"inputs: with these shapes and dtypes the function computes other operations than "
                f"where its normalizations were found ({found} for {primitive}); fold it with "
                "such inputs"
            )


class _Gone:
    """Stands for a leaf that is no longer there."""


def without_leaves(tree: Any, gone: Iterable[str]) -> Any:
    """A pytree without some leaves: keys of dicts go, elsewhere None stands in their place.

    >>> without_leaves({"a": {"b": 1}, "c": [2, 3]}, {"a/b", "c/1"})
    {'c': [2, None]}
    """
    gone, structure = set(gone), jax.tree.structure(tree)
    if not gone:
        return tree
    leaves = [_Gone() if path in gone else leaf for path, leaf in leaves_with_paths(tree)]
    left = _tidy(structure.unflatten(leaves))
    return jax.tree.map(lambda leaf: None if isinstance(leaf, _Gone) else leaf, left)


def _tidy(tree: Any) -> Any:
    if type(tree) is not dict:
        return tree
    inside = {key: _tidy(value) for key, value in tree.items()}
    return {
        key: value
        for key, value in inside.items()
        if not isinstance(value, _Gone) and not (type(value) is dict and not value and tree[key])
    }
