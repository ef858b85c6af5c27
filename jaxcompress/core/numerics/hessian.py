"""H, the mean of x x^T of a layer: its loss, its damping, and the factor of its inverse."""

import functools

import jax.numpy as jnp
from jax import Array, lax

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def loss_of(delta: Array, h: Array) -> Array:
    """d^T H d of every column d of delta [K, N]."""
    return jnp.sum(delta * _matmul(h, delta), axis=0)


def damped(h: Array, damp: Array) -> Array:
    """H with a share of the mean of its diagonal added to the diagonal.

    Inputs that were always zero get a diagonal of their own: nothing depends on them.
    """
    diagonal = jnp.diagonal(h)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive.astype(h.dtype)), 1.0)
    extra = jnp.where(alive, damp * mean, jnp.where(mean > 0, mean, jnp.ones_like(mean)))
    return h + jnp.diag(extra)


def inverse_factor(h: Array) -> Array:
    """U, upper triangular, with H^-1 = U^T U; NaN where H is not positive definite.

    H = R R^T with R upper triangular comes from the Cholesky factor of H turned about both axes,
    and U = R^-1 is one triangular solve: H is never inverted.
    """
    lower = jnp.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
    eye = jnp.eye(len(h), dtype=h.dtype)
    return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]


def padded(x: Array, block: int) -> Array:
    """x with its first axis in whole blocks; what is added is never read."""
    extra = -len(x) % block
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), mode="edge" if len(x) else "empty")


def padded_square(h: Array, block: int) -> Array:
    """H with both axes in whole blocks, ones on what is added to the diagonal."""
    extra = -len(h) % block
    if not extra:
        return h
    added = jnp.concatenate([jnp.zeros(len(h), h.dtype), jnp.ones(extra, h.dtype)])
    return jnp.pad(h, (0, extra)) + jnp.diag(added)
