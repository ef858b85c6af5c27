"""Criteria: the three readings of L1, random, Taylor, movement, LAMP.

What scores are, and how they become masks: see `score`.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.core.numerics.top_k import top_k_mask
from jaxcompress.prune.channels.filters import filter_norms
from jaxcompress.prune.masking.magnitudes import absolute, magnitude
from jaxcompress.prune.masking.schedules import Constant
from jaxcompress.prune.masking.scopes_of_comparison import Scope, Units
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure, channel
from jaxcompress.prune.saliency.score_trees import widened
from jaxcompress.prune.sparse_training.backward import hide_through


class _AboveMean:
    # Selects by a number, so that how many stay is up to the scores.
    def __init__(self, at_least: int):
        self.at_least = at_least

    def select(self, leaves: Any, sparsity: Any) -> list[Array]:
        # `sparsity` is the multiple c here: keep |w| >= c * ||w||_1 / n
        return [self._mask(units, jnp.asarray(sparsity, jnp.float32)) for units in leaves]

    def _mask(self, units: Units, multiple: Array) -> Array:
        scores = units.scores.astype(jnp.float32)
        mean = jnp.sum(scores) / np.float32(max(scores.size, 1))
        count = jnp.sum(scores >= multiple * mean, dtype=jnp.int32)
        return top_k_mask(scores, jnp.maximum(count, min(self.at_least, scores.size)))


def threshold(multiple: float, *, at_least: int = 1, min_ndim: int = 2) -> Compressor:
    """Zeroes what is below a multiple of the mean magnitude of its leaf: |w| < c ||w||_1 / n.

    The first reading of "threshold from the L1 norm". The share of zeros is not chosen, it follows
    from the distribution: at c = 1 it is 57.5 % of normal weights, 50 % of uniform ones, 63.2 % of
    Laplace's. See `sparsity_of` for what came of it. Of every leaf the `at_least` largest stay. The
    masks are renewed at every `update`.

    Args:
      multiple: c, at least 0; may be traced.
      at_least: weights that stay in every leaf, whatever the threshold.
      min_ndim: leaves with fewer axes stay dense.

    Raises:
      ValueError: a negative `multiple` or `at_least`; (at init, eager) NaN in a leaf.

    >>> comp = threshold(1.0)
    >>> w = jnp.array([[4.0, -1.0], [0.5, -2.5]])  # the mean of |w| is 2
    >>> print(comp.apply(w, comp.init(w)))
    [[ 4.   0. ]
     [ 0.  -2.5]]
    """
    if isinstance(multiple, int | float | np.number) and not multiple >= 0:
        raise ValueError(f"multiple must not be negative, got {multiple}")
    if at_least < 0:
        raise ValueError(f"at_least must not be negative, got {at_least}")
    scope = _AboveMean(at_least)
    return by_score(Criterion(absolute), Constant(multiple), scope=scope, min_ndim=min_ndim)


def quantile(sparsity: Any, *, min_ndim: int = 2) -> Compressor:
    """Zeroes what is below the `sparsity` quantile of |w| of its leaf, with an exact count.

    The second reading of "threshold from the L1 norm": `magnitude` per leaf, by its other name.

    Args, raises: as `magnitude`.

    >>> comp = quantile(0.25)
    >>> w = jnp.array([[4.0, -1.0], [0.5, -2.5]])
    >>> print(comp.apply(w, comp.init(w)))
    [[ 4.  -1. ]
     [ 0.  -2.5]]
    """
    return magnitude(sparsity, scope="layer", min_ndim=min_ndim)


def filter_norm(
    sparsity: Any,
    *,
    axis: int = -1,
    order: float = 1,
    scope: str | Scope = "layer",
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` of the filters with the smallest norms, whole.

    The third reading: sum |F_i| of every filter F_i, a slice of a leaf along `axis`, is ranked. The
    biases of the filters and the layers behind them stay as they are.

    Args:
      sparsity: share of the filters; a number or a schedule.
      axis: of the filters; -1, the outputs of a Flax kernel.
      order: of the norm: 1, 2, any other p > 0, or inf.
      scope: as in `by_score`; norms of layers of different sizes are hard to compare.
      min_ndim: leaves with fewer axes stay dense.

    Raises:
      ValueError: an order that is not positive; as `by_score`.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets, arXiv 1608.08710.

    >>> comp = filter_norm(0.5)
    >>> w = jnp.array([[4.0, -3.0], [0.5, -2.5]])
    >>> print(comp.apply(w, comp.init(w)))
    [[ 0.  -3. ]
     [ 0.  -2.5]]
    """
    if not order > 0:
        raise ValueError(f"order must be positive, got {order}")

    def score(w, stats):
        del stats
        norms = filter_norms(w, axis, order=order)
        wide = jnp.expand_dims(norms, [a for a in range(w.ndim) if a != axis % w.ndim])
        return jnp.broadcast_to(wide, w.shape)

    structure = channel(axis)
    return by_score(Criterion(score), sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def random(
    sparsity: Any,
    *,
    key: Array,
    scope: str | Scope = "layer",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` at random, whatever the weights: the control for other criteria.

    A leaf's scores are uniform numbers of the key and of its path, so they are the same on every
    host, on any number of devices, and at every step: with a growing sparsity masks are nested.

    Args:
      sparsity, scope, structure, min_ndim: as in `by_score`.
      key: a JAX random key.

    Raises:
      ValueError: as `by_score`.

    >>> comp = random(0.75, key=jax.random.key(0))
    >>> int(jnp.sum(comp.init(jnp.ones((10, 8))).buffers.masks))
    20
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    root = key if typed else jax.random.wrap_key_data(key)
    kind = jax.random.key_impl(root)

    def init(path, w):
        del w
        return jax.random.key_data(jax.random.fold_in(root, zlib.crc32(path.encode())))

    def score(w, stats):
        return jax.random.uniform(jax.random.wrap_key_data(stats, impl=kind), w.shape)

    criterion = Criterion(score, init=init)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def _zeros(path: str, w: Array) -> Array:
    del path
    return jnp.zeros_like(widened(w))


def _gathered(w: Array, stats: Array) -> Array:
    del w
    return stats


def taylor(
    sparsity: Any,
    *,
    scope: str | Scope = "global",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` with the smallest sum over the steps of |w g|, g = dL/dw.

    |w g| is |dL/dm| of a gate m = 1 on the weight: what its removal does to the loss, to first
    order. Every `update(params, state, grads=grads)` adds to the sum. Before the first all scores
    are equal and ties keep the lower index, so begin with a sparsity of 0: `one_shot(s, at=step)`,
    `cubic(0, s, ...)`. What is hidden has no gradient, and its score stays. For larger structures
    the mean of |w g| is taken, not the square of the sum of w g.

    Args:
      sparsity, scope, structure, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `by_score`.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning,
    arXiv 1906.10771.

    >>> from jaxcompress.prune.masking.schedules import one_shot
    >>> comp = taylor(one_shot(0.5, at=1))
    >>> w = jnp.array([[4.0, -3.0]])
    >>> state = comp.update(w, comp.init(w), grads=jnp.array([[0.1, 0.5]]))
    >>> print(comp.apply(w, state))
    [[ 0. -3.]]
    """

    def accumulate(w, stats, grad, mask):
        del mask
        return stats + jnp.abs(w.astype(stats.dtype) * grad.astype(stats.dtype))

    criterion = Criterion(_gathered, init=_zeros, accumulate=accumulate)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def movement(
    sparsity: Any,
    *,
    scope: str | Scope = "layer",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` that moves towards zero most: S <- S - w g, the highest S stay.

    g is the derivative by the weight that the network sees, the mask straight through, so hidden
    weights have one too and may come back. For that they must not be zeroed: train with
    `optax.chain(mask_gradients(), tx)`, without `project`, and let `apply` hide them. The paper's
    learning rate of S scales all scores alike, which no mask can tell, so there is none. All begin
    at 0, where ties keep the lower index: begin with a sparsity of 0, as with `taylor`.

    Args:
      sparsity, scope, structure, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `by_score`.

    Source: Sanh et al. 2020, Movement Pruning, arXiv 2005.07683 (the hard variant).

    >>> from jaxcompress.prune.masking.schedules import one_shot
    >>> comp = movement(one_shot(0.5, at=1))
    >>> w = jnp.array([[4.0, -3.0]])
    >>> state = comp.update(w, comp.init(w), grads=jnp.array([[1.0, 1.0]]))
    >>> print(comp.apply(w, state))  # descent takes 4 to 3, and -3 to -4
    [[ 0. -3.]]
    """

    def accumulate(w, stats, grad, mask):
        del mask
        # S <- S - w dL/dw'
        return stats - w.astype(stats.dtype) * grad.astype(stats.dtype)

    criterion = Criterion(_gathered, init=_zeros, accumulate=accumulate, view=hide_through)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)
