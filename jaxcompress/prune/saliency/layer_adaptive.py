"""LAMP: magnitudes that may be compared between layers."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.prune.masking.scopes_of_comparison import Scope
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


def lamp(
    sparsity: Any,
    *,
    scope: str | Scope = "global",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` with the lowest LAMP scores, over all layers together.

    Scores are those of `lamp_scores`; within a layer they order like |w|, and as the highest of
    every layer is 1 no layer is emptied before all others have one weight left.

    Args:
      sparsity, scope, structure, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `by_score`.

    Source: Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning,
    arXiv 2010.07611.
    """
    criterion = Criterion(lambda w, stats: lamp_scores(w))
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def lamp_scores(w: Array) -> Array:
    """w_u^2 / sum of w_v^2 over the v no smaller: the share of each weight in what would be left.

    Of equal weights the one of lower flat index counts as the larger, so that the highest score is
    exactly 1, unless all weights are 0, which then have score 0.

    Args:
      w: [...] floats.

    Returns:
      float32 [...], in [0, 1].

    >>> print(lamp_scores(jnp.array([1.0, -2.0, 0.0, 2.0])))
    [0.11111111 1.         0.         0.5       ]
    """
    if w.size == 0:
        return jnp.zeros(w.shape, jnp.float32)
    size = jnp.abs(w).astype(jnp.float32).ravel()
    # The definition is one of ranks, so that this is a sort; the selection is none.
    order = jnp.argsort(-size, stable=True)
    largest = size[order[0]]
    # Inf / Inf counts as 1, and all that is finite as 0 beside it.
    relative = jnp.where(size == largest, jnp.sign(size), size / jnp.where(largest > 0, largest, 1))
    squares = jnp.square(relative)[order]
    # score_u = w_u^2 / sum_{v: |w_v| >= |w_u|} w_v^2
    ranked = squares / jnp.where(largest > 0, jnp.cumsum(squares), 1.0)
    return jnp.zeros_like(size).at[order].set(ranked, unique_indices=True).reshape(w.shape)
