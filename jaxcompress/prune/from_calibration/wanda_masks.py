"""Wanda: weights times the norms of their inputs, compared output by output."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.layer_by_layer import Progress, matrices
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.prune.from_calibration.calibrated import (
    Inputs,
    Pruned,
    Rules,
    Share,
    Spans,
    prune_layers,
    spans_of,
    state_of,
    targets,
    top_of_spans,
)


@on_any_mesh
def wanda(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    sparsity: Rules,
    *,
    masks: Any = None,
    inputs: Inputs = "dense",
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Zeroes the weights with the smallest |W_ij| ||X_i||_2 of every output j; the others stay.

    X_i is input i over all rows of the data. Of the K weights of an output exactly
    round((1 - sparsity) K) are kept, or n of m consecutive input channels of each tap. No weight is
    changed otherwise.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: any tree.
      data: batches of inputs, tuples.
      sparsity: share of zeros in [0, 1], or (n, m), in every layer; or {regex on the path: either},
        the first match wins and other leaves stay dense.
      masks: the params' structure (0-d True: dense); what they hide stays hidden, and counts.
      inputs: "dense": of the network as it is. "pruned": layer by layer, the layers before pruned
        already.
      grids: {tap: Grid} of the activations, which are put on them on the way.
      layer_at_a_time: hold the sums of one layer at a time, at the price of a pass for each.
      progress: wraps the layers, for a progress bar.

    Returns:
      (params, state): exact zeros, and the masks, for the `apply` and `pack` of pruning.

    Raises:
      ValueError: no data; a rule that matches nothing, or no layer; a share out of range; masks of
        other params; NaN or Inf in a weight or an activation; `inputs` unknown.
      TypeError: a share is none; a batch is no tuple.

    Source: Sun et al. 2023, A simple and effective pruning approach for large language models,
    arXiv 2306.11695. (The paper re-evaluates block by block; "pruned" does so layer by layer.)

    >>> w, x = jnp.array([[3.0], [2.0], [1.0]]), jnp.array([[1.0, 0.0, 9.0], [1.0, 2.0, 0.0]])
    >>> pruned, _ = wanda(lambda p, x: x @ p, w, [(x,)], 1 / 3)
    >>> print(pruned[:, 0])  # 3 sqrt(2) and 1 * 9 against 2 * 2
    [3. 0. 1.]
    """

    def solve(layer: Layer, leaf: Array, moments: Moments, share: Share, keep: Array) -> Pruned:
        w = matrices(layer, leaf)
        return _solve(w, moments, keep, spans_of(share, w.shape[2], layer.channels))

    pruned, found = prune_layers(
        solve,
        apply_fn,
        params,
        targets(apply_fn, params, data, sparsity),
        masks=masks,
        inputs=inputs,
        gram=False,
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )
    return pruned, state_of(found)


def _solve(w: Array, moments: Moments, keep: Array, spans: Spans) -> Pruned:
    how = {"size": spans.size, "places": tuple(spans.places.tolist())}
    return _masked(w, moments, keep, jnp.asarray(spans.quota), **how)


@functools.partial(jax.jit, static_argnames=("size", "places"))
def _masked(
    w: Array, moments: Moments, keep: Array, quota: Array, *, size: int, places: tuple[int, ...]
) -> Pruned:
    # S_ij = |W_ij| ||X_i||_2
    norms = jnp.sqrt(moments.scatter + moments.total * moments.mean)
    spans = Spans(size, quota, np.array(places, np.int64))
    mask = top_of_spans(jnp.abs(w) * norms[..., None], keep, spans)
    return Pruned(jnp.where(mask, w, 0.0), mask)
