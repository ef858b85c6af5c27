"""Masks that are rewired: of every leaf some weights drop, and as many grow elsewhere."""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    absent_if_empty,
    quartet,
)
from jaxcompress.core.numerics.top_k import top_k_mask
from jaxcompress.prune.masking.mask_state import PruneState, check_owner, hide, pack_masks, prunable
from jaxcompress.prune.masking.schedules import one_shot
from jaxcompress.prune.masking.scopes_of_comparison import Scope
from jaxcompress.prune.masking.scored import renewed
from jaxcompress.prune.saliency.criteria import random


class Growth(NamedTuple):
    """What grows in one leaf; pure functions.

    Attributes:
      score: (w, stats, grad, key) -> scores of the shape of w, not negative; the highest grow.
      init: w -> stats, a tree of arrays; `()` for none.
      accumulate: (stats, grad) -> stats with the same avals, at every `update` with gradients.
      view: (w, mask) -> what `apply` gives: `hide` with any derivative.
      by_gradient: whether there is nothing to grow by without gradients; masks then stay.
    """

    score: Callable[[Array, Any, Any, Array], Array]
    init: Callable[[Array], Any] = lambda w: ()
    accumulate: Callable[[Any, Array], Any] = lambda stats, grad: stats
    view: Callable[[Any, Array], Any] = hide
    by_gradient: bool = False


class Rewiring(NamedTuple):
    """When masks change, and by how much: at every, 2 every, ... before end; None: without end."""

    fraction: Callable[[Array], Any]  # step -> share of the active weights that drop
    every: int
    end: int | None

    def fires(self, step: Array) -> Array:
        regular = step % self.every == 0
        return regular if self.end is None else regular & (step < self.end)


@dataclass(frozen=True)
class Cosine:
    """alpha / 2 (1 + cos(pi t / end)): from alpha to exactly 0 at `end`, and 0 afterwards.

    >>> [round(float(Cosine(0.3, 100)(jnp.int32(t))), 3) for t in (0, 50, 100, 200)]
    [0.3, 0.15, 0.0, 0.0]
    """

    alpha: Any
    end: int

    def __call__(self, step: Array) -> Array:
        done = jnp.minimum(jnp.asarray(step, jnp.float32) / self.end, 1.0)
        # frac(t) = alpha / 2 (1 + cos(pi t / T_end))
        share = jnp.asarray(self.alpha, jnp.float32) / 2 * (1 + jnp.cos(math.pi * done))
        return jnp.where(done < 1, share, 0.0)


def rewire(w: Array, mask: Array, scores: Array, count: Any) -> Array:
    """The mask with `count` of its weights dropped and as many grown; their number stays.

    Those with the smallest |w| drop. The highest scores grow, among all that was not kept: what
    just dropped may return. Ties keep, or grow, the lower flat index; NaN counts as 0.

    Args:
      w: [...] floats.
      mask: bool, the shape of w.
      scores: the shape of w, not negative.
      count: int scalar, may be traced; clipped to [0, number of True].

    >>> w, mask = jnp.array([3.0, 1.0, 0.0, 0.0]), jnp.array([True, True, False, False])
    >>> rewire(w, mask, jnp.array([9.0, 0.5, 0.1, 0.7]), 1).tolist()
    [True, False, False, True]
    """
    active = jnp.sum(mask, dtype=jnp.int32)
    count = jnp.clip(jnp.asarray(count, jnp.int32), 0, active)
    # keep the top nnz - k of the active ones by |w|
    kept = top_k_mask(_among(mask, jnp.abs(w)), active - count)
    # grow the top k among all that is not kept
    return kept | top_k_mask(_among(~kept, scores), count)


def _among(allowed: Array, scores: Array) -> Array:
    zero, low = (jnp.array(x, scores.dtype) for x in (0, -1))
    return jnp.where(allowed, jnp.where(jnp.isnan(scores), zero, scores), low)


def by_growth(
    growth: Growth,
    sparsity: float,
    *,
    key: Array,
    rewiring: Rewiring,
    scope: str | Scope,
    min_ndim: int = 2,
) -> Compressor:
    """A random mask of exact density that `update` rewires; the counts of all leaves stay.

    k = floor(fraction * nnz) weights of every leaf drop and grow. Randomness comes from the key,
    the step and the leaf's path: the same on every host and on any number of devices.

    Args:
      growth: what grows.
      sparsity: in [0, 1].
      key: a JAX random key, of the mask at the start and of random growth.
      rewiring: when, and how many. A step is a call of `update`, the first is step 1.
      scope: which counts the leaves have, as in `by_score`.
      min_ndim: leaves with fewer axes stay dense, and so do integers.

    Raises:
      ValueError: a sparsity or a number `fraction` outside [0, 1], `every` or `end` below 1; as
        `by_score`.
    """
    _check(rewiring)
    start = random(one_shot(sparsity), key=key, scope=scope, min_ndim=min_ndim)

    def init(params):
        treedef = jax.tree.structure(params)
        masks, step, _ = start.init(params).buffers
        stats = [growth.init(w) if prunable(w, min_ndim) else () for w in jax.tree.leaves(params)]
        kept = absent_if_empty(treedef.unflatten(stats))
        return CompressState(buffers=PruneState(masks, step, kept))

    def apply(params, state):
        check_owner(state)
        return jax.tree.map(growth.view, params, state.buffers.masks)

    @functools.partial(jax.jit, static_argnames="paths")  # an eager loop of updates compiles once
    def renew(weights, masks, stats, grads, step, *, paths):
        if grads is not None:
            stats = list(map(growth.accumulate, stats, grads))
        elif growth.by_gradient:
            return masks, stats
        else:
            grads = [None] * len(weights)

        def new():
            fraction = jnp.asarray(rewiring.fraction(step), jnp.float32)
            rows = zip(paths, weights, masks, stats, grads, strict=True)
            return [
                _rewired(growth, fraction, leaf_key(key, step, row[0]), *row[1:]) for row in rows
            ]

        return lax.cond(rewiring.fires(step), new, lambda: masks), stats

    def update(params, state, *, grads=None, **extra):
        del extra
        return renewed(params, state, grads, renew, min_ndim=min_ndim)

    def pack(params, state):
        return pack_masks(params, state.buffers.masks)

    return quartet(init, apply, update, pack)


def _rewired(growth, fraction, key, w, mask, stats, grad):
    # k = floor(frac * nnz)
    active = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)
    count = jnp.floor(fraction * active).astype(jnp.int32)
    return rewire(w, mask, growth.score(w, stats, grad, key), count)


def leaf_key(key: Array, step: Array, path: str) -> Array:
    """The random key of a leaf at a step."""
    return jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(path.encode()))


def _check(rewiring: Rewiring) -> None:
    fraction, every, end = rewiring
    if every < 1 or (end is not None and end < 1):
        raise ValueError(f"rewiring needs every >= 1 and end >= 1, got {every=}, {end=}")
    if not callable(fraction):
        raise TypeError(f"fraction must be step -> share, got {fraction!r}")


def as_fraction(fraction: Any, end: int | None) -> Callable[[Array], Any]:
    """A schedule of the share that drops: a number falls to 0 as a cosine, or stays (end None).

    Raises:
      ValueError: a number outside [0, 1].
    """
    if callable(fraction):
        return fraction
    if isinstance(fraction, int | float | np.number) and not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    return (lambda step: fraction) if end is None else Cosine(fraction, end)
