"""Distillation losses on the relations between the examples of a batch.

All take the global batch: under jit with a sharded batch they give what one device gives. They
look at relations that do not change with the scale of the features, so that features are first
divided by their typical length, which leaves values and gradients as they are. Lengths below
`_FLOOR` of it (dead or equal examples) count as that, which bounds the gradients. (The bilinear
kernel of `cckd_bilinear` is a polynomial, used as it is.)
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcompress.distill.features.feature_arrays import (
    check_same_examples,
    float32_pair,
    matmul,
    norm,
    unit,
)
from jaxcompress.distill.masks import count_of, kept_rows, zeroed

_FLOOR = 1e-3
_EQUAL = 1e-5


def similarity_preserving(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """|G_t - G_s|_F^2 / N^2, G the products F F^T with rows of length 1.

    At most 4 / N. Does not change when features are rotated or scaled; numbers of features may
    differ. The usual weight is 3000.

    Args:
      student, teacher: [N, ...], flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.

    The teacher gets no gradient.

    Raises:
      ValueError: not the same N.

    Source: Tung and Mori 2019, Similarity-preserving knowledge distillation, arXiv 1907.09682,
    section 3.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> print(similarity_preserving(3 * x, x).round(6))
    0.0
    """
    keep, s, t = _rows(student, teacher, where)
    g_s, g_t = (unit(_scaled(matmul(f, f.T)), _FLOOR) for f in (s, t))
    return _over_tuples((g_t - g_s) ** 2, keep)


def rkd_distance(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """mean over i, j of huber(d_s / mean d_s - d_t / mean d_t), d = |x_i - x_j|.

    The mean distance is over i != j. 0 where the student's embedding is the teacher's, rotated,
    shifted, scaled, in however many dimensions. The usual weight is 25. Needs N^2 D
    numbers at once.

    Args:
      student, teacher: [N, ...] embeddings, flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.

    The teacher gets no gradient. Distances below 1e-5 of the embeddings' length count as 0 and
    have no gradient.

    Raises:
      ValueError: not the same N, or N < 2.

    Source: Park et al. 2019, Relational knowledge distillation, arXiv 1904.05068, section 3.

    >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
    >>> print(rkd_distance(2 * x + 1, x).round(6))
    0.0
    """
    keep, s, t = _rows(student, teacher, where, at_least=2)
    count = count_of(keep, len(s))
    pairs = jnp.maximum(count * (count - 1), 1)

    def relative(x: Array) -> Array:
        d = _among(norm(_differences(x)), keep)
        return d / jnp.maximum(jnp.sum(d) / pairs, _FLOOR)

    return _over_tuples(optax.huber_loss(relative(s), relative(t)), keep)


def rkd_angle(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """mean over i, j, k of huber(cos_s - cos_t), the cosine of the angle at x_i from x_j to x_k.

    0 where the student's embedding is the teacher's, rotated, shifted, scaled, in however many
    dimensions. The usual weight is 50. Needs N^3 + N^2 D numbers at once.

    Args:
      student, teacher: [N, ...] embeddings, flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.

    The teacher gets no gradient. Cosines at x_i to itself or its equals count as 0.

    Raises:
      ValueError: not the same N, or N < 3.

    Source: Park et al. 2019, Relational knowledge distillation, arXiv 1904.05068, section 3, the
    mean over all triples as in its code.

    >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
    >>> print(rkd_angle(2 * x + 1, x).round(6))
    0.0
    """
    keep, s, t = _rows(student, teacher, where, at_least=3)

    def cosines(x: Array) -> Array:
        e = unit(_differences(x), _FLOOR)
        return matmul(e, jnp.swapaxes(e, 1, 2))

    return _over_tuples(optax.huber_loss(cosines(s), cosines(t)), keep)


def pkt(
    student: Array,
    teacher: Array,
    *,
    epsilon: float | Array = 1e-7,
    where: Array | None = None,
) -> Array:
    """mean over i, j of P_t log((P_t + epsilon) / (P_s + epsilon)).

    P are the cosines, mapped to (1 + cos) / 2 and divided by the sums of their rows. Does not
    change when features are rotated or single examples scaled. The usual weight is 30000.

    Args:
      student, teacher: [N, ...], flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.
      epsilon: may be traced.

    The teacher gets no gradient.

    Raises:
      ValueError: not the same N.

    Source: Passalis and Tefas 2018, Learning deep representations with probabilistic knowledge
    transfer, arXiv 1803.10837, section 3, the mean over N^2 as in its code.

    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> print(pkt(x * jnp.array([[2.0], [3.0]]), x).round(6))
    0.0
    """
    keep, s, t = _rows(student, teacher, where)
    epsilon = jnp.asarray(epsilon, jnp.float32)

    def probabilities(x: Array) -> Array:
        p = _among((jnp.maximum(_cosines(x), -1.0) + 1) / 2, keep)
        total = jnp.sum(p, axis=1, keepdims=True)
        return p / (total if keep is None else jnp.where(keep[:, None], total, 1.0))

    p_s, p_t = probabilities(s), probabilities(t)
    return _over_tuples(p_t * (jnp.log(p_t + epsilon) - jnp.log(p_s + epsilon)), keep)


def cckd(
    student: Array,
    teacher: Array,
    *,
    gamma: float | Array = 0.4,
    order: int = 2,
    where: Array | None = None,
) -> Array:
    """|K_s - K_t|_F^2 / N^2, K the Gaussian kernel of normalized features, as a Taylor series.

    K_ij = sum_(p <= order) exp(-2 gamma) (2 gamma)^p / p! cos(x_i, x_j)^p, which becomes
    exp(-gamma |x_i - x_j|^2). Does not change when features are rotated or single examples scaled.
    The usual weight is 0.02.

    Args:
      student, teacher: [N, ...], flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.
      gamma: may be traced.
      order: at least 1.

    The teacher gets no gradient.

    Raises:
      ValueError: not the same N, or `order` below 1.

    Source: Peng et al. 2019, Correlation congruence for knowledge distillation, arXiv 1904.01802,
    section 3.

    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> print(cckd(5 * x, x).round(6))
    0.0
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    keep, s, t = _rows(student, teacher, where)
    gamma = jnp.asarray(gamma, jnp.float32)
    weights = [
        jnp.exp(-2 * gamma) * (2 * gamma) ** p / float(math.factorial(p)) for p in range(order + 1)
    ]

    def kernel(x: Array) -> Array:
        cos = _cosines(x)
        total = jnp.full_like(cos, 0.0)
        for weight in reversed(weights):
            total = total * cos + weight
        return total

    return _over_tuples((kernel(s) - kernel(t)) ** 2, keep)


def cckd_bilinear(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """|K_s - K_t|_F^2 / N^2, K = F F^T: correlation congruence with the bilinear kernel.

    Does not change when features are rotated, but does with their scale.

    Args:
      student, teacher: [N, ...], flattened, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. The loss is that of a batch of those
        alone, 0 without any.

    The teacher gets no gradient.

    Raises:
      ValueError: not the same N.

    Source: Peng et al. 2019, Correlation congruence for knowledge distillation, arXiv 1904.01802,
    section 3.

    >>> print(cckd_bilinear(jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1))))  # (1 + 4 + 4 + 16) / 4
    6.25
    """
    check_same_examples(student, teacher)
    keep = kept_rows(where, student.shape[:1])
    pair = zeroed(keep, *float32_pair(student, teacher))
    s, t = (f.reshape(len(f), -1) for f in pair)
    return _over_tuples((matmul(s, s.T) - matmul(t, t.T)) ** 2, keep)


def _rows(
    student: Array, teacher: Array, where: Array | None, *, at_least: int = 1
) -> tuple[Array | None, Array, Array]:
    # which examples count, and the scaled rows of both, zeros where they do not
    check_same_examples(student, teacher, at_least=at_least)
    keep = kept_rows(where, student.shape[:1])
    s, t = zeroed(keep, *float32_pair(student, teacher))
    s, t = (_scaled(f.reshape(len(f), -1), keep) for f in (s, t))
    return keep, s, t


def _among(values: Array, keep: Array | None) -> Array:
    # values [N, N] or [N, N, N]: 0 where one of the examples does not count
    if keep is None:
        return values
    for axis in range(values.ndim):
        others = [a for a in range(values.ndim) if a != axis]
        values = jnp.where(jnp.expand_dims(keep, others), values, 0.0)
    return values


def _over_tuples(values: Array, keep: Array | None) -> Array:
    # the mean over pairs or triples of examples that count
    if keep is None:
        return jnp.mean(values)
    return jnp.sum(_among(values, keep)) / count_of(keep, len(values)) ** values.ndim


def _scaled(x: Array, keep: Array | None = None) -> Array:
    # Rows of a length around 1. The scale has no gradient and needs none: what follows does not
    # change with it. The largest value goes first, for squares that would overflow or vanish.
    known = jax.lax.stop_gradient(x)
    largest = jnp.maximum(jnp.max(jnp.abs(known)), 1e-20)
    squares = jnp.sum((known / largest) ** 2, axis=1)
    mean_square = jnp.sum(squares) / count_of(keep, len(x))
    return x / (largest * jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1.0)))


def _cosines(x: Array) -> Array:
    x = unit(x, _FLOOR)
    return matmul(x, x.T)


def _differences(x: Array) -> Array:
    # [N, N, D]. Those between equal examples, the diagonal too, are 0 by decree: compilers that
    # multiply and subtract in one rounding leave noise there, whose direction means nothing.
    differences = x[None] - x[:, None]
    apart = jnp.sum(differences * differences, axis=-1, keepdims=True) > _EQUAL**2
    return jnp.where(apart, differences, 0.0)
