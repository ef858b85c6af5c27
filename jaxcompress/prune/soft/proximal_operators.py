"""Penalties that make exact zeros: proximal operators, and the Optax transform that takes them.

prox(w) = argmin_z 1/2 ||z - w||^2 + amount * penalty(z). A gradient step on the loss followed by
the prox of learning rate * strength is proximal gradient descent on loss + strength * penalty;
a subgradient of the penalty in the loss would never reach zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcompress.prune.masking.mask_state import prunable
from jaxcompress.prune.saliency.score_trees import widened

Prox = Callable[[Array, Array], Array]  # (w, amount) -> what takes its place


def prox_l1(w: Array, amount: Any) -> Array:
    """sign(w) (|w| - amount)_+, the prox of amount * ||w||_1; zeros are +0.

    Args:
      w: floats, any shape.
      amount: 0 or more, a scalar or of w's shape; gets the gradient -sign(w) where w stays.

    >>> print(prox_l1(jnp.array([3.0, -0.5, -2.0]), 1.0))
    [ 2.  0. -1.]
    """
    amount = jnp.asarray(amount, w.dtype)
    return jnp.where(jnp.abs(w) > amount, w - jnp.sign(w) * amount, jnp.zeros((), w.dtype))


def prox_group_lasso(w: Array, amount: Any, axis: int | tuple[int, ...] | None = -1) -> Array:
    """w_G (1 - amount / ||w_G||)_+, the prox of amount * sum_G ||w_G||_2; zeros are +0.

    Args:
      w: floats, any shape.
      amount: 0 or more, a scalar. Multiply by sqrt(|G|) for the weighted group lasso.
      axis: each index along it is a group: -1, the outputs of a Flax kernel; several: each
        combination of indices; None: all of w is one group.

    Raises:
      ValueError: an axis that w does not have.

    Source: Yuan and Lin 2006, Model selection and estimation in regression with grouped variables.

    >>> print(prox_group_lasso(jnp.array([[3.0, 0.3], [4.0, 0.4]]), 1.0))
    [[2.4 0. ]
     [3.2 0. ]]
    """
    own = group_axes(w.shape, axis)
    rest = tuple(a for a in range(w.ndim) if a not in own)
    x, amount = widened(w), jnp.asarray(amount)
    # ||w_G|| = m ||w_G / m||, m the largest: no square overflows or vanishes
    largest = jnp.max(jnp.abs(x), axis=rest, keepdims=True, initial=0.0)
    safe = jnp.where(largest > 0, largest, 1)
    norm = largest * jnp.sqrt(jnp.sum(jnp.square(x / safe), axis=rest, keepdims=True))
    share = 1 - amount.astype(x.dtype) / jnp.where(norm > 0, norm, 1)
    return jnp.where((norm > 0) & (share > 0), x * share, 0).astype(w.dtype)


def group_axes(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> set[int]:
    """The axes whose indices are groups, counted from the front.

    Raises:
      ValueError: an axis that an array of this shape does not have.
    """
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if not all(-len(shape) <= a < len(shape) for a in axes):
        raise ValueError(f"axis {axis} is none of an array of shape {tuple(shape)}")
    return {a % len(shape) for a in axes}


class ProximalState(NamedTuple):
    """Steps done, for schedules."""

    count: Array  # int32 []


def proximal(
    learning_rate: Any,
    strength: Any,
    *,
    prox: Prox = prox_l1,
    min_ndim: int = 2,
) -> optax.GradientTransformationExtraArgs:
    """Makes params land on the prox of where the chain before sends them; last in a chain.

    u <- prox(p + u, learning_rate * strength) - p: zeros are exact after `apply_updates`. An
    accelerated or adaptive optimizer before it keeps its step; the prox is that of a plain one.

    Args:
      learning_rate: that of the chain before it, a number or an Optax schedule; may be traced.
      strength: weight of the penalty in the loss, the same; 0 or more.
      prox: (w, amount) -> w: `prox_l1`, or `prox_group_lasso` with `functools.partial` or a lambda
        for its axis.
      min_ndim: leaves with fewer axes are left alone; choose others with `optax.masked`.

    Raises:
      ValueError: a negative number; (in `tx.update`) no params.

    Source: Parikh and Boyd 2014, Proximal algorithms, section 4.2.

    >>> tx = optax.chain(optax.sgd(0.5), proximal(0.5, 0.5))
    >>> params = {"w": jnp.array([[1.0, 0.125]])}
    >>> updates, _ = tx.update({"w": jnp.array([[0.5, 0.0]])}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [[0.5 0. ]]
    """
    for name, value in (("learning_rate", learning_rate), ("strength", strength)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")

    def at(value: Any, count: Array) -> Array:
        return jnp.asarray(value(count) if callable(value) else value, jnp.float32)

    def init(params: Any) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        del extra
        if params is None:
            raise ValueError("proximal() needs params: call tx.update(grads, state, params)")
        amount = at(learning_rate, state.count) * at(strength, state.count)

        def land(u: Any, p: Any) -> Any:
            if isinstance(u, optax.MaskedNode) or not prunable(p, min_ndim):
                return u
            start = widened(p)
            there = prox(start + u.astype(start.dtype), amount)
            # -p must be a number of the update's dtype
            return (there - start).astype(max(u.dtype, p.dtype, key=lambda kind: kind.itemsize))

        leaf = lambda u: isinstance(u, optax.MaskedNode)
        new = jax.tree.map(land, updates, params, is_leaf=leaf)
        return new, ProximalState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)
