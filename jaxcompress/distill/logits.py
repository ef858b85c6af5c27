"""Distillation losses on logits: Hinton's, decoupled, normalised, top-k."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.masks import kept_rows, poisoned, reduced, zeroed
from jaxcompress.distill.probabilities import (
    FLOOR,
    both_log_probs,
    check_labels,
    check_logits,
    kl,
    one_hot,
)

Number = float | Array


def kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Number = 4.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), the mean over examples.

    Args:
      student_logits, teacher_logits: [..., classes], any float dtype; the loss is float32.
        Classes that both mask with -inf count nothing.
      temperature: T > 0, may be traced.
      where: [...], nonzero where an example counts; None: everywhere. Others have no influence and
        no gradient; the mean is over those that count, 0 if none does.
      per_example: give [...] instead of the mean.

    The teacher gets no gradient. Gradient of the student: T * (p_s - p_t) / examples.

    Raises:
      ValueError: the shapes differ, there is no class axis, or a Python temperature is not above 0;
        `where` is not [...].

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    >>> z = jnp.array([[1.0, 2.0, 3.0]])
    >>> print(kd(z, z + 7.0))
    0.0
    """
    check_logits(student_logits, teacher_logits)
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    # T^2 keeps the gradient's size independent of T
    return reduced(jnp.square(_float(temperature)) * kl(log_t, log_s), per_example, keep)


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    target_weight: Number = 1.0,
    other_weight: Number = 8.0,
    temperature: Number = 4.0,
    where: Array | None = None,
    ignore_label: int | None = None,
    per_example: bool = False,
) -> Array:
    """T^2 (a KL of [p_y, 1 - p_y] + b KL over the other classes alone), the mean over examples.

    `kd` weighs the second part by 1 - p_t,y of the teacher, little where it is sure; here both
    weights are free.

    Args:
      student_logits, teacher_logits, temperature, where, per_example: as in `kd`; two classes or
        more.
      labels: integers [...]. The loss is NaN where one is none of the classes.
      ignore_label: examples of this label do not count, as if `where` left them out; -100 is the
        usual mark of ignored tokens.
      target_weight: a, 1 in the paper.
      other_weight: b, 2 to 8 in the paper.

    Raises:
      ValueError: as `kd`; fewer than two classes; labels of another shape or no integers.

    Source: Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv 2203.08679, eq. 7.
    """
    check_logits(student_logits, teacher_logits, classes=2)
    check_labels(labels, student_logits)
    keep = kept_rows(where, labels.shape, labels=labels, ignore_label=ignore_label)
    student_logits, teacher_logits, labels = zeroed(keep, student_logits, teacher_logits, labels)
    target = one_hot(labels, student_logits)
    whole = both_log_probs(student_logits, teacher_logits, temperature)
    binary_s, binary_t = (_target_and_rest(z, target) for z in whole)
    others_s, others_t = both_log_probs(student_logits, teacher_logits, temperature, hide=target)
    losses = _float(target_weight) * kl(binary_t, binary_s)
    losses += _float(other_weight) * kl(others_t, others_s)
    losses = poisoned(jnp.square(_float(temperature)) * losses, labels, target.shape[-1])
    return reduced(losses, per_example, keep)


def nkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    other_weight: Number = 1.5,
    temperature: Number = 1.0,
    where: Array | None = None,
    ignore_label: int | None = None,
    per_example: bool = False,
) -> Array:
    """-p_t,y log p_s,y - g T^2 sum over the other classes of p_t log p_s, each softmax over these.

    The target term has temperature 1. Cross-entropies: not 0 where both agree.

    Args:
      student_logits, teacher_logits, labels, temperature, where, ignore_label, per_example: as in
        `dkd`.
      other_weight: g, 1.5 in the paper.

    Raises:
      ValueError: as `dkd`.

    Source: Yang et al. 2023, From Knowledge Distillation to Self-Knowledge Distillation,
    arXiv 2303.13005, eq. 9.
    """
    check_logits(student_logits, teacher_logits, classes=2)
    check_labels(labels, student_logits)
    keep = kept_rows(where, labels.shape, labels=labels, ignore_label=ignore_label)
    student_logits, teacher_logits, labels = zeroed(keep, student_logits, teacher_logits, labels)
    target = one_hot(labels, student_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, 1.0)
    losses = -jnp.sum(jnp.where(target, jnp.exp(log_t) * log_s, 0.0), axis=-1)
    others_s, others_t = both_log_probs(student_logits, teacher_logits, temperature, hide=target)
    others = -jnp.sum(jnp.exp(others_t) * others_s, axis=-1)
    losses += _float(other_weight) * jnp.square(_float(temperature)) * others
    return reduced(poisoned(losses, labels, target.shape[-1]), per_example, keep)


def top_k_kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    k: int,
    temperature: Number = 1.0,
    where: Array | None = None,
    per_example: bool = False,
) -> Array:
    """T^2 KL over the teacher's k likeliest classes and one bucket for all the others together.

    At least 0, at most `kd`, and `kd` at k = classes: what is lost is only how the others differ
    among themselves. Without the bucket the sum can be negative.

    Args:
      student_logits, teacher_logits, temperature, where, per_example: as in `kd`.
      k: 1 to classes.

    Raises:
      ValueError: as `kd`; k out of range.
    """
    check_logits(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(f"k must be in 1 to {classes}, the number of classes, got {k}")
    keep = kept_rows(where, student_logits.shape[:-1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    log_s, log_t = both_log_probs(student_logits, teacher_logits, temperature)
    _, chosen = jax.lax.top_k(log_t, k)
    inside = jnp.any(jax.nn.one_hot(chosen, classes, dtype=jnp.bool_), axis=-2)

    def bucketed(log_p):
        rest = jax.nn.logsumexp(jnp.where(inside, FLOOR, log_p), axis=-1, keepdims=True)
        return jnp.concatenate([jnp.take_along_axis(log_p, chosen, axis=-1), rest], axis=-1)

    losses = kl(bucketed(log_t), bucketed(log_s))
    return reduced(jnp.square(_float(temperature)) * losses, per_example, keep)


def standardize_logits(logits: Array, *, epsilon: float = 1e-4) -> Array:
    """(z - mean) / sqrt(variance + epsilon^2) per row in float32, variance over classes - 1.

    Before `kd`, on both logits: only the order and the relations of classes count then. The paper
    uses temperature 2 and a `kd_weight` of 9 beside 0.1 for the cross-entropy.

    Args:
      logits: [..., classes]; classes at -inf stay there and count nothing.
      epsilon: keeps a constant row at 0 and its gradient below 1 / epsilon; the paper adds 1e-7.

    Raises:
      ValueError: there are fewer than two classes.

    Source: Sun et al. 2024, Logit Standardization in Knowledge Distillation, arXiv 2403.01427,
    eq. 11; unbiased as in its code.

    >>> print(standardize_logits(jnp.array([1.0, 2.0, 3.0])).round(4))
    [-1.  0.  1.]
    """
    check_logits(logits, logits, classes=2)
    hidden = jnp.isneginf(logits)
    z = jnp.where(hidden, 0.0, logits.astype(jnp.float32))
    count = jnp.sum(~hidden, axis=-1, keepdims=True, dtype=jnp.float32)
    z -= jnp.sum(z, axis=-1, keepdims=True) / jnp.maximum(count, 1.0)
    square = jnp.sum(jnp.where(hidden, 0.0, jnp.square(z)), axis=-1, keepdims=True)
    z *= jax.lax.rsqrt(square / jnp.maximum(count - 1.0, 1.0) + epsilon**2)
    return jnp.where(hidden, -jnp.inf, z)


def _float(value: Number) -> Array:
    return jnp.asarray(value, jnp.float32)


def _target_and_rest(log_p: Array, target: Array) -> Array:
    # [..., 2]: log p_y and log (1 - p_y), the latter without cancellation.
    sides = [jnp.where(target, log_p, FLOOR), jnp.where(target, FLOOR, log_p)]
    return jnp.stack([jax.nn.logsumexp(z, axis=-1) for z in sides], axis=-1)
