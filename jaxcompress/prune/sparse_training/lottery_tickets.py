"""Lottery tickets: prune in rounds, and rewind the weights or the learning rate after each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import at_path, holds
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.prune.masking.given_masks import masks_of_scores
from jaxcompress.prune.masking.mask_state import apply_masks, prunable
from jaxcompress.prune.masking.scopes_of_comparison import Scope


class Round(NamedTuple):
    """What a round of `iterative_magnitude` left."""

    masks: Any  # the params' structure, 0-d True for dense leaves
    params: Any  # where the next training begins; pruned weights are exactly 0


def rewind_weights(params_then: Any, masks: Any) -> Any:
    """The params of an earlier step, bit for bit, with exact zeros where `masks` are False.

    Weight rewinding: what training did since is forgotten, but for the masks that came of it.
    Leaves that are no floats are those of the earlier step too.

    Args:
      params_then: a copy of the params at step k (0: the initialisation).
      masks: the params' structure, found in the params now; True keeps, 0-d True: a dense leaf.

    Raises:
      ValueError: masks of another structure or shape.

    Source: Frankle and Carbin 2019, The Lottery Ticket Hypothesis, arXiv 1803.03635; Frankle et al.
    2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv 1912.05671.

    >>> masks = {"w": jnp.array([True, False]), "b": jnp.array(True)}
    >>> print(rewind_weights({"w": jnp.array([1.0, 2.0]), "b": jnp.ones(2)}, masks)["w"])
    [1. 0.]
    """
    try:
        flat = jax.tree.structure(params_then).flatten_up_to(masks)
    except ValueError as error:
        raise ValueError(f"masks do not have the params' structure: {error}") from error
    for (path, w), mask in zip(leaves_with_paths(params_then), flat, strict=True):
        with at_path(path):
            if jnp.ndim(mask) and jnp.shape(mask) != jnp.shape(w):
                raise ValueError(f"the mask has shape {jnp.shape(mask)}, the leaf {jnp.shape(w)}")
    return apply_masks(params_then, masks)


def rewind_schedule(schedule: Callable[[Any], Any], to_step: int) -> Callable[[Any], Any]:
    """The schedule from `to_step` on: step -> schedule(to_step + step).

    Learning rate rewinding: weights keep their values, and training goes on as if it were at
    `to_step`. The last t steps of T are `to_step` = T - t.

    Raises:
      ValueError: a negative step.

    Source: Renda et al. 2020, Comparing Rewinding and Fine-tuning in Neural Network Pruning,
    arXiv 2003.02389.

    >>> rewind_schedule(lambda step: 10 - step, 4)(1)
    5
    """
    if to_step < 0:
        raise ValueError(f"to_step must not be negative, got {to_step}")
    return lambda step: schedule(to_step + step)


def iterative(rounds: int, *, rate: float = 0.2) -> tuple[float, ...]:
    """The sparsities after each of `rounds` rounds that prune the share `rate` of what is left.

    s_r = 1 - (1 - rate)^r, r = 1, ..., rounds.

    Raises:
      ValueError: no round, a rate outside [0, 1].

    >>> [round(s, 4) for s in iterative(3)]
    [0.2, 0.36, 0.488]
    """
    if rounds < 1 or not 0 <= rate <= 1:
        raise ValueError(f"iterative needs rounds >= 1 and rate in [0, 1], got {rounds=}, {rate=}")
    return tuple(1 - (1 - rate) ** r for r in range(1, rounds + 1))


def nested_magnitude_masks(
    params: Any,
    masks: Any,
    sparsity: float,
    *,
    scope: str | Scope = "global",
    min_ndim: int = 2,
) -> Any:
    """Masks of the largest |w| among those that `masks` keep: part of `masks`, of exact count.

    Args:
      params: any tree.
      masks: its structure; 0-d True: nothing of the leaf is pruned yet.
      sparsity: share of zeros of all weights to prune, no lower than that of `masks`.
      scope, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `masks_of_scores`; (eager) a sparsity below that of `masks`.
    """

    def score(w: Any, mask: Array) -> Any:
        if not prunable(w, min_ndim):
            return w
        # What is gone ranks behind weights that are 0 but there.
        return jnp.where(mask, jnp.abs(w), jnp.array(-1, w.dtype))

    scores = jax.tree.map(score, params, masks)
    new = masks_of_scores(scores, sparsity, scope=scope, min_ndim=min_ndim)
    for (path, mask), old in zip(leaves_with_paths(new), jax.tree.leaves(masks), strict=True):
        with at_path(path):
            if not holds(lambda revived: ~revived, mask & ~old):
                raise ValueError(f"sparsity {sparsity} is below that of the masks")
    return new


def iterative_magnitude(
    train_fn: Callable[[Any, Any, int], Any],
    params: Any,
    *,
    rounds: int,
    rate: float = 0.2,
    rewind: Callable[[Any, Any], Any] = apply_masks,
    scope: str | Scope = "global",
    min_ndim: int = 2,
) -> list[Round]:
    """Rounds of: train, prune the share `rate` of the remaining weights with the least |w|, rewind.

    After round r the density is (1 - rate)^r, exactly, and masks are nested.

    Args:
      train_fn: (params, masks, round) -> trained params; round counts from 0. It must keep pruned
        weights out (`masked_optimizer`), and, for learning rate rewinding, use
        `rewind_schedule` from round 1 on.
      params: at the start.
      rounds, rate: as in `iterative`.
      rewind: (trained params, new masks) -> params of the next round. Default: values stay. For
        weight rewinding `lambda trained, masks: rewind_weights(params_at_k, masks)`.
      scope, min_ndim: as in `by_score`.

    Returns:
      `Round`s, the masks and params after each; the last has not been trained again.

    Raises:
      ValueError: as `iterative`; (eager) NaN in a trained weight, with its path.

    Source: Frankle and Carbin 2019, arXiv 1803.03635; Renda et al. 2020, arXiv 2003.02389.

    >>> grow = lambda params, masks, round: jax.tree.map(lambda w: 2 * w, params)
    >>> rounds = iterative_magnitude(grow, jnp.array([[4.0, 1.0, 2.0, 3.0]]), rounds=2, rate=0.5)
    >>> print(rounds[0].params, rounds[1].params)
    [[8. 0. 0. 6.]] [[16.  0.  0.  0.]]
    """
    masks = jax.tree.map(lambda w: jnp.ones((), bool), params)
    left = []
    for r, sparsity in enumerate(iterative(rounds, rate=rate)):
        trained = train_fn(params, masks, r)
        masks = nested_magnitude_masks(trained, masks, sparsity, scope=scope, min_ndim=min_ndim)
        params = rewind(trained, masks)
        left.append(Round(masks, params))
    return left
