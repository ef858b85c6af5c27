"""MiniLM's losses on relations between the tokens of a sequence."""

import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import (
    float32_pair,
    masked_mean,
    matmul,
    over_examples,
)
from jaxcompress.distill.logits import kd
from jaxcompress.distill.masks import kept_rows

_MASKED = -1e30  # as a score: e^_MASKED is 0, and differences stay finite


def minilm_relation(
    student: Array | tuple[Array, Array],
    teacher: Array | tuple[Array, Array],
    *,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """mean KL(R_t || R_s) over heads and tokens, R = softmax(X Y^T / sqrt(d)) of a head.

    MiniLM is `minilm_relation((q_s, k_s), (q_t, k_t)) + minilm_relation(v_s, v_t)` of the last
    layer (attention, value relation), MiniLMv2 the sum over queries, keys and values, each with
    itself. The width d of a head may differ between student and teacher, the heads may not.

    Args:
      student, teacher: X = Y, [B, heads, T, d], or a pair X, Y (queries, keys); any float dtype,
        the loss is float32.
      where: [B, T], nonzero where a token counts. Padding is not attended to, has no influence and
        gets no gradient, whatever it holds.
      per_example: give [B], each the mean over its own tokens. With a mask their mean is not the
        scalar, which weighs all tokens alike.

    The teacher gets no gradient. 0 where no token is left.

    Raises:
      ValueError: shapes that do not fit, a `where` that is not [B, T].

    Source: Wang et al. 2020, MiniLM, arXiv 2002.10957, section 3; MiniLMv2, arXiv 2012.15828,
    section 3.

    >>> x = jnp.eye(2).reshape(1, 1, 2, 2)
    >>> print(minilm_relation(-x, x))
    0.0
    """
    student, teacher = _pair("student", student), _pair("teacher", teacher)
    if student[0].shape[:3] != teacher[0].shape[:3]:
        raise ValueError(
            "student and teacher must agree in [B, heads, T], got "
            f"{student[0].shape} and {teacher[0].shape}; reshape one to the heads of the other"
        )
    batch, _, tokens, _ = student[0].shape
    keep = kept_rows(where, (batch, tokens))
    (x_s, x_t), (y_s, y_t) = (float32_pair(s, t) for s, t in zip(student, teacher, strict=True))
    # KL of every row, [B, heads, T]
    loss = kd(_scores(x_s, y_s, keep), _scores(x_t, y_t, keep), temperature=1.0, per_example=True)
    if keep is None:
        return over_examples(loss, per_example)
    return masked_mean(loss, keep[:, None], per_example)


def _pair(name: str, value: Array | tuple[Array, Array]) -> tuple[Array, Array]:
    x, y = value if isinstance(value, tuple | list) else (value, value)
    if x.shape != y.shape or x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"{name} must be [B, heads, T, d] or two such arrays, got {x.shape} and {y.shape}"
        )
    return x, y


def _scores(x: Array, y: Array, keep: Array | None) -> Array:
    if keep is not None:
        x, y = (jnp.where(keep[:, None, :, None], a, 0.0) for a in (x, y))
    scores = matmul(x, jnp.swapaxes(y, -1, -2)) / x.shape[-1] ** 0.5
    return scores if keep is None else jnp.where(keep[:, None, None, :], scores, _MASKED)
