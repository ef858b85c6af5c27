"""DIST: correlations of predictions, over classes and over examples."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.distill.masks import count_of, kept_rows, reduced, zeroed
from jaxcompress.distill.probabilities import both_log_probs, check_logits


def dist(
    student_logits: Array,
    teacher_logits: Array,
    *,
    row_weight: float | Array = 2.0,
    column_weight: float | Array = 2.0,
    temperature: float | Array = 4.0,
    where: Array | None = None,
) -> Array:
    """T^2 (b (1 - mean row correlation) + g (1 - mean column correlation)) of the probabilities.

    Pearson's correlation of what student and teacher say of one example over all classes, and of
    one class over all examples of the batch: their relations count, not their scale.

    Args:
      student_logits, teacher_logits: [examples, classes], any float dtype; the loss is float32.
      row_weight, column_weight: b and g (beta, gamma of the paper).
      temperature: T > 0, may be traced.
      where: [examples], nonzero where an example counts; None: all. The loss is that of a batch of
        those alone, 0 if there is none.

    Not separable: no `per_example`. A norm is never taken as less than 1e-4 of that before the mean
    is subtracted, so that constant rows have correlation 0 and a bounded gradient.

    Raises:
      ValueError: the logits are not both [examples, classes], or a Python temperature is not
        above 0.

    Source: Huang et al. 2022, Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536,
    eq. 10; T^2 and the weights as in its code for CIFAR.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise ValueError(f"logits must be [examples, classes], got {student_logits.shape}")
    keep = kept_rows(where, student_logits.shape[:1])
    student_logits, teacher_logits = zeroed(keep, student_logits, teacher_logits)
    p, q = (jnp.exp(z) for z in both_log_probs(student_logits, teacher_logits, temperature))
    rows = reduced(1.0 - _correlation(p, q, 1, None), False, keep)
    columns = 1.0 - jnp.mean(_correlation(p, q, 0, keep))
    columns = columns if keep is None else jnp.where(jnp.any(keep), columns, 0.0)
    t = jnp.asarray(temperature, jnp.float32)
    weights = (jnp.asarray(w, jnp.float32) for w in (row_weight, column_weight))
    return t**2 * sum(w * part for w, part in zip(weights, (rows, columns), strict=True))


def _correlation(p: Array, q: Array, axis: int, keep: Array | None) -> Array:
    a, b = (_unit(x, axis, keep) for x in (p, q))
    return jnp.sum(a * b, axis=axis)


def _unit(x: Array, axis: int, keep: Array | None) -> Array:
    # over the kept examples, if there is a mask: then along axis 0
    (x,) = zeroed(keep, x)
    mean = jnp.sum(x, axis=axis, keepdims=True) / count_of(keep, x.shape[axis])
    (centred,) = zeroed(keep, x - mean)
    square = jnp.sum(jnp.square(centred), axis=axis, keepdims=True)
    least = 1e-8 * jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    least = jnp.maximum(jax.lax.stop_gradient(least), 1e-16)
    return centred * jax.lax.rsqrt(square + least)
