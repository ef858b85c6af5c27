"""Scores from one look at the loss, or at none: SNIP, GraSP, SynFlow.

What scores are: see `score_trees`. All leaves are scored, biases too; which are pruned is chosen
with the masks, `scored(scores, schedule)` or `masks_of_scores(scores, sparsity)`, both over all
leaves together unless told otherwise. The functions are compiled once per function and shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxcompress.core.compressor import is_float_array
from jaxcompress.core.numerics.top_k import keep_count, top_k_masks
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.prune.masking.mask_state import prunable
from jaxcompress.prune.masking.schedules import check_sparsity
from jaxcompress.prune.saliency import exponents
from jaxcompress.prune.saliency.score_trees import (
    Loss,
    check_weights,
    finite_scores,
    float_leaves,
    scores_like,
)


@on_any_mesh
def snip(loss_fn: Loss, params: Any, batch: tuple[Any, ...]) -> Any:
    """|dL/dm| / sum |dL/dm|, m gates on the weights at m = 1: what the loss feels of a removal.

    dL/dm = w dL/dw, so this is the saliency |w g| as a share of the whole. Meant for a network at
    its initialisation and one batch, selected over all leaves together.

    Args:
      loss_fn: (params, *batch) -> scalar.
      params: any tree.
      batch: what loss_fn takes after the params.

    Returns:
      float32 scores that sum to 1 (to 0 where all gradients vanish).

    Raises:
      ValueError: (eager) NaN in a weight, NaN or Inf in a gradient, with the path.

    Source: Lee et al. 2019, SNIP, arXiv 1810.02340.

    >>> from jaxcompress.prune import scored
    >>> w, x = jnp.array([[1.0, -2.0, 3.0]]), jnp.array([[6.0, 1.0, 0.0]])
    >>> scores = snip(lambda w, x: jnp.sum(w * x), w, (x,))
    >>> print(scores)
    [[0.75 0.25 0.  ]]
    >>> recipe = scored(scores, 1 / 3)
    >>> print(recipe.apply(w, recipe.init(w)))
    [[ 1. -2.  0.]]
    """
    check_weights(params)
    return finite_scores(_snip(params, tuple(batch), loss_fn=loss_fn))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _snip(params, batch, *, loss_fn):
    weights, join = float_leaves(params)
    gradients = jax.grad(lambda w: loss_fn(join(w), *batch))(weights)
    # s = |w g| / sum |w g|
    sizes = [jnp.abs(w * g) for w, g in zip(weights, gradients, strict=True)]
    whole = sum((jnp.sum(s) for s in sizes), start=jnp.float32(0))
    return scores_like(params, [s / jnp.where(whole > 0, whole, 1) for s in sizes])


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of [..., classes] logits with integer labels, in float32."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(losses)


@on_any_mesh
def grasp(
    apply_fn: Callable[..., Any],
    params: Any,
    batch: tuple[Any, ...],
    *,
    temperature: float = 200.0,
    loss: Callable[[Any, Any], Array] = cross_entropy,
) -> Any:
    """w * (H g): what the squared norm of the gradient loses, in part, when a weight goes.

    Removing w changes g^T g by -2 w (H g) to first order; the score is half of the loss, so that
    weights whose removal would raise the gradient flow go first. H g is one Jacobian-vector product
    of the gradient. (The paper's S is -w * (H g), and the highest S goes.)

    Args:
      apply_fn: (params, *inputs) -> logits.
      params: any tree, at initialisation.
      batch: (*inputs, labels).
      temperature: logits are divided by it, in gradient and Hessian alike.
      loss: (logits / temperature, labels) -> scalar.

    Returns:
      float32 scores of either sign; select over all leaves together.

    Raises:
      ValueError: a temperature that is not positive; as `snip`.

    Source: Wang et al. 2020, GraSP, arXiv 2002.07376.

    >>> apply = lambda w, x: x @ w
    >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> scores = grasp(apply, w, (x, jnp.array([1])), temperature=1.0)
    >>> from jaxcompress.prune import masks_of_scores
    >>> print(masks_of_scores(scores, 0.25).sum())
    3
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_weights(params)
    found = _grasp(params, tuple(batch), temperature, apply_fn=apply_fn, loss=loss)
    return finite_scores(found)


@functools.partial(jax.jit, static_argnames=("apply_fn", "loss"))
def _grasp(params, batch, temperature, *, apply_fn, loss):
    weights, join = float_leaves(params)
    *inputs, labels = batch

    def objective(w):
        logits = apply_fn(join(w), *inputs)
        return loss(jax.tree.map(lambda z: z / jnp.asarray(temperature, z.dtype), logits), labels)

    gradient = jax.grad(objective)
    # H g = d/dt grad L(w + t g) at t = 0
    _, product = jax.jvp(gradient, (weights,), (gradient(weights),))
    return scores_like(params, [w * h for w, h in zip(weights, product, strict=True)])


@on_any_mesh
def synflow(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    sparsity: float,
    rounds: int = 100,
    min_ndim: int = 2,
) -> Any:
    """|w| dR/d|w| / R with R = 1^T f(|params|, 1), re-scored in rounds of growing sparsity.

    After round k the share d^(k / rounds) is kept, d = 1 - sparsity, over all leaves with
    `min_ndim` axes together; what went in it has the score k - rounds - 1, what stayed to the end
    is not negative. So the best keep_count(N, sparsity) scores, over those leaves, are the
    survivors, exactly; and at the density of any round before, its survivors.

    Needs no data and no labels. Every floating leaf is taken by its absolute value, floating inputs
    are ones, integers stay. For BatchNorm give `apply_fn` in inference mode, with its statistics
    among the params: at initialisation (mean 0) R is a sum of positive paths; a mean that is not 0
    is subtracted by its absolute value, as in the authors' code. R is evaluated with an exponent
    per array (`exponents`), so that deep networks do not overflow, and scores are shares of R:
    those of a layer without bias that all paths cross sum to 1.

    Args:
      apply_fn: (params, *inputs) -> outputs, pure.
      params: any tree.
      inputs: arrays of the right shapes; one example is enough.
      sparsity: of the last round, in [0, 1].
      rounds: 1 or more; one round removes layers whole.
      min_ndim: leaves with fewer axes are scored but not pruned.

    Raises:
      ValueError: a sparsity outside [0, 1], no round; as `snip`.

    Source: Tanaka et al. 2020, Pruning neural networks without any data, arXiv 2006.05467.

    >>> from jaxcompress.prune import masks_of_scores
    >>> params = {"up": jnp.array([[1.0, -2.0]]), "down": jnp.array([[3.0], [1.0]])}
    >>> fn = lambda p, x: x @ p["up"] @ p["down"]
    >>> scores = synflow(fn, params, jnp.ones((1, 1)), sparsity=0.5, rounds=2)
    >>> print(masks_of_scores(scores, 0.5)["up"])  # 1 * 3 is a larger path than 2 * 1
    [[ True False]]
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    check_sparsity("sparsity", sparsity)
    check_weights(params)
    chosen = [w for w in jax.tree.leaves(params) if prunable(w, min_ndim)]
    size = sum(w.size for w in chosen)
    density = 1 - float(sparsity)
    shares = [1 - density ** (k / rounds) for k in range(1, rounds)]
    keep = jnp.array([keep_count(size, s) for s in (*shares, sparsity)], jnp.int32)
    return finite_scores(_synflow(params, inputs, keep, apply_fn=apply_fn, min_ndim=min_ndim))


@functools.partial(jax.jit, static_argnames=("apply_fn", "min_ndim"))
def _synflow(params, inputs, keep, *, apply_fn, min_ndim):
    weights, join = float_leaves(params, jnp.float32)
    sizes = [jnp.abs(w) for w in weights]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape) if is_float_array(x) else x, inputs)
    closed = jax.make_jaxpr(lambda w: apply_fn(join(w), *ones))(sizes)
    pruned = [i for i, w in enumerate(weights) if w.ndim >= min_ndim]
    rounds = len(keep)

    def score(lasted, k):
        masks = {i: n >= k for i, n in zip(pruned, lasted, strict=True)}
        alive = [jnp.where(masks[i], w, 0) if i in masks else w for i, w in enumerate(sizes)]
        return [w * g for w, g in zip(alive, jax.grad(_log_flow)(alive, closed), strict=True)]

    def step(k, carry):
        lasted, _ = carry
        scores = score(lasted, k)
        ranks = [
            jnp.where(n >= k, scores[i], -jnp.inf) for i, n in zip(pruned, lasted, strict=True)
        ]
        kept = top_k_masks(ranks, keep[k])
        new = [n + m.astype(jnp.int32) for n, m in zip(lasted, kept, strict=True)]
        return new, scores

    none = [jnp.zeros(weights[i].shape, jnp.int32) for i in pruned]
    lasted, scores = lax.fori_loop(0, rounds, step, (none, sizes))
    # A network that is no sum of positive paths may have negative scores.
    lowest = [jnp.min(scores[i], initial=0.0) for i in pruned]
    floor = functools.reduce(jnp.minimum, lowest, jnp.float32(0))
    for i, n in zip(pruned, lasted, strict=True):
        gone = (n - rounds).astype(jnp.float32)
        scores[i] = jnp.where(n == rounds, scores[i] - floor, gone)
    return scores_like(params, scores)


def _log_flow(weights: list[Array], closed: Any) -> Array:
    # Something with the gradient of log |R|: R over its own size held fixed, 0 where R = 0.
    flow = exponents.total(exponents.evaluate(closed, weights)).value
    size = lax.stop_gradient(jnp.abs(flow))
    return flow / jnp.where(size > 0, size, 1)
