"""What the losses on logits share: checks, log-probabilities without infinities, KL."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

FLOOR = -1e30
"""Stands for the logarithm of 0: finite, and 0 times it is 0."""


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError for a Python number that is not above 0; traced numbers pass."""
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError for a Python number outside [0, 1]; traced numbers pass."""
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_logits(student_logits: Array, teacher_logits: Array, *, classes: int = 1) -> None:
    """Raises ValueError unless both are [..., classes], with at least so many classes."""
    shapes = student_logits.shape, teacher_logits.shape
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            "student_logits and teacher_logits must have one shape [..., classes], got "
            f"{shapes[0]} and {shapes[1]}"
        )
    if shapes[0][-1] < classes:
        raise ValueError(f"logits must have at least {classes} classes, got {shapes[0]}")


def check_labels(labels: Array, logits: Array) -> None:
    """Raises ValueError unless the labels are integers [...] for logits [..., classes]."""
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {logits.shape[:-1]} for logits {logits.shape}, got "
            f"{labels.dtype} {labels.shape}"
        )


def one_hot(labels: Array, logits: Array) -> Array:
    """bool [..., classes], True at the labels; nowhere for a label out of range.

    Raises:
      ValueError: as `check_labels`.
    """
    check_labels(labels, logits)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)


def log_probs(logits: Array, temperature: Any = 1.0, *, hide: Array | None = None) -> Array:
    """log softmax(logits / temperature) in float32, not below about FLOOR.

    Args:
      logits: [..., classes]; -inf hides a class.
      temperature: above 0.
      hide: bool [..., classes], more classes to hide.
    """
    check_positive("temperature", temperature)
    # Before the division: the temperature's gradient at -inf would be 0 * inf.
    z = jnp.maximum(logits.astype(jnp.float32), FLOOR)
    z = z if hide is None else jnp.where(hide, FLOOR, z)
    return jax.nn.log_softmax(z / jnp.asarray(temperature, jnp.float32))


def both_log_probs(
    student_logits: Array, teacher_logits: Array, temperature: Any, *, hide: Array | None = None
) -> tuple[Array, Array]:
    """`log_probs` of both, no gradient to the teacher's logits."""
    teacher = log_probs(jax.lax.stop_gradient(teacher_logits), temperature, hide=hide)
    return log_probs(student_logits, temperature, hide=hide), teacher


def kl(log_p: Array, log_q: Array) -> Array:
    """KL(p || q) = sum of p (log p - log q) over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
