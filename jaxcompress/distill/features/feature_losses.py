"""Distillation losses on feature maps: [N, ..., C], channels last."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.features.feature_arrays import (
    check_same_shape,
    float32_pair,
    over_examples,
    pool_to,
    pool_to_smaller,
    unit,
)
from jaxcompress.distill.masks import kept_rows, zeroed


def fitnets(
    student: Array, teacher: Array, *, where: Array | None = None, per_example: bool = False
) -> Array:
    """mean((r(f_s) - f_t)^2): hints. Apply the regressor r, a projector, before.

    Args:
      student, teacher: [N, ...] of one shape, any float dtype; the loss is float32.
      where: [N], nonzero where an example counts; None: all. Others have no influence and no
        gradient; the mean is over those that count, 0 if none does.
      per_example: give [N] instead of the mean.

    The teacher gets no gradient. The paper trains up to the hint layer first and then by KD; the
    usual recipe adds it to the loss with weight 100 instead.

    Raises:
      ValueError: the shapes differ.

    Source: Romero et al. 2015, FitNets: hints for thin deep nets, arXiv 1412.6550, equation 3,
    there a sum and halved.

    >>> print(fitnets(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    1.0
    """
    check_same_shape(student, teacher, "[N, ...]")
    keep, s, t = _kept_pair(student, teacher, where)
    return over_examples((s - t) ** 2, per_example, keep)


def attention_transfer(
    student: Array,
    teacher: Array,
    *,
    power: float | Array = 2.0,
    floor: float | Array = 1e-3,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """mean((Q_s - Q_t)^2), Q = F / |F|_2 of an example, F = mean_c |f|^p at every place.

    Between 0 and 2 / places. Does not change when channels are permuted or repeated, signs are
    flipped or an example is scaled; the numbers of channels may differ, and larger maps are
    averaged to the size of the smaller ones.

    Args:
      student, teacher: [N, ..., C], any float dtype; the loss is float32.
      power: p >= 1, may be traced.
      floor: |F| counts as no less than floor^p, so that dead maps have bounded gradients; may be
        traced.
      where: [N], nonzero where an example counts; None: all. Others have no influence and no
        gradient; the mean is over those that count, 0 if none does.
      per_example: give [N] instead of the mean.

    The teacher gets no gradient. The usual weight is 1000.

    Raises:
      ValueError: not the same N or number of axes; a Python power below 1.

    Source: Zagoruyko and Komodakis 2017, Paying more attention to attention, arXiv 1612.03928,
    section 3.1, in the form of its code (the paper's equation 2 has |Q_s - Q_t|_2 unsquared).

    >>> maps = jnp.arange(8.0).reshape(1, 2, 2, 2)
    >>> print(attention_transfer(3 * maps, maps).round(6))
    0.0
    """
    if isinstance(power, int | float) and not power >= 1:
        raise ValueError(f"power must be at least 1, got {power}")
    keep, s, t = _kept_pair(student, teacher, where)
    s, t = pool_to_smaller(s, t)
    # F = mean_c |f|^p, Q = F / |F|_2
    p = jnp.asarray(power, jnp.float32)
    least = jnp.asarray(floor, jnp.float32) ** p
    q_s, q_t = (unit(jnp.mean(jnp.abs(f) ** p, axis=-1).reshape(len(f), -1), least) for f in (s, t))
    return over_examples((q_s - q_t) ** 2, per_example, keep)


def vid_variance(channels: int, *, initial: float = 5.0) -> Array:
    """The learned a of `vid`, float32 [channels], whose variance softplus(a) + 1e-5 is `initial`.

    Raises:
      ValueError: `channels` is below 1, or `initial` not above 1e-5 and finite.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if not (_VARIANCE_FLOOR < initial < math.inf):
        raise ValueError(f"initial must be above {_VARIANCE_FLOOR} and finite, got {initial}")
    # softplus^-1(y) = log(e^y - 1) = y + log(1 - e^-y)
    y = initial - _VARIANCE_FLOOR
    return jnp.full(channels, y + math.log(-math.expm1(-y)), jnp.float32)


_VARIANCE_FLOOR = 1e-5


def vid(
    student: Array,
    teacher: Array,
    raw_variance: Array,
    *,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """mean 1/2 ((r(f_s) - f_t)^2 / v_c + log v_c), v = softplus(raw_variance) + 1e-5.

    The negative log likelihood, less a constant, of the teacher's features under normal
    distributions around the student's, with one learned variance per channel; its minimum is
    where v is the mean squared error of the channel. May be negative. Apply the regressor r
    (`mlp_projector`) before; train `raw_variance` with it.

    Args:
      student, teacher: [N, ..., C] with the same C, any float dtype; the loss is float32. Larger
        maps are averaged to the size of the smaller ones.
      raw_variance: [C], from `vid_variance`.
      where: [N], nonzero where an example counts; None: all. Others have no influence and no
        gradient; the mean is over those that count, 0 if none does.
      per_example: give [N] instead of the mean.

    The teacher gets no gradient. The usual weight is 1.

    Raises:
      ValueError: the channels of the three differ, or the axes.

    Source: Ahn et al. 2019, Variational information distillation for knowledge transfer, arXiv
    1904.05835, and its code.

    >>> loss = vid(jnp.ones((2, 3)), jnp.zeros((2, 3)), vid_variance(3, initial=1.0))
    >>> print(loss.round(4))
    0.5
    """
    if not student.shape[-1:] == teacher.shape[-1:] == raw_variance.shape:
        raise ValueError(
            "student [N, ..., C], teacher [N, ..., C] and raw_variance [C] must agree in C, got "
            f"{student.shape}, {teacher.shape} and {raw_variance.shape}"
        )
    keep, s, t = _kept_pair(student, teacher, where)
    s, t = pool_to_smaller(s, t)
    v = jax.nn.softplus(raw_variance.astype(jnp.float32)) + _VARIANCE_FLOOR
    v = jnp.expand_dims(v, range(s.ndim - 1))
    return over_examples(0.5 * ((s - t) ** 2 / v + jnp.log(v)), per_example, keep)


def hierarchical_context(
    student: Array, teacher: Array, *, where: Array | None = None, per_example: bool = False
) -> Array:
    """Squared errors of the maps and of their averages on 4x4, 2x2 and 1x1 grids: ReviewKD's HCL.

    (mse_0 + mse_1 / 2 + mse_2 / 4 + ...) / (1 + 1/2 + 1/4 + ...), over the grids that are smaller
    than the map (than its shorter side).

    Args:
      student, teacher: [N, H, W, C] of one shape, any float dtype; the loss is float32. The
        student's are the fused ones of a stage; add the losses of the stages.
      where: [N], nonzero where an example counts; None: all. Others have no influence and no
        gradient; the mean is over those that count, 0 if none does.
      per_example: give [N] instead of the mean.

    The teacher gets no gradient. Usual weights are 1 to 8, reached over 20 epochs.

    Raises:
      ValueError: the shapes differ or are not [N, H, W, C].

    Source: Chen et al. 2021, Distilling knowledge via knowledge review, arXiv 2104.09044,
    section 3. What it does not do: the attention-based fusion (ABF), which is a network.

    >>> print(hierarchical_context(jnp.ones((1, 8, 8, 2)), jnp.zeros((1, 8, 8, 2))))
    1.0
    """
    check_same_shape(student, teacher, "[N, H, W, C]", ndim=4)
    keep, s, t = _kept_pair(student, teacher, where)
    difference = s - t  # pooling is linear
    grids = [n for n in (4, 2, 1) if n < min(s.shape[1:3])]
    losses = [over_examples(difference**2, per_example, keep)]
    for n in grids:
        losses.append(over_examples(pool_to(difference, (n, n)) ** 2, per_example, keep))
    weights = [0.5**k for k in range(len(losses))]
    total = losses[0]
    for weight, loss in zip(weights[1:], losses[1:], strict=True):
        total = total + weight * loss
    return total / sum(weights)


def _kept_pair(
    student: Array, teacher: Array, where: Array | None
) -> tuple[Array | None, Array, Array]:
    # which examples count, and both in float32, with zeros elsewhere
    keep = kept_rows(where, student.shape[:1])
    s, t = zeroed(keep, *float32_pair(student, teacher))
    return keep, s, t
