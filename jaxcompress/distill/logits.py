"""Distillation losses on logits."""

import jax
import jax.numpy as jnp
from jax import Array


def kd(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: float | Array = 4.0,
    per_example: bool = False,
) -> Array:
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), the mean over examples.

    Args:
      student_logits, teacher_logits: [..., classes], any float dtype; the loss is float32.
        Classes that both mask with -inf count nothing.
      temperature: T > 0, may be traced.
      per_example: give [...] instead of the mean.

    The teacher gets no gradient. Gradient of the student: T * (p_s - p_t) / examples.

    Raises:
      ValueError: the shapes differ, there is no class axis, or a Python temperature is not above 0.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531.

    >>> z = jnp.array([[1.0, 2.0, 3.0]])
    >>> print(kd(z, z + 7.0))
    0.0
    """
    if student_logits.shape != teacher_logits.shape or not student_logits.ndim:
        raise ValueError(
            "student_logits and teacher_logits must have one shape [..., classes], got "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    t = jnp.asarray(temperature, jnp.float32)
    log_s = jax.nn.log_softmax(student_logits.astype(jnp.float32) / t)
    log_t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / t)
    p = jnp.exp(log_t)
    # KL = sum_c p_t (log p_t - log p_s), and 0 log 0 = 0 also where log 0 = -inf
    gap = jnp.where(p > 0, log_t, 0.0) - jnp.where(p > 0, log_s, 0.0)
    # T^2 keeps the gradient's size independent of T
    loss = t**2 * jnp.sum(p * gap, axis=-1)
    return loss if per_example else jnp.mean(loss)
