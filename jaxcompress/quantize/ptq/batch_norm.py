"""BatchNorm multiplied into the weights in front of it, and gone from the network."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxcompress.core.meshes import on_any_mesh
from jaxcompress.core.notices import warn
from jaxcompress.graph.capture import check_batches
from jaxcompress.graph.edit import strong, without_operations
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.normalizations import data_port, factors_of, fold_factors, why_not
from jaxcompress.graph.sums import merged
from jaxcompress.graph.trace import trace_program


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
    inference in all its forms, a layer's scale.

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
    or what it multiplies is used elsewhere too.

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
    folded = Folded(apply_fn, params)
    while True:
        again, stay = _once(folded, inputs)
        if again is None:
            break
        folded = again
    if stay:
        reasons = "; ".join(f"{name}: {why}" for name, why in stay.items())
        warn(f"not folded: {reasons}")
    return folded


def _once(network: Folded, inputs: tuple[Any, ...]) -> tuple[Folded | None, dict[str, str]]:
    # The network without the factors that can go at once, or why those left cannot.
    fn, params = network
    params = strong(params)
    flat = Flat(trace_program(fn, params, *inputs))
    new, ones, refused = fold_factors(flat, params)
    if not ones:
        norms = factors_of(flat)
        named = {**norms, **{at: _leaves(flat, at) for at in refused}}
        return None, {name: refused.get(at) or why_not(flat, at) for at, name in named.items()}
    new, needless = merged(flat, new, ones)
    skips = {}
    for at in ones | needless:
        op = flat.ops[at]
        skips[op.place] = op.primitive, data_port(flat, op) or 0
    fn, new = without_operations(fn, new, inputs, skips)
    return Folded(on_any_mesh(fn), new), {}


def _leaves(flat: Flat, at: int) -> str:
    op = flat.ops[at]
    factor = op.operands[1 - (data_port(flat, op) or 0)]
    return ", ".join(sorted(flat.values[factor].origin.params)) if factor is not None else ""
