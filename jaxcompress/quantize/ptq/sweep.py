"""The numerical core of GPTQ: one matrix w [K, N] with its Hessian [K, K], and many under vmap.

H^-1 = U^T U with U upper triangular. Input i is rounded, e_i = (w_i - Q(w_i)) / U_ii, and the later
inputs become w_j - U_ij e_i: W - W^ = U^T E and tr((W - W^)^T H (W - W^)) = ||E||^2. Errors reach
the inputs of the same block at once, all later ones when the block is done (a matrix product).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.formats import Granularity
from jaxcompress.quantize.weights import qparams_of

_COLUMNS = Granularity(axis=(1,))
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Finder(NamedTuple):
    """How the scales of a block of inputs are found when it is reached."""

    format: Any
    calibrate: Any
    dtype: str  # of the leaf


class Rounded(NamedTuple):
    """Matrices on their grids; axes [S, G] in front where they are solved together.

    Attributes:
      weights: float32 [K, N].
      loss: [N], d^T H d of every column, d the change of its weights.
      improved: bool [N], whether the column is GPTQ's, not the one rounded to nearest.
      qparams: scales found on the way, [blocks, N] each; () where they are static.
    """

    weights: Array
    loss: Array
    improved: Array
    qparams: Any


@functools.partial(jax.jit, static_argnames=("format", "block", "find", "act_order", "sweeps"))
def solve(
    w: Array,
    hessian: Array,
    keep: Array,
    grid: Any,
    damp: Array,
    order: Array,
    *,
    format: Any,
    block: int,
    find: Finder | None = None,
    act_order: bool = False,
    sweeps: int = 0,
) -> Rounded:
    """All matrices of a layer.

    Args:
      w: float32 [S, G, K, N].
      hessian: [S, G, K, K], mean of x x^T.
      keep: bool [S, G, K, N]; False: the weight becomes 0.
      grid: the arrays of `format`, element by element [S, G, K, N].
      damp: share of the mean of diag(H) that is added to it.
      order: int [K], the order in which inputs are rounded; by falling H_ii under `act_order`.
      block: inputs between two updates of the rest; with `find`, inputs that share a scale.
      sweeps: of coordinate descent afterwards.
    """
    lead = w.shape[:2]
    flat = lambda x: x.reshape(-1, *x.shape[2:])

    def one(w, h, keep, grid):
        snap = lambda x, grid, keep: jnp.where(keep, format.fake_quant(x, grid), 0.0)
        damped = _damped(h, damp)
        at = jnp.argsort(-jnp.diagonal(damped), stable=True) if act_order else order
        rows, kept, grids = jax.tree.map(lambda x: _padded(x[at], block), (w, keep, grid))
        factor = inverse_factor(_padded_square(damped[at][:, at], block))
        q, qparams = _sweep(rows, kept, grids, factor, snap=snap, block=block, find=find)
        q = q[jnp.argsort(at)]
        if sweeps and find is None:
            q = _descend(q, w, h, keep=keep, grid=grid, snap=snap, sweeps=sweeps)
        nearest = snap(w, grid, keep)
        mine, plain = loss_of(q - w, h), loss_of(nearest - w, h)
        # A factorization that failed must show: NaN is kept.
        better = ~(mine > plain)
        return Rounded(
            jnp.where(better, q, nearest), jnp.where(better, mine, plain), better, qparams
        )

    found = jax.vmap(one)(flat(w), flat(hessian), flat(keep), jax.tree.map(flat, grid))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def loss_of(delta: Array, h: Array) -> Array:
    """d^T H d of every column d of delta [K, N]."""
    return jnp.sum(delta * _matmul(h, delta), axis=0)


def _damped(h: Array, damp: Array) -> Array:
    # Inputs that were always zero get a diagonal of their own: nothing depends on them.
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


def _padded(x: Array, block: int) -> Array:
    # To whole blocks; what is added is never read.
    extra = -len(x) % block
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), mode="edge" if len(x) else "empty")


def _padded_square(h: Array, block: int) -> Array:
    extra = -len(h) % block
    if not extra:
        return h
    added = jnp.concatenate([jnp.zeros(len(h), h.dtype), jnp.ones(extra, h.dtype)])
    return jnp.pad(h, (0, extra)) + jnp.diag(added)


def _sweep(w, keep, grid, factor, *, snap, block, find) -> tuple[Array, Any]:
    size, n = w.shape[0], w.shape[1]

    def step(w, at):
        rows = lax.dynamic_slice_in_dim(w, at, block)
        upper = lax.dynamic_slice_in_dim(factor, at, block)
        corner = lax.dynamic_slice_in_dim(upper, at, block, axis=1)
        kept = lax.dynamic_slice_in_dim(keep, at, block)
        if find is None:
            here = jax.tree.map(lambda g: lax.dynamic_slice_in_dim(g, at, block), grid)
            qparams, rounded = (), snap
        else:
            valid = (at + jnp.arange(block) < len(keep))[:, None]
            masked = jnp.where(kept & valid, rows, 0.0).astype(find.dtype)
            qparams = qparams_of(masked, find.format, _COLUMNS, calibrate=find.calibrate)
            here = jax.tree.map(lambda p: jnp.broadcast_to(p, (block, *p.shape[1:])), qparams)
            rounded = lambda x, grid, keep: jnp.where(keep, find.format.fake_quant(x, grid), 0.0)

        def row(j, carry):
            rows, q, errors = carry
            value = rounded(rows[j], jax.tree.map(lambda g: g[j], here), kept[j])
            error = (rows[j] - value) / corner[j, j]
            rows = rows - corner[j][:, None] * error[None]
            return rows, q.at[j].set(value), errors.at[j].set(error)

        empty = jnp.zeros((block, n), w.dtype)
        _, q, errors = lax.fori_loop(0, block, row, (rows, empty, empty))
        return w - _matmul(upper.T, errors), (q, jax.tree.map(lambda p: p[0], qparams))

    _, (q, qparams) = lax.scan(step, w, jnp.arange(0, size, block))
    return q.reshape(size, n), qparams


def _descend(q, w, h, *, keep, grid, snap, sweeps: int) -> Array:
    # Each input in turn takes the nearest number to its best value given all others:
    # w_k - sum_{j != k} H_kj d_j / H_kk. The error never grows.
    diagonal = jnp.diagonal(h)

    def row(k, q):
        gradient = _matmul(h[k][None], q - w)[0] - diagonal[k] * (q[k] - w[k])
        best = w[k] - jnp.where(diagonal[k] > 0, gradient / diagonal[k], 0.0)
        value = snap(best, jax.tree.map(lambda g: g[k], grid), keep[k])
        return q.at[k].set(value)

    def sweep(_, q):
        return lax.fori_loop(0, len(w), row, q)

    return lax.fori_loop(0, sweeps, sweep, q)
