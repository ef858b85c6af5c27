"""Trees of scores, and the floating leaves that gradients are taken of.

Scores are float32 with the structure and shapes of the params, and higher stays; leaves that are no
floats get zeros (a leaf without a shape gets one). Gradients pass through the network in the
dtypes of its weights, scores are computed in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import at_path, holds, is_float_array
from jaxcompress.core.paths import leaves_with_paths

Loss = Callable[..., Array]  # (params, *batch) -> scalar


def float_leaves(params: Any, dtype: Any = None) -> tuple[list[Array], Callable[..., Any]]:
    """The floating leaves, float32 or wider, and the function that puts others in their place.

    That function gives each leaf its own dtype, so that a network computes what it always does; or
    `dtype`, if one is given.
    """
    leaves, treedef = jax.tree.flatten(params)
    at = [i for i, w in enumerate(leaves) if is_float_array(w)]
    kinds = [dtype or leaves[i].dtype for i in at]
    floats = [jnp.asarray(leaves[i]) for i in at]

    def join(new: Sequence[Array]) -> Any:
        filled = list(leaves)
        for i, w, kind in zip(at, new, kinds, strict=True):
            filled[i] = w.astype(kind)
        return treedef.unflatten(filled)

    return [widened(w) for w in floats], join


def widened(w: Array) -> Array:
    """Floats in float32, or as they are if they are no smaller."""
    return w if w.dtype.itemsize >= 4 else w.astype(jnp.float32)


def scores_like(params: Any, scores: Sequence[Array]) -> Any:
    """The tree of scores from those of the floating leaves: float32, zeros elsewhere."""
    leaves, treedef = jax.tree.flatten(params)
    rest = iter(scores)
    zeros = lambda w: jnp.zeros(getattr(w, "shape", ()), jnp.float32)
    filled = [next(rest).astype(jnp.float32) if is_float_array(w) else zeros(w) for w in leaves]
    return treedef.unflatten(filled)


def check_weights(params: Any) -> None:
    """Raises ValueError with the path if a weight is NaN (where values are known)."""
    for path, w in leaves_with_paths(params):
        with at_path(path):
            if is_float_array(w) and not holds(lambda x: ~jnp.isnan(x), w):
                raise ValueError("a weight to score must not be NaN")


def finite_scores(scores: Any) -> Any:
    """The scores.

    Raises:
      ValueError: one of them is not finite (where values are known), with the path.
    """
    for path, s in leaves_with_paths(scores):
        with at_path(path):
            if not holds(jnp.isfinite, s):
                raise ValueError("a gradient of the loss is NaN or Inf")
    return scores
