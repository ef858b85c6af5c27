"""Soft movement pruning: gates of 0 or 1 from scores in `learned`, which Optax moves.

The soft variant of `movement`: a threshold in place of a count, so how sparse a leaf becomes is up
to `soft_movement_penalty` in the loss.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, per_leaf
from jaxcompress.prune.masking.mask_state import prunable, refuse_nan
from jaxcompress.prune.soft.gates import gate_values, packing, weights_per_gate


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scores"], meta_fields=["size"])
@dataclass(frozen=True)
class MovementScores:
    """The learned part of `soft_movement` of a leaf.

    Attributes:
      scores: float32, the leaf's shape, 1 where an axis shares its scores.
      size: weights per score.
    """

    scores: Array
    size: int


def soft_movement(
    *,
    threshold: float = 0.1,
    initial: float = 0.0,
    axis: int | tuple[int, ...] | None = None,
    min_ndim: int = 2,
) -> Compressor:
    """w m with m = 1[sigmoid(S) > threshold] and learned S, straight through: dL/dS = w dL/dw'.

    w' = w m is what the network sees, so a score falls where descent takes its weight towards zero,
    hidden ones too: they may come back. Hidden weights themselves get no gradient and stay. Add a
    multiple of `soft_movement_penalty(state)` to the loss: nothing else makes zeros of weights that
    grow.

    Args:
      threshold: tau, in (0, 1); 0.1 is the published one.
      initial: S at the start, where everything is kept if sigmoid(initial) > threshold.
      axis: axes with scores of their own: -1, one per output of a Flax kernel, whose derivative is
        then the sum over its weights; None: one per weight.
      min_ndim: leaves with fewer axes pass unchanged.

    `learned` holds `MovementScores` for each leaf it acts on.

    Raises:
      ValueError: a threshold outside (0, 1), `initial` not finite; (at init) an axis that a leaf
        does not have, NaN in a leaf (eager), with its path; a state of another compressor.

    Source: Sanh et al. 2020, Movement Pruning, arXiv 2005.07683, section 4.

    >>> comp = soft_movement()
    >>> w = jnp.array([[4.0, -3.0]])
    >>> state = comp.init(w)
    >>> slope = jax.grad(lambda s: jnp.sum(comp.apply(w, state._replace(learned=s))))(state.learned)
    >>> print(slope.scores)  # of a loss that grows with both weights: -3 moves away from zero
    [[ 4. -3.]]
    >>> moved = jax.tree.map(lambda s, g: s - g, state.learned, slope)
    >>> print(comp.apply(w, state._replace(learned=moved)))
    [[ 0. -3.]]
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    if not math.isfinite(initial):
        raise ValueError(f"initial must be finite, got {initial}")
    # sigmoid(S) > tau as S > ln(tau / (1 - tau)): nothing is rounded that could tip a gate
    lowest = math.log(threshold) - math.log1p(-threshold)

    def init(w: Array) -> CompressState:
        if not prunable(w, min_ndim):
            return CompressState()
        refuse_nan(w)
        scores = gate_values(w, initial, axis)
        return CompressState(learned=MovementScores(scores, weights_per_gate(w.shape, axis)))

    def apply(w: Array, state: CompressState) -> Array:
        if not prunable(w, min_ndim):
            return w
        if not isinstance(state.learned, MovementScores):
            raise ValueError("the state holds no scores: it was made by another compressor")
        return _masked(w, state.learned.scores, lowest)

    return per_leaf(init, apply, pack=packing(apply))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _masked(w: Array, scores: Array, lowest: float) -> Array:
    # m = 1[S > ln(tau / (1 - tau))], w' = w m
    return jnp.where(scores > lowest, w, jnp.zeros((), w.dtype))


@_masked.defjvp
def _masked_jvp(lowest: float, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (w, scores), (dw, ds) = primals, tangents
    # dw' = m dw + w dS
    moved = (w.astype(jnp.float32) * ds).astype(w.dtype)
    return _masked(w, scores, lowest), _masked(dw, scores, lowest) + moved


def soft_movement_penalty(state: CompressState) -> Array:
    """sum sigmoid(S) over the weights that have a score, float32 []; differentiable in `learned`.

    Args:
      state: of a recipe that holds `soft_movement` anywhere; 0 if it does not.

    >>> comp = soft_movement(axis=-1)
    >>> print(soft_movement_penalty(comp.init(jnp.ones((4, 25)))))
    50.0
    """
    is_scores = lambda node: isinstance(node, MovementScores)
    found = [s for s in jax.tree.leaves(state.learned, is_leaf=is_scores) if is_scores(s)]
    sums = [s.size * jnp.sum(jax.nn.sigmoid(s.scores)) for s in found]
    return sum(sums, start=jnp.zeros((), jnp.float32))
