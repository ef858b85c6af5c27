"""Optax transforms that keep pruned weights exactly zero under any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcompress.prune.sparse_training.moments import filled, grew, reset_moments, survivors


def _select(masks, tree, other):
    def choose(mask, x, y):
        if isinstance(x, optax.MaskedNode):  # inside optax.masked or multi_transform
            return x
        if jnp.ndim(mask) == 0 and x.ndim > 0:
            return x
        # An update of fewer bits than its weight could not take it to 0.
        wide = jnp.promote_types(x.dtype, y.dtype)
        return jnp.where(mask, x.astype(wide), y.astype(wide))

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


def hold() -> optax.GradientTransformationExtraArgs:
    """Leaves pruned weights as they are, whatever momentum or weight decay wanted; last in a chain.

    Needs `masks=` in `tx.update`. u <- where(mask, u, 0): for methods that hide weights and keep
    their values, such as `top_kast`.
    """

    def update(updates, state, params=None, *, masks: Any = None, **extra):
        del params, extra
        _need("hold", masks=masks)
        return _select(masks, updates, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class DynamicState(NamedTuple):
    """State of `dynamic_optimizer`."""

    masks: Any  # bool, the params' structure and shapes: those of the last update
    inner: Any  # of the optimizer


def dynamic_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`masked_optimizer(tx)` for masks that change: what newly grew begins at 0, moments too.

    Needs `masks=` in `tx.update`. Each update compares them with those of the last. What is pruned
    is exactly 0 and has no moments (see `reset_moments`); what newly grew stays at 0 for that one
    update and learns from the next on. All others take their step. The masks of the last update
    lie in the state, one bool per weight. Put `optax.MultiSteps` inside, or pruned weights wait for
    its next step.

    >>> tx = dynamic_optimizer(optax.sgd(0.1, momentum=0.9))
    >>> w, g = jnp.array([1.0, 2.0]), jnp.ones(2)
    >>> state = tx.init(w)
    >>> for mask in ([True, False], [False, True], [False, True]):
    ...     updates, state = tx.update(g, state, w, masks=jnp.array(mask))
    ...     w = optax.apply_updates(w, updates)
    ...     print(w)
    [0.9 0. ]
    [0. 0.]
    [ 0.  -0.1]
    """
    return _following(tx, lambda grew, new, old: new)


def pausing_optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`dynamic_optimizer(tx)` that trains no weight in an update in which any newly grew.

    So does the code of RigL. The optimizer's step count rests too.
    """
    return _following(tx, lambda grew, new, old: _where(~grew, new, old))


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _following(tx: optax.GradientTransformation, choose: Any):
    inner, last = optax.chain(mask_gradients(), tx), project()

    def init(params):
        # Before the first update nothing was pruned, so nothing grows in it.
        masks = jax.tree.map(lambda w: jnp.ones_like(w, dtype=bool), params)
        return DynamicState(masks, inner.init(params))

    def update(updates, state, params: Any = None, *, masks: Any = None, **extra):
        _need("dynamic_optimizer", params=params, masks=masks)
        stay = survivors(masks, state.masks)
        rest = reset_moments(inner, state.inner, stay)
        zeros = jax.tree.map(jnp.zeros_like, params)
        # What drops has gone already, or its decay would enter moments once more.
        new, opt = inner.update(updates, rest, _select(stay, params, zeros), masks=stay, **extra)
        none = jax.tree.map(jnp.zeros_like, new)
        new, opt = choose(grew(masks, state.masks), (new, opt), (none, rest))
        new, _ = last.update(new, optax.EmptyState(), params, masks=stay)
        return new, DynamicState(filled(masks, state.masks), opt)

    return optax.GradientTransformationExtraArgs(init, update)
