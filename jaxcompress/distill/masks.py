"""Which examples or tokens of a batch count: the masks that all losses take as `where`.

What does not count is replaced by zeros before anything is computed from it: it has no influence
and gets no gradient, whatever it holds, NaN too.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array


def kept_rows(
    where: Array | None,
    shape: tuple[int, ...],
    *,
    labels: Array | None = None,
    ignore_label: int | None = None,
) -> Array | None:
    """bool of `shape`: where the mask is not zero and the label is not the ignored one.

    Args:
      where: a mask of `shape`, or None: all count.
      labels: integers of `shape`, needed for `ignore_label`.
      ignore_label: a label that marks what does not count, -100 say; None: no label does.

    Returns:
      None where there is neither mask nor label.

    Raises:
      ValueError: the mask has another shape.

    >>> labels = jnp.array([2, -100, 0])
    >>> print(kept_rows(jnp.array([1, 1, 0]), (3,), labels=labels, ignore_label=-100))
    [ True False False]
    """
    if where is not None and jnp.shape(where) != shape:
        raise ValueError(f"where must be a mask of shape {shape}, got {jnp.shape(where)}")
    keep = None if where is None else jnp.asarray(where).astype(bool)
    if ignore_label is None or labels is None or jnp.issubdtype(labels.dtype, jnp.floating):
        return keep
    counted = labels != jnp.asarray(ignore_label, labels.dtype)
    return counted if keep is None else keep & counted


def zeroed(keep: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """The arrays [*keep's shape, ...] with zeros where `keep` is False."""
    if keep is None:
        return arrays
    return tuple(
        jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim)), x, jnp.zeros((), x.dtype))
        for x in arrays
    )


def count_of(keep: Array | None, total: int) -> Any:
    """How many count, float32 and at least 1; `total` without a mask."""
    if keep is None:
        return total
    return jnp.maximum(jnp.sum(keep, dtype=jnp.float32), 1.0)


def reduced(losses: Array, per_example: bool, keep: Array | None = None) -> Array:
    """The losses [...], or their mean; with a mask 0 where it is False, and the mean of the rest.

    The mean of nothing is 0.
    """
    if keep is None:
        return losses if per_example else jnp.mean(losses)
    losses = jnp.where(keep, losses, 0.0)
    return losses if per_example else jnp.sum(losses) / count_of(keep, losses.size)


def poisoned(losses: Array, labels: Array, classes: int) -> Array:
    """The losses, NaN with NaN gradients where a label is none of 0 to classes - 1.

    Under `jit` nothing can be raised, and a finite loss would hide the mistake.
    """
    known = (labels >= 0) & (labels < classes)
    return losses * jnp.where(known, 1.0, jnp.nan)
