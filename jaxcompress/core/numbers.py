"""Hyper-parameters that may change with the step."""

from typing import Any

import jax.numpy as jnp
from jax import Array

Number = Any  # a Python number, a traced scalar, or a schedule step -> number


def number_at(value: Number, step: Array) -> Array:
    """A hyper-parameter at a step, float32: a number as it is, a schedule called."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)
