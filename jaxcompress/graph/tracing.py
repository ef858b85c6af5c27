"""Finds every contraction of a function, the parameters that feed it and what it costs."""

import inspect
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.core.kernels import with_declared
from jaxcompress.core.paths import leaves_with_paths, refuse_twins, unique
from jaxcompress.core.sharding.meshes import traced_anywhere
from jaxcompress.graph import compat, provenance
from jaxcompress.graph.origin_domain import Findings, Found, Place, follow
from jaxcompress.graph.primitives import multiply_accumulates, row
from jaxcompress.graph.sites import Graph, Site, Tap, shape_dtype, size


class Program(NamedTuple):
    """A traced function: what `trace` reports and `walk` evaluates again.

    Attributes:
      closed: the closed jaxpr.
      graph: what was found in it.
      places: the taps of the equation at each place, a path of equation and body numbers.
      unreachable: name of a site that `walk` cannot reach -> where it is.
      contractions: the `Site` at each place, those out of reach and folds included.
      beyond: what is out of reach, at each place, as in `Graph.unentered`.
      found: the origins of all values.
    """

    closed: Any
    graph: Graph
    places: dict[Place, tuple[Tap, ...]]
    unreachable: dict[str, str]
    contractions: dict[Place, Site]
    beyond: dict[Place, str]
    found: Findings


def trace(fn: Callable[..., Any], params: Any, *inputs: Any) -> Graph:
    """Lists all contractions of `fn(params, *inputs)`, each with the parameters that feed it.

    Nothing is computed or allocated: arrays may be `jax.ShapeDtypeStruct`s. A contraction is named
    after a parameter leaf if its operand is that leaf up to views, casts and elementwise functions
    of parameters and constants: masks, fake quantization, low-rank updates (their product is one of
    `Graph.folds`). The parameter stays recognised where smaller inputs scale it, and in scans over
    stacked layers. Contractions in `jit`, `scan`, `cond`, `while`, `remat`, `custom_jvp` and
    `custom_vjp` are found; those elsewhere are listed in `Graph.unentered`. Code whose result is
    not used is counted like any other.

    Args:
      fn: a pure function.
      params: pytree of arrays, e.g. Linen variables, an NNX state, a filtered Equinox module.
      *inputs: pytrees of arrays; parameters among them are not recognised as such.

    Raises:
      ValueError: a leaf of `params` is no array, or two leaves have one path.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((3, 4)))
    >>> [(site.name, site.macs) for site in graph.sites]
    [('up', 96), ('down', 48)]
    """
    return trace_program(fn, params, *inputs).graph


def trace_program(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    dead_code: bool = True,
    shardings: bool = False,
) -> Program:
    """As `trace`, with the jaxpr and the place of every tap.

    Unused code is kept or dropped, and what the network says of shardings too.
    """
    leaves = _param_leaves(params)
    _check_call(fn, params, inputs)
    if shardings:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
        closed = with_declared(closed)
    else:
        closed, out = traced_anywhere(fn, params, *inputs)
    if not dead_code:
        closed = compat.without_dead_code(closed)
    variables = closed.jaxpr.invars
    origins = [
        provenance.leaf(path, v.aval)
        for path, v in zip(leaves, variables[: len(leaves)], strict=True)
    ]
    origins += [provenance.data(v.aval) for v in variables[len(leaves) :]]
    _, found = follow(compat.body(closed), origins)
    return _report(closed, out, leaves, found)


def _param_leaves(params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    flat = leaves_with_paths(params)
    refuse_twins("params", [path for path, _ in flat])
    for path, leaf in flat:
        is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not is_array and not isinstance(leaf, bool | int | float | complex):
            raise ValueError(
                f"params: leaf {path!r} must be an array, got {type(leaf).__name__}; split static "
                "fields off first (nnx.split, equinox.partition)"
            )
        leaves[path] = shape_dtype(leaf)
    return leaves


def _report(
    closed: Any, out: Any, leaves: dict[str, jax.ShapeDtypeStruct], found: Findings
) -> Program:
    sites, folds, taps, trips, used = [], [], [], [], set()
    places, unreachable, beyond, contractions = {}, {}, {}, {}
    names, fold_names, beyond_names, conds = set(), set(), set(), {}
    for item in found.contractions:
        base = _base_name(item, leaves)
        if item.unentered:
            beyond[item.place] = f"{item.unentered}: {', '.join(_weights(item, leaves)) or base}"
            unreachable.setdefault(base, item.unentered)
            if row(item.eqn.primitive.name).kind == "contract":
                contractions[item.place] = _site(item, _unique(base, beyond_names), conds)
            continue
        is_site = any(item.active)
        name = _unique(base, names if is_site else fold_names)
        site = contractions[item.place] = _site(item, name, conds)
        if not is_site:
            folds.append(site)
            continue
        sites.append(site)
        used.update(site.params)
        places[item.place] = _taps(site, item.active)
        taps.extend(places[item.place])
        if item.in_while:
            trips.append(name)
    graph = Graph(
        sites=tuple(sites),
        taps=tuple(taps),
        folds=tuple(folds),
        out=jax.tree.map(shape_dtype, out),
        params=MappingProxyType(leaves),
        unused=tuple(path for path in leaves if path not in used),
        unknown_trips=tuple(trips),
        unentered=tuple(beyond.values()),
    )
    return Program(closed, graph, places, unreachable, contractions, beyond, found)


def _weights(item: Found, leaves: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    pairs = zip(item.origins, item.active, strict=True)
    found = set().union(*(origin.params for origin, active in pairs if not active))
    found = found or item.given  # the references of a kernel have no origin
    return [path for path in leaves if path in found]


def _base_name(item: Found, leaves: dict[str, jax.ShapeDtypeStruct]) -> str:
    # The largest leaf: scales and steps are smaller than what they scale; then floats before masks.
    largest = max(
        _weights(item, leaves),
        key=lambda p: (size(leaves[p]), jnp.issubdtype(leaves[p].dtype, jnp.inexact)),
        default="",
    )
    return largest or item.scope or item.eqn.primitive.name


def _unique(base: str, taken: set[str]) -> str:
    name = unique(base, taken)
    taken.add(name)
    return name


def _site(item: Found, name: str, conds: dict[tuple[int, ...], int]) -> Site:
    eqn, origins = item.eqn, item.origins
    weights = [i for i in (0, 1) if not item.active[i] and origins[i].params]
    counts = multiply_accumulates.count(eqn)
    lhs, rhs = (shape_dtype(v.aval) for v in eqn.invars[:2])
    return Site(
        name=name,
        primitive=eqn.primitive.name,
        params=tuple(sorted(set().union(*(origins[i].params for i in weights)))),
        weight=weights[-1] if weights else None,
        calls=math.prod(item.loops),
        operands=(lhs, rhs),
        out=shape_dtype(eqn.outvars[0].aval),
        macs=counts.dense,
        valid_macs=counts.valid,
        config=MappingProxyType(dict(eqn.params)),
        loops=item.loops,
        branches=tuple((conds.setdefault(at, len(conds)), branch) for at, branch in item.branches),
    )


def _taps(site: Site, active: tuple[bool, bool]) -> tuple[Tap, ...]:
    if all(active):
        return Tap(site, 0, f"{site.name}/lhs"), Tap(site, 1, f"{site.name}/rhs")
    return (Tap(site, active.index(True), site.name),)


def _check_call(fn: Any, params: Any, inputs: tuple[Any, ...]) -> None:
    """Raises TypeError if a function cannot be called with params and these inputs."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # it has none
        return
    try:
        signature.bind(params, *inputs)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"{name}{signature} was given params and {len(inputs)} inputs: {error}. A forward that "
            "takes a state besides (BatchNorm in training) needs it among the inputs, after params"
        ) from None
