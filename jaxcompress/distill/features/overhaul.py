"""The overhaul of feature distillation (OFD): margin ReLU on the teacher, a partial L2 distance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import float32_pair, pool_to
from jaxcompress.distill.masks import kept_rows, reduced, zeroed


def ofd_margin(scale: Array, bias: Array) -> Array:
    """E[x | x < 0] of x ~ N(bias, scale^2) per channel: the margins of OFD's teacher.

    -3 |scale| where P(x < 0) is at most 0.001. Of the BatchNorm before the teacher's ReLU.

    Args:
      scale, bias: [C], the learned gamma and beta, any float dtype.

    Returns float32 [C], never positive.

    Raises:
      ValueError: not two arrays [C] of one shape.

    Source: Heo et al. 2019, A comprehensive overhaul of feature distillation, arXiv 1904.01866,
    section 3.

    >>> round(float(ofd_margin(jnp.ones(1), jnp.zeros(1))[0]), 4)  # -sqrt(2 / pi)
    -0.7979
    """
    if scale.shape != bias.shape or scale.ndim != 1:
        raise ValueError(f"scale and bias must both be [C], got {scale.shape} and {bias.shape}")
    beta = bias.astype(jnp.float32)
    sigma = jnp.abs(scale.astype(jnp.float32))
    z = -beta / jnp.maximum(sigma, 1e-12)
    below = jax.scipy.stats.norm.cdf(z)
    often = below > 1e-3
    # E[x | x < 0] = beta - sigma phi(-beta / sigma) / Phi(-beta / sigma)
    mean = beta - sigma * jax.scipy.stats.norm.pdf(z) / jnp.where(often, below, 1.0)
    return jnp.where(often, mean, -3 * sigma)


def overhaul(
    students: Sequence[Array],
    teachers: Sequence[Array],
    margins: Sequence[Array],
    *,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """sum_i 2^(i - L) d_p(max(f_t, m), r(f_s)) over layers i = 1 to L: OFD.

    d_p(t, s) sums (t - s)^2 over all values of an example except those with s <= t <= 0: where the
    teacher is silent, the student need only be silent too. Features are those before the ReLU.

    Args:
      students: L arrays [N, ..., C_i], connected (`conv_projector`) to the teacher's channels.
      teachers: L arrays [N, ..., C_i]; maps are averaged to the student's size.
      margins: L arrays [C_i], see `ofd_margin`.
      where: [N], nonzero where an example counts; None: all. Others have no influence and no
        gradient; the mean is over those that count, 0 if none does.
      per_example: give [N] instead of the mean.

    Any float dtypes; the loss is float32. The teacher gets no gradient. The usual weight is 1e-3.

    Raises:
      ValueError: not as many of each, or shapes of a layer that do not fit, with its number.

    Source: Heo et al. 2019, A comprehensive overhaul of feature distillation, arXiv 1904.01866,
    section 3; the weights 2^(i - L) are those of its code.

    >>> student, teacher = jnp.array([[-2.0, -0.5, 1.0]]), jnp.array([[-3.0, -3.0, 2.0]])
    >>> print(overhaul([student], [teacher], [jnp.full(3, -1.0)]))  # 0 + 0.25 + 1
    1.25
    """
    if not len(students) == len(teachers) == len(margins) or not students:
        raise ValueError(
            "students, teachers and margins must be as many, at least one of each, got "
            f"{len(students)}, {len(teachers)} and {len(margins)}"
        )
    keep, total = kept_rows(where, students[0].shape[:1]), jnp.zeros((), jnp.float32)
    for i, (student, teacher, margin) in enumerate(zip(students, teachers, margins, strict=True)):
        _check_layer(i, student, teacher, margin)
        weight = 0.5 ** (len(students) - 1 - i)
        student, teacher = zeroed(keep, student, teacher)
        total = weight * _partial_l2(student, teacher, margin) + total
    return reduced(total, per_example, keep)


def _check_layer(i: int, student: Array, teacher: Array, margin: Array) -> None:
    fits = (
        student.ndim == teacher.ndim >= 2
        and (student.shape[0], student.shape[-1]) == (teacher.shape[0], teacher.shape[-1])
        and margin.shape == student.shape[-1:]
    )
    if not fits:
        raise ValueError(
            f"layer {i}: student and teacher must be [N, ..., C] and the margin [C], got "
            f"{student.shape}, {teacher.shape} and {margin.shape}"
        )


def _partial_l2(student: Array, teacher: Array, margin: Array) -> Array:
    # [N]
    s, t = float32_pair(student, teacher)
    m = jax.lax.stop_gradient(margin).astype(jnp.float32)
    t = jnp.maximum(pool_to(t, s.shape[1:-1]), jnp.expand_dims(m, range(t.ndim - 1)))
    distance = jnp.where((s <= t) & (t <= 0), 0.0, (s - t) ** 2)
    return jnp.sum(distance.reshape(len(s), -1), axis=1)
