"""Second-order scores: the diagonal Fisher and OBD, and OBS with its corrections.

Removing w_p raises a loss at a minimum by 1/2 H_pp w_p^2 if the others stay (OBD), by
w_p^2 / (2 [H^-1]_pp) if they are corrected (OBS). H is unknown and large; the empirical Fisher
F = E[g g^T], g the gradient of one *example*, stands for it: its diagonal here, blocks of it in
`woodfisher`. The square of a batch's mean gradient, what Adam keeps, is no Fisher.

What scores are: see `score_trees`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from jaxcompress.core.compressor import holds, is_float_array, state_leaves
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.statistics import each_batch
from jaxcompress.prune.saliency.score_trees import (
    Loss,
    check_weights,
    finite_scores,
    float_leaves,
    scores_like,
    widened,
)

Batch = tuple[Any, ...]

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@on_any_mesh
def fisher_diagonal(loss_fn: Loss, params: Any, batches: Iterable[Batch]) -> Any:
    """E[g_i^2] over examples, g the gradient of the loss of one example.

    Args:
      loss_fn: (params, *batch) -> scalar; called with batches of one example, so whatever it
        averages over the batch is that example's own.
      params: any tree.
      batches: tuples of arrays with the examples along the first axis; read once. A batch takes the
        memory of as many gradients as it has examples.

    Returns:
      float32 tree, see `score_trees`.

    Raises:
      ValueError: no batch, arrays of a batch that differ in length; NaN in a weight, NaN or Inf in
        a gradient, with the path.

    Source: Theis et al. 2018, Faster gaze prediction, arXiv 1801.05787.

    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2) / 2
    >>> x, y = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([1.0, -1.0])
    >>> print(fisher_diagonal(loss, jnp.zeros(2), [(x, y)]))  # all residuals are 1: E[x^2]
    [5. 2.]
    """
    check_weights(params)
    squares = functools.partial(_sum_of_squares, params, loss_fn=loss_fn)
    return finite_scores(mean_over_examples(squares, batches))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _sum_of_squares(params, batch, *, loss_fn):
    weights, _ = float_leaves(params)
    gradients = jax.vmap(lambda e: gradient_of_one(loss_fn, params, weights, e))(batch)
    return scores_like(params, [jnp.sum(jnp.square(g), axis=0) for g in gradients])


def gradient_of_one(
    loss_fn: Loss, params: Any, weights: list[Array], example: Batch
) -> list[Array]:
    """The gradient of the loss of one example, given without the batch axis, by `float_leaves`."""
    _, join = float_leaves(params)
    one = jax.tree.map(lambda x: x[None], example)
    return jax.grad(lambda w: loss_fn(join(w), *one))(weights)


def mean_over_examples(sum_of: Callable[[Batch], Any], batches: Iterable[Batch]) -> Any:
    """The mean over all examples, from a tree of sums for each batch."""
    total, count = None, 0
    for batch in each_batch("batches", batches):
        count += examples_in(batch)
        added = sum_of(batch)
        total = added if total is None else jax.tree.map(jnp.add, total, added)
    return jax.tree.map(lambda s: s / max(count, 1), total)


def examples_in(batch: Batch) -> int:
    """The length of a batch.

    Raises:
      ValueError: its arrays do not have one.
    """
    lengths = {x.shape[:1] for x in jax.tree.leaves(batch)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "batches: the arrays of a batch must have one first axis, the examples; "
            f"got shapes {[tuple(x.shape) for x in jax.tree.leaves(batch)]}"
        )
    return lengths.pop()[0]


@on_any_mesh
def obd(
    loss_fn: Loss,
    params: Any,
    batches: Iterable[Batch],
    *,
    curvature: Callable[[Loss, Any, Iterable[Batch]], Any] = fisher_diagonal,
) -> Any:
    """1/2 H_ii w_i^2: what removing a weight costs if the gradient is 0 and H diagonal.

    Args:
      loss_fn, params, batches: as in `fisher_diagonal`.
      curvature: (loss_fn, params, batches) -> diagonal of H, a tree as the params.

    Returns:
      float32 scores; `scored` and `masks_of_scores` prune by them.

    Raises:
      ValueError: as in `fisher_diagonal`.

    Source: LeCun et al. 1990, Optimal Brain Damage; with the Fisher: arXiv 1801.05787.

    >>> from jaxcompress.prune import masks_of_scores
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2) / 2
    >>> x, y = jnp.array([[1.0, 4.0]]), jnp.array([[2.0]])
    >>> scores = obd(loss, jnp.array([[2.0], [1.0]]), [(x, y)])
    >>> print(masks_of_scores(scores, 0.5).ravel())  # the larger weight has the smaller input
    [False  True]
    """
    check_weights(params)

    def score(w: Any, h: Any) -> Array:
        # s = 1/2 H w^2
        return 0.5 * h.astype(jnp.float32) * jnp.square(jnp.asarray(w).astype(jnp.float32))

    diagonal = curvature(loss_fn, params, batches)
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, state_leaves(treedef, diagonal), strict=True)
    return finite_scores(scores_like(params, [score(w, h) for w, h in pairs if is_float_array(w)]))


class Surgery(NamedTuple):
    """What is left after a removal."""

    weights: Array  # [n], exact zeros where removed
    loss: Array  # []: 1/2 dw^T H dw
    inverse_hessian: Array  # [n, n] of those that stay; zeros in the other rows and columns


@on_any_mesh
def obs(w: Array, inverse_hessian: Array, remove: Any) -> Surgery:
    """Removes weights and moves the others to where 1/2 dw^T H dw is smallest.

    Args:
      w: [n] floats.
      inverse_hessian: [n, n], symmetric, positive definite; or what an earlier removal gave, in
        which case what has been removed stays so.
      remove: bool [n], the set to remove; or one index, which may be traced.

    Returns:
      Surgery; float32 (float64 if w is), weights in the dtype of w.

    Raises:
      ValueError: shapes that do not fit, an index out of range; (eager) an inverse Hessian that is
        not positive definite where it must be.
      TypeError: `remove` is neither.

    Source: Hassibi and Stork 1993, Second order derivatives for network pruning.

    >>> h = jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> out = obs(jnp.array([1.0, 1.0]), jnp.linalg.inv(h), 0)
    >>> print(out.weights, out.loss)
    [0.  1.5] 0.75
    """
    w, inverse_hessian, remove = map(jnp.asarray, (w, inverse_hessian, remove))
    check_weights(w)
    n = w.shape[0] if w.ndim == 1 else -1
    if inverse_hessian.shape != (n, n) or not is_float_array(w):
        raise ValueError(
            f"obs needs floats w [n] and inverse_hessian [n, n], got {w.dtype.name} {w.shape} and "
            f"{inverse_hessian.shape}"
        )
    if remove.dtype == bool and remove.shape == (n,):
        run = _remove_set
    elif jnp.issubdtype(remove.dtype, jnp.integer) and remove.ndim == 0:
        run = _remove_one
        if not holds(lambda p: (p >= 0) & (p < n), remove):
            raise ValueError(f"remove must be in [0, {n}), got {remove}")
    else:
        raise TypeError(
            f"remove must be bool [{n}] or one index, got {remove.dtype.name} {remove.shape}"
        )
    found = run(w, inverse_hessian, remove)
    if not holds(jnp.isfinite, found.loss):
        raise ValueError(
            "inverse_hessian must be finite and positive definite where weights are removed"
        )
    return found


@jax.jit
def _remove_one(w: Array, inverse_hessian: Array, p: Array) -> Surgery:
    weights, inverse = widened(w), widened(inverse_hessian)
    column = inverse[:, p]
    pivot = jnp.where(column[p] > 0, column[p], jnp.nan)
    gone = jnp.arange(w.shape[0]) == p
    # dw = -(w_p / [H^-1]_pp) H^-1 e_p, dL = w_p^2 / (2 [H^-1]_pp)
    loss = jnp.square(weights[p]) / (2 * pivot)
    weights = jnp.where(gone, 0, weights - (weights[p] / pivot) * column)
    # H^-1 <- H^-1 - H^-1_:p H^-1_p: / [H^-1]_pp
    rest = inverse - column[:, None] * (column / pivot)[None]
    return Surgery(weights.astype(w.dtype), loss, _without(rest, gone))


@jax.jit
def _remove_set(w: Array, inverse_hessian: Array, gone: Array) -> Surgery:
    weights, inverse = widened(w), widened(inverse_hessian)
    # [H^-1]_SS between the ones of an identity, so that the size of S need not be known
    both = gone[:, None] & gone[None]
    factor = jnp.linalg.cholesky(jnp.where(both, inverse, jnp.eye(len(w), dtype=inverse.dtype)))
    solve = lambda x: cho_solve((factor, True), x)
    taken = jnp.where(gone, weights, 0)
    pull = solve(taken)
    # dw = -H^-1_:S (H^-1_SS)^-1 w_S, dL = 1/2 w_S^T (H^-1_SS)^-1 w_S
    weights = jnp.where(gone, 0, weights - _matmul(inverse, pull))
    loss = 0.5 * jnp.sum(taken * pull)
    # H^-1 <- H^-1 - H^-1_:S (H^-1_SS)^-1 H^-1_S:
    rows = jnp.where(gone[:, None], inverse, 0)
    rest = inverse - _matmul(rows.T, solve(rows))
    return Surgery(weights.astype(w.dtype), loss, _without(rest, gone))


def _without(inverse: Array, gone: Array) -> Array:
    return jnp.where(gone[:, None] | gone[None], 0, inverse)
