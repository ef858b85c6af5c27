"""Scores of coupled channels, through one gate per channel.

A gate is a factor of 1 on every weight that goes with a channel, through the same terms by which
the channel is cut: a flattened or concatenated axis counts as it is. All scores are derivatives
with respect to gates, float32 [size] by name of the group, and higher stays.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import at_path, holds, is_float_array
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.coupling.dependency_graph import Axes
from jaxcompress.graph.coupling.terms import Atom, Sum, Term, atoms, resolve
from jaxcompress.prune.channels.coupled import along, group_names, of_network
from jaxcompress.prune.saliency.score_trees import Loss, check_weights
from jaxcompress.prune.saliency.second_order import Batch, examples_in, mean_over_examples

STATISTICS = r"batch_stats/.*|(.*/)?(mean|var)"  # paths of running statistics: scores skip them


def gated(axes: Axes, params: Any, gates: Mapping[str, Array], *, skip: str = STATISTICS) -> Any:
    """The params with every weight multiplied by the gates of its channels.

    Differentiable in both. Zeros and ones as gates give what `group_masks` gives, but for what is
    skipped.

    Args:
      axes: what `graph.axes` found in the network.
      params: its parameters.
      gates: name of a group -> float [size]; groups that are not in it have gates of 1.
      skip: regular expression on whole paths: parameters without gates.

    Raises:
      ValueError: params of another network; an unknown group.

    >>> from jaxcompress.graph.coupling.dependency_graph import axes
    >>> params = {"up": jnp.ones((1, 2)), "down": jnp.ones((2, 1))}
    >>> found = axes(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((3, 1)))
    >>> print(gated(found, params, {"up[1]": jnp.array([2.0, 0.0])})["down"].ravel())
    [2. 0.]
    """
    named = {axes.program.atoms[name]: gates[name] for name in group_names(axes, gates)}

    def scaled(path: str, w: Any) -> Any:
        if not is_float_array(w) or re.fullmatch(skip, path):
            return w
        for axis, term in enumerate(axes.program.leaves[path]):
            if any(atom in named for atom in atoms(term)):
                w = w * along(_gate_of(term, named), axis, w.ndim).astype(w.dtype)
        return w

    new = [scaled(path, w) for path, w in of_network(axes, params)]
    return jax.tree.structure(params).unflatten(new)


@on_any_mesh
def group_norms(
    axes: Axes, params: Any, *, of: Iterable[str] | None = None, skip: str = STATISTICS
) -> dict[str, Array]:
    """The L2 norm of all weights that go with a channel.

    A weight of two coupled axes counts once for each.

    Args:
      axes: what `graph.axes` found in the network.
      params: its parameters.
      of: names of groups, those of layers too; None for all groups of channels.
      skip: regular expression on whole paths of parameters that do not count.

    Raises:
      ValueError: params of another network; NaN in a weight (eager).

    Source: Fang et al. 2023, DepGraph, arXiv 2301.12900.

    >>> from jaxcompress.graph.coupling.dependency_graph import axes
    >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [2.0]])}
    >>> found = axes(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((3, 1)))
    >>> print(group_norms(found, params)["up[1]"])
    [5. 2.]
    """
    check_weights(params)

    def half_square(gates):
        leaves = jax.tree.leaves(gated(axes, _wide(params), gates, skip=skip))
        return 0.5 * sum(jnp.sum(jnp.square(w)) for w in leaves if is_float_array(w))

    # d/dgate 1/2 sum (gate w)^2 = sum w^2
    return jax.tree.map(jnp.sqrt, jax.jit(jax.grad(half_square))(_ones(axes, of)))


@on_any_mesh
def group_taylor(
    axes: Axes,
    loss_fn: Loss,
    params: Any,
    batches: Iterable[Batch],
    *,
    of: Iterable[str] | None = None,
    skip: str = STATISTICS,
) -> dict[str, Array]:
    """(sum g w)^2 over all weights that go with a channel, g the mean gradient of the loss.

    That is the squared change of the loss, to first order, when the channel is removed.

    Args:
      axes: what `graph.axes` found in the network.
      loss_fn: (params, *batch) -> scalar, a mean over the batch.
      params: the network's parameters.
      batches: tuples of arrays with the examples along the first axis; read once.
      of, skip: as in `group_norms`.

    Raises:
      ValueError: no batch, params of another network, NaN in a weight; a derivative that is not
        finite, with the group (eager).

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning,
    arXiv 1906.10771.
    """

    def of_batch(gates, weights, batch):
        slope = jax.grad(lambda g: loss_fn(gated(axes, weights, g, skip=skip), *batch))(gates)
        return jax.tree.map(lambda s: examples_in(batch) * s, slope)

    return jax.tree.map(jnp.square, _mean(_ones(axes, of), of_batch, params, batches))


@on_any_mesh
def group_fisher(
    axes: Axes,
    loss_fn: Loss,
    params: Any,
    batches: Iterable[Batch],
    *,
    of: Iterable[str] | None = None,
    skip: str = STATISTICS,
) -> dict[str, Array]:
    """E[(sum g w)^2] over examples, g the gradient of the loss of one example.

    Half of it is what removing the channel costs at a minimum. Memory: one forward and backward
    pass of a batch.

    Args:
      axes, params, batches, of, skip: as in `group_taylor`.
      loss_fn: (params, *batch) -> scalar; called with batches of one example.

    Raises:
      ValueError: as in `group_taylor`.

    Source: Liu et al. 2021, Group Fisher Pruning for Practical Network Compression,
    arXiv 2108.00708.
    """

    def of_batch(gates, weights, batch):
        def slope(example):
            one = jax.tree.map(lambda x: x[None], example)
            return jax.grad(lambda g: loss_fn(gated(axes, weights, g, skip=skip), *one))(gates)

        return jax.tree.map(lambda s: jnp.sum(jnp.square(s), axis=0), jax.vmap(slope)(batch))

    return _mean(_ones(axes, of), of_batch, params, batches)


def _ones(axes: Axes, of: Iterable[str] | None) -> dict[str, Array]:
    # Gates that change nothing.
    return {name: jnp.ones(axes.every[name].size, jnp.float32) for name in group_names(axes, of)}


def _gate_of(term: Term, gates: Mapping[Atom, Array]) -> Array:
    # The gates of an axis from those of its atoms.
    term = resolve(term)
    if isinstance(term, Atom):
        return gates.get(term, jnp.ones(term.size, jnp.float32))
    if isinstance(term, Sum):
        return jnp.concatenate([_gate_of(part, gates) for part in term.parts])
    result = jnp.ones(1, jnp.float32)
    for factor in term.factors:
        result = (result[:, None] * _gate_of(factor, gates)[None]).reshape(-1)
    return result


def _mean(
    gates: Mapping[str, Array],
    of_batch: Callable[..., Any],
    params: Any,
    batches: Iterable[Batch],
) -> dict[str, Array]:
    # The mean over examples, from a sum for each batch.
    check_weights(params)
    compiled = jax.jit(of_batch)
    scores = mean_over_examples(lambda batch: compiled(gates, params, batch), batches)
    for name, score in scores.items():
        with at_path(name):
            if not holds(jnp.isfinite, score):
                raise ValueError("a derivative of the loss is NaN or Inf")
    return scores


def _wide(params: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(jnp.float32) if is_float_array(w) else w, params)
