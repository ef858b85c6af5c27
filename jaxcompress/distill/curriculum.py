"""CTKD: a temperature that is learned against the student, more and more."""

import jax
import jax.numpy as jnp
from jax import Array

Number = float | Array


def ctkd_temperature(
    theta: Array, *, weight: Number, low: Number = 1.0, span: Number = 20.0
) -> Array:
    """T = low + span sigmoid(theta), for `kd(..., temperature=T)`.

    Theta learns with everything else, by the gradient times -`weight`: it makes the loss larger
    where the student makes it smaller. The paper starts it at 1, T = 15.6.

    Args:
      theta: float scalar, or [...]: one temperature per example.
      weight: at least 0, may be traced: `ctkd_weight` of the step; 0 keeps theta as it is.
      low, span: the temperature stays between low and low + span.

    Source: Li et al. 2023, Curriculum Temperature for Knowledge Distillation, arXiv 2211.16231,
    eq. 7.

    >>> print(ctkd_temperature(jnp.float32(0.0), weight=1.0))
    11.0
    """
    theta = _reversed(theta.astype(jnp.float32), jnp.asarray(weight, jnp.float32))
    return jnp.asarray(low, jnp.float32) + jnp.asarray(span, jnp.float32) * jax.nn.sigmoid(theta)


def ctkd_weight(step: Number, *, steps: Number) -> Array:
    """(1 - cos(pi min(step / steps, 1))) / 2: from 0 to 1, then 1; ten epochs in the paper.

    Source: arXiv 2211.16231, eq. 9; there with the sign of the gradient, 0 to -1.
    """
    done = jnp.asarray(step, jnp.float32) / jnp.asarray(steps, jnp.float32)
    return (1.0 - jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0))) / 2.0


@jax.custom_vjp
def _reversed(theta: Array, weight: Array) -> Array:
    del weight
    return theta


def _forward(theta: Array, weight: Array) -> tuple[Array, Array]:
    return theta, weight


def _backward(weight: Array, cotangent: Array) -> tuple[Array, Array]:
    return -weight * cotangent, jnp.zeros_like(weight)


_reversed.defvjp(_forward, _backward)
