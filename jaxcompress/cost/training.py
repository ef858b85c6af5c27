"""What a training step costs: the gradient and the optimizer, by the same counting."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxcompress.cost.estimation import estimate
from jaxcompress.cost.result import Cost


def estimate_training(
    loss_fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    optimizer: optax.GradientTransformation,
    **options: Any,
) -> Cost:
    """Cost of one step: gradient of `loss_fn(params, *batch)`, update of `params`.

    `weight_bytes` are those of the parameters; the gradients, the optimizer's state and what the
    backward pass keeps are part of `peak_bytes`.

    Args:
      loss_fn: pure function that gives a scalar.
      params: arrays or their shapes, floating.
      *batch: arrays or their shapes.
      optimizer: an Optax transformation.
      **options: of `estimate`; `device` is required.

    Raises:
      ValueError: as `estimate`.
    """

    def step(params: Any, state: Any, *batch: Any) -> Any:
        gradients = jax.grad(loss_fn)(params, *batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return estimate(step, params, state, *batch, **options)
