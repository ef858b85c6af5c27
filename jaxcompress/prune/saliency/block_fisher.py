"""WoodFisher: blocks of the inverse Fisher from the gradients of single examples.

Blocks are `block` neighbours of a leaf with its output axis in front: weights of one output, whose
inputs are correlated, and not those of many outputs. Memory is block * weights.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import at_path, holds, is_float_array, state_leaves
from jaxcompress.core.numerics.hessian import inverse_factor
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.statistics import each_batch
from jaxcompress.prune.masking.mask_state import hide, is_dense
from jaxcompress.prune.saliency.score_trees import (
    Loss,
    check_weights,
    finite_scores,
    float_leaves,
    scores_like,
)
from jaxcompress.prune.saliency.second_order import Batch, examples_in, gradient_of_one, obs


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["scores", "inverse"], meta_fields=["axis"]
)
@dataclass(frozen=True)
class WoodFisher:
    """What `woodfisher` found.

    Attributes:
      scores: float32, the params' structure and shapes: w_i^2 / (2 [F^-1]_ii).
      inverse: the params' structure, float32 [blocks, c, c]: blocks of F^-1 of the leaf with `axis`
        in front, flattened and padded. No block where a leaf holds no floats.
      axis: of the outputs.
    """

    scores: Any
    inverse: Any
    axis: int


@on_any_mesh
def woodfisher(
    loss_fn: Loss,
    params: Any,
    batches: Iterable[Batch],
    *,
    block: int = 64,
    damp: float = 1e-5,
    axis: int = -1,
) -> WoodFisher:
    """Blocks of F^-1 = (damp I + 1/N sum_n g_n g_n^T)^-1, g_n the gradient of one example.

    The paper updates F^-1 by one example at a time (Woodbury). That gives the same matrix, but in
    float32 it loses all digits where gradients are large beside damp; so F is added up and inverted
    once, by Cholesky.

    Args:
      loss_fn, params, batches: as in `fisher_diagonal`.
      block: weights per block; a leaf with fewer is one block.
      damp: absolute; the paper's is 1e-5.
      axis: of the outputs in leaves with two axes or more; -1 for Flax kernels.

    Returns:
      WoodFisher; choose masks by its `scores`, then `compensate`.

    Raises:
      ValueError: block or damp not positive; (eager) a Fisher too large for damp to make it
        positive definite in float32, with the path; as in `fisher_diagonal`.

    Source: Singh and Alistarh 2020, WoodFisher, arXiv 2004.14340.

    >>> from jaxcompress.prune import masks_of_scores
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    >>> x, y = jnp.array([[1.0, 1.0], [2.0, 1.0]]), jnp.array([[1.0], [1.0]])
    >>> w = jnp.array([[1.0], [0.5]])
    >>> found = woodfisher(loss, w, [(x, y)], damp=1e-3)
    >>> masks = masks_of_scores(found.scores, 0.5)
    >>> print(compensate(w, found, masks).round(2).ravel())  # plain removal leaves 1 and 0
    [1.26 0.  ]
    """
    if block < 1 or not damp > 0:
        raise ValueError(f"woodfisher needs block >= 1 and damp > 0, got {block=}, {damp=}")
    check_weights(params)
    total, count = None, 0
    for batch in each_batch("batches", batches):
        count += examples_in(batch)
        added = _outer_products(params, batch, loss_fn=loss_fn, block=block, axis=axis)
        total = added if total is None else list(map(jnp.add, total, added))
    finite_scores(total)
    weights, _ = float_leaves(params)
    inverse = _inverted(total, float(max(count, 1)), damp)
    leaves, treedef = jax.tree.flatten(params)
    rest, none = iter(inverse), jnp.zeros((0, 0, 0), jnp.float32)
    blocks = treedef.unflatten([next(rest) if is_float_array(w) else none for w in leaves])
    for path, f in leaves_with_paths(blocks):
        with at_path(path):
            if not holds(jnp.isfinite, f):
                raise ValueError(
                    f"the Fisher of these examples is too large beside {damp=} to invert in "
                    "float32; give more examples or raise damp"
                )
    return WoodFisher(scores_like(params, _scores(weights, inverse, axis=axis)), blocks, axis)


@on_any_mesh
def compensate(params: Any, found: WoodFisher, masks: Any) -> Any:
    """The params with what `masks` remove at zero and the others of each block corrected for it.

    In every block the set is removed as a whole (`obs`), so that 1/2 dw^T F dw is the smallest
    there is. (The paper adds up the corrections for each weight alone.)

    Args:
      params: those that `found` was made with.
      found: what `woodfisher` gave.
      masks: the params' structure; True keeps, a 0-d True: the leaf stays as it is.

    Returns:
      Params; dtypes and dense leaves as they were.

    Raises:
      ValueError: masks or inverse of other params; (eager) corrections that are not finite.
    """
    treedef = jax.tree.structure(params)
    rows = zip(
        leaves_with_paths(params),
        state_leaves(treedef, found.inverse),
        state_leaves(treedef, masks),
        strict=True,
    )
    return treedef.unflatten([_corrected(*row, axis=found.axis) for row in rows])


def _corrected(named: tuple[str, Any], inverse: Array, mask: Array, *, axis: int) -> Any:
    path, w = named
    if not is_float_array(w) or is_dense(w, mask):
        return w
    size = inverse.shape[-1]
    with at_path(path):
        if inverse.shape[:2] != (-(-w.size // max(size, 1)), size):
            raise ValueError(f"F^-1 of shape {inverse.shape} is not of a leaf {w.shape}")
        new = _removed(w, inverse, jnp.broadcast_to(mask, w.shape), axis=axis)
        if not holds(jnp.isfinite, new):
            raise ValueError("F^-1 is not positive definite in float32; raise damp in woodfisher")
    return new


@functools.partial(jax.jit, static_argnames="axis")
def _removed(w, inverse, mask, *, axis):
    blocks, gone = (_blocks(x, inverse.shape[-1], axis) for x in (w, ~mask))
    return hide(_leaf(jax.vmap(obs)(blocks, inverse, gone).weights, w.shape, axis), mask)


@functools.partial(jax.jit, static_argnames=("loss_fn", "block", "axis"))
def _outer_products(params, batch, *, loss_fn, block, axis):
    # sum_n g_n g_n^T of every block, [blocks, c, c] per leaf
    weights, _ = float_leaves(params)
    gradients = jax.vmap(lambda e: gradient_of_one(loss_fn, params, weights, e))(batch)

    def products(g: Array) -> Array:
        size = max(1, min(block, math.prod(g.shape[1:])))
        rows = jax.vmap(lambda one: _blocks(one, size, axis))(g.astype(jnp.float32))
        return jnp.einsum("nbi,nbj->bij", rows, rows, precision=lax.Precision.HIGHEST)

    return [products(g) for g in gradients]


@jax.jit
def _inverted(totals: list[Array], count: Any, damp: Any) -> list[Array]:
    def inverted(total: Array) -> Array:
        # F = damp I + 1/N sum g g^T, F^-1 = U^T U
        factor = inverse_factor(total / count + damp * jnp.eye(len(total), dtype=total.dtype))
        return jnp.matmul(factor.T, factor, precision=lax.Precision.HIGHEST)

    return [jax.vmap(inverted)(total) for total in totals]


@functools.partial(jax.jit, static_argnames="axis")
def _scores(weights, inverse, *, axis):
    def score(w: Array, f: Array) -> Array:
        # s = w^2 / (2 [F^-1]_ii)
        diagonal = _leaf(jnp.diagonal(f, axis1=1, axis2=2), w.shape, axis)
        return jnp.square(w) / (2 * diagonal.astype(w.dtype))

    return [score(w, f) for w, f in zip(weights, inverse, strict=True)]


def _blocks(w: Array, size: int, axis: int) -> Array:
    # [blocks, size], padded with zeros
    row = (jnp.moveaxis(w, axis, 0) if w.ndim > 1 else w).reshape(-1)
    return jnp.pad(row, (0, -len(row) % size)).reshape(-1, size)


def _leaf(blocks: Array, shape: tuple[int, ...], axis: int) -> Array:
    row = blocks.reshape(-1)[: math.prod(shape)]
    if len(shape) < 2:
        return row.reshape(shape)
    rest = list(shape)
    first = rest.pop(axis)
    return jnp.moveaxis(row.reshape(first, *rest), 0, axis)
