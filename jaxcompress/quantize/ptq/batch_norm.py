"""BatchNorm multiplied into the weights in front of it, and gone from the network."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxcompress.core.notices import warn
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.edit import strong, without_operations
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.layers.bias_sums import merged
from jaxcompress.graph.layers.computed_once import evaluated
from jaxcompress.graph.layers.statistics import check_batches
from jaxcompress.graph.scaling.normalizations import data_port, factors_of, fold_factors, why_not
from jaxcompress.graph.tracing import trace_program


class Folded(NamedTuple):
    """A network without its normalizations: `fn(params, *inputs)`."""

    fn: Callable[..., Any]
    params: Any


@on_any_mesh
def fold_batch_norm(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[tuple[Any, ...]]
) -> Folded:
    """The same function without normalizations: their factors are in the weights in front.

    Of y = (w^T x + b - mean) A + bias with A = scale / sqrt(var + eps) the weights become w A and
    one bias (b - mean) A + bias. Scale, mean, variance and the further bias are gone: the tree has
    a leaf less for each, and what it costs, what is packed and what is exported has them no more.
    Any function of parameters that multiplies a contraction's channels is folded so: BatchNorm in
    inference in all its forms, a layer's scale. What a norm then still computes of several leaves
    alone (a shift bias - mean A, a kernel v g / norm(v)) is computed once and lies in one of them.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs, in inference.
      params: all that it takes, running statistics included.
      data: batches, tuples of inputs; the first one's shapes are used.

    Returns:
      (fn, params): a function of the smaller tree, for all else in the place of the first two
      arguments. Keys of dicts go with their leaf; in other containers None stands in its place.
      `fn` traces `apply_fn` at every call and takes inputs of any shapes with which that computes
      the same operations.

    Warns, naming the leaves of the norm, where one stays: nothing in front of it takes the factor,
    or what it multiplies is used elsewhere too (a factor in front of the next layer is not moved
    into that); no leaf can hold what is computed of several.

    Raises:
      ValueError: no data.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.

    >>> import jax.numpy as jnp
    >>> def fn(p, x):
    ...     return (x @ p["w"] - p["mean"][None]) * (p["scale"] / 2)[None]
    >>> params = {"w": jnp.ones((1, 2)), "mean": jnp.ones(2), "scale": jnp.array([6.0, 8.0])}
    >>> small_fn, small = fold_batch_norm(fn, params, [(jnp.ones((1, 1)),)])
    >>> print(sorted(small), small["w"][0], small["mean"])
    ['mean', 'w'] [3. 4.] [3. 4.]
    """
    inputs = strong(tuple(check_batches(data)[0]))
    folded, norms = Folded(apply_fn, params), set()
    while True:
        again, stay = _once(folded, inputs, norms)
        if again is None:
            break
        folded = again
    folded, left = _evaluated(folded, inputs, norms)
    if stay := left | stay:
        reasons = "; ".join(f"{name}: {why}" for name, why in stay.items())
        warn(f"not folded: {reasons}")
    return folded


def _once(
    network: Folded, inputs: tuple[Any, ...], norms: set[str]
) -> tuple[Folded | None, dict[str, str]]:
    # The network without the factors that can go at once, or why those left cannot.
    flat, params = _flat(network, inputs)
    new, ones, refused = fold_factors(flat, params)
    if not ones:
        left = factors_of(flat)
        named = {**left, **{at: _leaves(flat, at) for at in refused}}
        return None, {name: refused.get(at) or why_not(flat, at) for at, name in named.items()}
    new, needless = merged(flat, new, ones)
    norms.update(*(_leaves(flat, at).split(", ") for at in ones))
    skips = {at: data_port(flat, flat.ops[at]) or 0 for at in ones | needless}
    return _without(network.fn, flat, new, inputs, skips), {}


def _evaluated(
    network: Folded, inputs: tuple[Any, ...], norms: set[str]
) -> tuple[Folded, dict[str, str]]:
    # The network with one leaf for each value that norms make of several, and what stays and why.
    flat, params = _flat(network, inputs)
    new, skips, refused = evaluated(flat, params, norms)
    small = _without(network.fn, flat, new, inputs, skips) if skips else network
    fewer = len(jax.tree.leaves(small.params)) < len(jax.tree.leaves(params))
    return (small if fewer else network), refused


def _flat(network: Folded, inputs: tuple[Any, ...]) -> tuple[Flat, Any]:
    params = strong(network.params)
    return Flat(trace_program(network.fn, params, *inputs)), params


def _without(
    fn: Callable[..., Any], flat: Flat, params: Any, inputs: tuple[Any, ...], ports: dict[int, int]
) -> Folded:
    # Without operations, each of which gives one of its operands on.
    ops = flat.ops
    skips = {ops[at].place: (ops[at].primitive, port) for at, port in ports.items()}
    fn, params = without_operations(fn, params, inputs, skips)
    return Folded(on_any_mesh(fn), params)


def _leaves(flat: Flat, at: int) -> str:
    op = flat.ops[at]
    factor = op.operands[1 - (data_port(flat, op) or 0)]
    return ", ".join(sorted(flat.values[factor].origin.params)) if factor is not None else ""
