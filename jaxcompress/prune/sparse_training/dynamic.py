"""Sparse from the first step to the last: static masks, SET, RigL, SNFS.

Memory and, on hardware that can skip zeros, work of training are those of the sparse network. Train
with `dynamic_optimizer(tx)`: pruned weights are then exactly 0, and what grows begins at 0 with
moments of 0. `make_step(..., recipe_sees="gradients")` gives `update` the gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.prune.masking.schedules import one_shot
from jaxcompress.prune.masking.scopes_of_comparison import Scope, erk
from jaxcompress.prune.saliency.criteria import random
from jaxcompress.prune.saliency.score_trees import widened
from jaxcompress.prune.sparse_training.backward import hide_through
from jaxcompress.prune.sparse_training.rewiring import Growth, Rewiring, as_fraction, by_growth

_ERK = erk()


def static_sparse(
    sparsity: float, *, key: Array, scope: str | Scope = _ERK, min_ndim: int = 2
) -> Compressor:
    """A random mask of exact density that never changes: the control for all that rewire.

    Args:
      sparsity: share of zeros in [0, 1].
      key: a JAX random key; with it and a leaf's path the mask is given.
      scope: which counts the leaves have: "layer" for a uniform share, "global", `erk(...)`.
      min_ndim: leaves with fewer axes stay dense, and so do integers.

    Raises:
      ValueError: a sparsity outside [0, 1]; (at init, eager) NaN in a leaf, with its path.

    >>> comp = static_sparse(0.75, key=jax.random.key(0), scope="layer")
    >>> int(jnp.sum(comp.init(jnp.ones((10, 8))).buffers.masks))
    20
    """
    return random(one_shot(sparsity), key=key, scope=scope, min_ndim=min_ndim)


def sparse_evolutionary(
    sparsity: float,
    *,
    key: Array,
    every: int = 100,
    fraction: Any = 0.3,
    end: int | None = None,
    scope: str | Scope = _ERK,
    min_ndim: int = 2,
) -> Compressor:
    """SET: the weakest weights of every leaf drop, as many grow at random places.

    Args:
      sparsity, key, scope, min_ndim: as in `static_sparse`; the key is that of growth too.
      every: steps (calls of `update`) from one change of the masks to the next.
      fraction: share of the active weights that drop. With `end` a number falls to 0 as in `rigl`,
        without it stays. Or any Optax schedule step -> share.
      end: step from which masks stay; None: never.

    Raises:
      ValueError: a sparsity or fraction outside [0, 1], every or end below 1; as `static_sparse`.

    Source: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive
    sparse connectivity, arXiv 1707.04780. (There the largest negative and the smallest positive
    weights drop, of both a share.)

    >>> comp = sparse_evolutionary(0.75, key=jax.random.key(0), every=1, scope="layer")
    >>> w = jnp.ones((10, 8))
    >>> before = comp.init(w)
    >>> after = comp.update(w, before).buffers.masks
    >>> int(jnp.sum(after)), bool(jnp.all(after == before.buffers.masks))
    (20, False)
    """
    growth = Growth(lambda w, stats, grad, key: jax.random.uniform(key, w.shape))
    rewiring = Rewiring(as_fraction(fraction, end), every, end)
    return by_growth(growth, sparsity, key=key, rewiring=rewiring, scope=scope, min_ndim=min_ndim)


def rigl(
    sparsity: float,
    *,
    key: Array,
    end: int,
    every: int = 100,
    fraction: Any = 0.3,
    scope: str | Scope = _ERK,
    min_ndim: int = 2,
) -> Compressor:
    """RigL: the weakest weights of every leaf drop, as many grow where |dense gradient| is largest.

    frac(t) = alpha / 2 (1 + cos(pi t / T_end)); at t = every, 2 every, ... < end the k = floor(frac
    nnz) smallest active |w| drop, and of all that is not kept the k largest |g| grow; what just
    dropped may return, with its value. g is the derivative by the view (the mask is straight
    through), which has values at hidden weights too: do not zero gradients before `update`.

    `update` without gradients changes no mask. Gradients are those of one call; under
    `optax.MultiSteps` a call is a micro-step, so count `every` and `end` in these.

    Args:
      sparsity, key, scope, min_ndim: as in `static_sparse`.
      end: T_end, from where on masks stay; the paper's is 75 % of the training.
      every: steps (calls of `update`) from one change of the masks to the next.
      fraction: alpha in [0, 1], or any Optax schedule step -> share.

    Raises:
      ValueError: a sparsity or fraction outside [0, 1], every or end below 1; as `static_sparse`.

    Source: Evci et al. 2020, Rigging the Lottery, arXiv 1911.11134. (There the step at which masks
    change trains no weight: `pausing_optimizer`.)

    >>> comp = rigl(0.5, key=jax.random.key(0), end=100, every=1, fraction=0.5, scope="layer")
    >>> w = jnp.ones((1, 8))
    >>> state = comp.update(w, comp.init(w), grads=jnp.arange(8.0)[None])
    >>> int(jnp.sum(state.buffers.masks)), bool(state.buffers.masks[0, 7])
    (4, True)
    """
    growth = Growth(lambda w, stats, grad, key: jnp.abs(grad), view=hide_through, by_gradient=True)
    rewiring = Rewiring(as_fraction(fraction, end), every, end)
    return by_growth(growth, sparsity, key=key, rewiring=rewiring, scope=scope, min_ndim=min_ndim)


def snfs(
    sparsity: float,
    *,
    key: Array,
    end: int,
    every: int = 100,
    fraction: Any = 0.5,
    decay: float = 0.9,
    scope: str | Scope = _ERK,
    min_ndim: int = 2,
) -> Compressor:
    """SNFS: as `rigl`, but grows where |momentum of the dense gradient| is largest.

    mu <- decay mu + (1 - decay) g at every `update` with gradients; float32, in `stats`, as many as
    dense weights. The counts of the leaves stay: the paper's moving of weights between layers by
    their mean momentum is not done.

    Args:
      sparsity, key, end, every, fraction, scope, min_ndim: as in `rigl`.
      decay: of the momentum, in [0, 1).

    Raises:
      ValueError: a decay outside [0, 1); as `rigl`.

    Source: Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch, arXiv 1907.04840.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def accumulate(stats, grad):
        # mu <- beta mu + (1 - beta) g
        return decay * stats + (1 - decay) * grad.astype(stats.dtype)

    growth = Growth(
        lambda w, stats, grad, key: jnp.abs(stats),
        init=lambda w: jnp.zeros_like(widened(w)),
        accumulate=accumulate,
        view=hide_through,
        by_gradient=True,
    )
    rewiring = Rewiring(as_fraction(fraction, end), every, end)
    return by_growth(growth, sparsity, key=key, rewiring=rewiring, scope=scope, min_ndim=min_ndim)
