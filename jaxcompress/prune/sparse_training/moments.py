"""What optimizers remember of weights that are gone or new: nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def reset_moments(tx: Any, opt_state: Any, masks: Any) -> Any:
    """The optimizer's state with 0 where `masks` are False, in all that it keeps per weight.

    That is moments, traces, accumulated gradients (`MultiSteps`), and the sequence z of
    `schedule_free`, whose averages are then 0 too. Step counts and what has another shape than its
    weights stay: the factored second moments of adafactor are means over rows and columns, to which
    a pruned weight, without gradient, adds nothing more and a new one nothing yet; histories of
    L-BFGS are of whole directions.

    Args:
      tx: the optimizer, or anything with its `init`.
      opt_state: its state.
      masks: the structure of what `tx.init` was given, a leaf's mask in its shape; 0-d True: the
        leaf stays.

    Returns:
      The same structure, shapes and dtypes.

    Raises:
      ValueError: the state or the masks are of another optimizer or other params.

    >>> tx, params = optax.sgd(0.1, momentum=0.9), {"w": jnp.ones(2)}
    >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params))
    >>> print(reset_moments(tx, state, {"w": jnp.array([True, False])})[0].trace["w"])
    [1. 0.]
    """

    def reset(moment, mask):
        if isinstance(moment, optax.MaskedNode):  # not of this part of optax.partition
            return moment
        if jnp.shape(moment) != jnp.shape(mask):
            return moment
        return jnp.where(mask, moment, jnp.zeros((), moment.dtype))

    is_leaf = lambda node: isinstance(node, optax.MaskedNode)
    try:
        return optax.tree_utils.tree_map_params(tx, reset, opt_state, masks, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(f"opt_state or masks do not belong to tx: {error}") from error


def survivors(masks: Any, before: Any) -> Any:
    """`masks` and `before` together: what was there and still is; False for what newly grew.

    Args:
      masks: a 0-d True: the leaf is dense.
      before: masks of full shape, with `optax.MaskedNode` where another optimizer is in charge.
    """

    def both(mask, old):
        whole = isinstance(old, optax.MaskedNode) or jnp.ndim(mask) < old.ndim
        return mask if whole else mask & old

    return jax.tree.map(both, masks, before)


def filled(masks: Any, before: Any) -> Any:
    """`masks`, with dense leaves and `optax.MaskedNode` as in `before`: what is kept in a state."""

    def fill(mask, old):
        whole = isinstance(old, optax.MaskedNode) or jnp.ndim(mask) < old.ndim
        return old if whole else mask

    return jax.tree.map(fill, masks, before)


def grew(masks: Any, before: Any) -> jax.Array:
    """Whether any mask is True where it was not before; bool []."""
    new = jax.tree.map(lambda mask, stay: jnp.any(mask & ~stay), masks, survivors(masks, before))
    return jax.tree.reduce(jnp.logical_or, new, jnp.zeros((), bool))
