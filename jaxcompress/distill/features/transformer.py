"""TinyBERT's losses on hidden states and attention scores."""

import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import (
    check_same_shape,
    float32_pair,
    masked_mean,
    over_examples,
)
from jaxcompress.distill.masks import kept_rows


def tinybert_hidden(
    student: Array, teacher: Array, *, where: Array | None = None, per_example: bool = False
) -> Array:
    """mean((H_s W - H_t)^2) over the tokens that are not padding; W is a `linear_projector`.

    Args:
      student, teacher: [B, T, D] of one shape, any float dtype; the loss is float32.
      where: [B, T], nonzero where a token counts; None: everywhere. Padding has no influence and
        gets no gradient, whatever it holds.
      per_example: give [B], each the mean over its own tokens. With a mask their mean is not the
        scalar, which weighs all tokens alike.

    The teacher gets no gradient. 0 where no token is left.

    Raises:
      ValueError: the shapes differ, or `where` is not [B, T].

    Source: Jiao et al. 2020, TinyBERT, arXiv 1909.10351, equations 8 and 9.

    >>> print(tinybert_hidden(jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3)), where=jnp.array([[1, 0]])))
    1.0
    """
    check_same_shape(student, teacher, "[B, T, D]", ndim=3)
    s, t = float32_pair(student, teacher)
    if where is None:
        return over_examples((s - t) ** 2, per_example)
    keep = kept_rows(where, s.shape[:2])
    assert keep is not None
    return _masked_squares(s, t, keep[..., None], per_example)


def tinybert_attention(
    student: Array,
    teacher: Array,
    *,
    where: Array | None = None,
    masked_below: float | Array = -100.0,
    per_example: bool = False,
) -> Array:
    """mean((A_s - A_t)^2) of attention scores before the softmax, over heads and token pairs.

    Args:
      student, teacher: [B, heads, T, T] of one shape, any float dtype; the loss is float32.
      where: [B, T], nonzero where a token counts; pairs of such tokens count then. Padding has no
        influence and gets no gradient.
      masked_below: without a mask, scores at or below it count as 0: the code of the paper does
        so with the -10000 that BERT adds to padding. May be traced. (TextBrewer's -1e-3 drops all
        negative scores.)
      per_example: give [B], each the mean over its own pairs. With a mask their mean is not the
        scalar, which weighs all pairs alike.

    The teacher gets no gradient. 0 where no token is left.

    Raises:
      ValueError: the shapes differ or are not [B, heads, T, T], or `where` is not [B, T].

    Source: Jiao et al. 2020, TinyBERT, arXiv 1909.10351, equation 7.

    >>> scores = jnp.array([[[[1.0, -1e4], [2.0, -1e4]]]])
    >>> print(tinybert_attention(scores, jnp.zeros((1, 1, 2, 2))))  # (1 + 4) / 4
    1.25
    """
    check_same_shape(student, teacher, "[B, heads, T, T]", ndim=4)
    if student.shape[2] != student.shape[3]:
        raise ValueError(f"scores must be [B, heads, T, T], got {student.shape}")
    s, t = float32_pair(student, teacher)
    if where is None:
        below = jnp.asarray(masked_below, jnp.float32)
        s, t = (jnp.where(a <= below, 0.0, a) for a in (s, t))
        return over_examples((s - t) ** 2, per_example)
    keep = kept_rows(where, (s.shape[0], s.shape[2]))
    assert keep is not None
    return _masked_squares(s, t, (keep[:, :, None] & keep[:, None, :])[:, None], per_example)


def _masked_squares(s: Array, t: Array, keep: Array, per_example: bool) -> Array:
    # Chosen before the difference, so that padding gets no gradient even where it is NaN.
    return masked_mean((jnp.where(keep, s, 0.0) - jnp.where(keep, t, 0.0)) ** 2, keep, per_example)
