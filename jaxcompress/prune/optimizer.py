"""Optax transforms that keep pruned weights exactly zero under any optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def _select(masks, tree, other):
    def choose(mask, x, y):
        if isinstance(x, optax.MaskedNode):  # inside optax.masked or multi_transform
            return x
        return x if jnp.ndim(mask) == 0 and x.ndim > 0 else jnp.where(mask, x, y)

    return jax.tree.map(choose, masks, tree, other)


def _need(transform: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise ValueError(
                f"{transform}() needs {name}: call tx.update(grads, state, params, masks=masks)"
            )


def mask_gradients() -> optax.GradientTransformationExtraArgs:
    """Zeroes the gradients of pruned weights; first in a chain. Needs `masks=` in `tx.update`."""

    def update(updates, state, params=None, *, masks: Any = None, **extra):
        del params, extra
        _need("mask_gradients", masks=masks)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return _select(masks, updates, zeros), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def project() -> optax.GradientTransformationExtraArgs:
    """Sends pruned weights to exactly zero; last in a chain. Needs `masks=` in `tx.update`.

    u <- where(mask, u, -p), and p + (-p) = 0 whatever momentum or weight decay wanted.

    >>> import optax
    >>> tx = optax.chain(mask_gradients(), optax.sgd(0.1, momentum=0.9), project())
    >>> params, masks = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])}
    >>> grads = {"w": jnp.ones(2)}
    >>> updates, _ = tx.update(grads, tx.init(params), params, masks=masks)
    >>> print(optax.apply_updates(params, updates)["w"])
    [0.9 0. ]
    """

    def update(updates, state, params: Any = None, *, masks: Any = None, **extra):
        del extra
        _need("project", params=params, masks=masks)
        return _select(masks, updates, jax.tree.map(jnp.negative, params)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def masked_optimizer(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`chain(mask_gradients(), tx, project())`: any optimizer, with pruned weights exactly zero."""
    return optax.chain(mask_gradients(), tx, project())
