"""Magnitude pruning: the weights nearest to zero go first."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.prune.masking.scopes_of_comparison import Scope
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


def absolute(w: Array, stats: Any = ()) -> Array:
    """|w|, in the dtype of w, where it is exact."""
    del stats
    return jnp.abs(w)


def magnitude(
    sparsity: Any = None,
    *,
    scope: str | Scope = "layer",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Zeroes the share `sparsity` of the weights with the smallest |w|, exactly.

    In a leaf of N weights (or in all of them together) round((1 - sparsity) * N) are kept; ties
    keep the lower flat index. Masks are renewed by `update` where the schedule fires.

    Args:
      sparsity: a number, `cubic(...)`, or any Optax schedule step -> sparsity; may be traced.
        None where the structure fixes it: `n_m`.
      scope: "layer": the share holds in every leaf; "global": over all leaves together; or
        `erk(...)`, `cost_weighted(...)`.
      structure: what goes as one, by the mean of its |w|; shares are of its units then.
      min_ndim: leaves with fewer axes (biases, norms) stay dense, and so do integers.

    Raises:
      ValueError: a scope of another name, a sparsity outside [0, 1]; (at init, eager) NaN in a
        leaf, with its path.

    Source: Han et al. 2015, arXiv 1506.02626; Zhu and Gupta 2017, arXiv 1710.01878.

    >>> comp = magnitude(0.5)
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, -2.0]]), "bias": jnp.zeros(2)}
    >>> print(comp.apply(params, comp.init(params))["kernel"])
    [[ 3.  0.]
     [ 0. -2.]]
    """
    criterion = Criterion(absolute)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)
