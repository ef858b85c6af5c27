"""The numerical core of GPTQ and SparseGPT: a matrix w [K, N], changed input by input.

H [K, K] is the mean of x x^T and H^-1 = U^T U with U upper triangular. Input i is put on its grid,
or to zero, e_i = (w_i - Q(w_i)) / U_ii, and the later inputs become w_j - U_ij e_i:
W - W^ = U^T E and tr((W - W^)^T H (W - W^)) = ||E||^2. Errors reach the inputs of the same block at
once, all later ones when the block is done (a matrix product). What becomes zero is given, or
chosen when its turn comes, by |w_i| / U_ii: U_ii^2 = [(H_FF)^-1]_ii, F the inputs from i on.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.notices import warn
from jaxcompress.core.numerics.hessian import damped, inverse_factor, loss_of, padded, padded_square
from jaxcompress.core.numerics.top_k import top_k_mask

_ATTEMPTS = 4
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Format(Protocol):
    """What rounds numbers, element by element; hashable."""

    def fake_quant(self, x: Array, grid: Any, /) -> Array:
        """The numbers of the grid, in place of x."""
        ...


class Find(Protocol):
    """Finds the scales of a block of inputs when it is reached; hashable."""

    format: Any

    def __call__(self, rows: Array, /) -> Any:
        """Weights [block, N] -> the format's arrays, [1, N] each."""
        ...


class Choice(NamedTuple):
    """Which weights are compared when some of them become zero.

    Attributes:
      span: inputs that are compared with each other, a divisor of the sweep's block.
      together: whether all outputs are compared with each other, or each is on its own.
    """

    span: int
    together: bool


class Solved(NamedTuple):
    """Matrices after the sweep; axes [S, G] in front where they are solved together.

    Attributes:
      weights: float32 [K, N].
      loss: [N], d^T H d of every column d, d the change of its weights.
      improved: bool [N], whether the column is the sweep's, not the one that makes up for nothing.
      qparams: scales found on the way, [blocks, N] each; () where they are static.
      keep: bool [K, N]; where False the weight is 0.
    """

    weights: Array
    loss: Array
    improved: Array
    qparams: Any
    keep: Array


class Exact(NamedTuple):
    """The format of numbers that stay as they are; its grid is `()`."""

    def fake_quant(self, x: Array, grid: Any) -> Array:
        """x."""
        del grid
        return x


@functools.partial(
    jax.jit, static_argnames=("format", "block", "find", "act_order", "sweeps", "choice")
)
def solve(
    w: Array,
    hessian: Array,
    keep: Array,
    grid: Any,
    damp: Array,
    order: Array,
    *,
    format: Format,
    block: int,
    find: Find | None = None,
    act_order: bool = False,
    sweeps: int = 0,
    choice: Choice | None = None,
    quota: Array | None = None,
) -> Solved:
    """All matrices of a layer.

    Args:
      w: float32 [S, G, K, N].
      hessian: [S, G, K, K], mean of x x^T.
      keep: bool [S, G, K, N]; False: the weight becomes 0.
      grid: the arrays of `format`, element by element [S, G, K, N].
      damp: share of the mean of diag(H) that is added to it.
      order: int [K], the order in which inputs are taken; by falling H_ii under `act_order`.
      block: inputs between two updates of the rest; with `find`, inputs that share a scale.
      sweeps: of coordinate descent afterwards, with what is zero fixed.
      choice: chooses among the weights that `keep` leaves.
      quota: with `choice`, int32 [S, G, spans]: how many each span keeps, of each output or of all.
    """
    lead = w.shape[:2]
    flat = lambda x: x.reshape(-1, *x.shape[2:])

    def one(w, h, keep, grid, quota):
        snap = lambda x, grid, keep: jnp.where(keep, format.fake_quant(x, grid), 0.0)
        h_damped = damped(h, damp)
        at = jnp.argsort(-jnp.diagonal(h_damped), stable=True) if act_order else order
        rows, kept, grids = jax.tree.map(lambda x: padded(x[at], block), (w, keep, grid))
        factor = inverse_factor(padded_square(h_damped[at][:, at], block))
        choose = None if choice is None else _chooser(choice, quota, factor, h=h, at=at)
        how = {"snap": snap, "block": block, "find": find, "choose": choose}
        q, kept, qparams = _sweep(rows, kept, grids, factor, **how)
        back = jnp.argsort(at)
        q, keep = q[back], keep if choice is None else kept[back]
        if sweeps and find is None:
            q = _descend(q, w, h, keep=keep, grid=grid, snap=snap, sweeps=sweeps)
        nearest = snap(w, grid, keep)
        mine, plain = loss_of(q - w, h), loss_of(nearest - w, h)
        # A factorization that failed must show: NaN is kept.
        better = ~(mine > plain)
        q, loss = jnp.where(better, q, nearest), jnp.where(better, mine, plain)
        return Solved(q, loss, better, qparams, keep)

    grids, quotas = (jax.tree.map(flat, tree) for tree in (grid, quota))
    found = jax.vmap(one)(flat(w), flat(hessian), flat(keep), grids, quotas)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def with_damping(run: Callable[[Array], Solved], damping: float, *, name: str) -> Solved:
    """What `run(damp)` gives with the least damping, times 1, 10, ..., for which it is finite.

    Warns of every failure.

    Raises:
      ValueError: none of them is, with the name of the layer.
    """
    for attempt in range(_ATTEMPTS):
        damp = damping * 10**attempt
        result = run(jnp.float32(damp))
        if bool(jnp.all(jnp.isfinite(result.weights))):
            return result
        warn(
            f"{name}: X^T X is not positive definite with damping {damp:.3g}; "
            "trying ten times as much"
        )
    raise ValueError(f"{name}: X^T X has no Cholesky factor at any damping")


class _Chooser(NamedTuple):
    choice: Choice
    quota: Array  # int32 [spans]
    scale: Array  # [padded K], 1 / U_ii; 0 where the input was always zero
    size: int  # K

    def __call__(self, rows: Array, keep: Array, at: Array) -> Array:
        """The weights of the span from input `at` on that stay, of those that `keep` leaves."""
        span = self.choice.span
        scale = lax.dynamic_slice_in_dim(self.scale, at, span)[:, None]
        # s = |w_i| / U_ii: s^2 is what the removal adds to the loss
        scores = jnp.abs(rows) * scale
        there = (at + jnp.arange(span) < self.size)[:, None]
        scores = jnp.where(there & keep, scores, -jnp.inf)
        pick = top_k_mask if self.choice.together else jax.vmap(top_k_mask, (1, None), 1)
        return pick(scores, self.quota[at // span]) & keep


def _chooser(choice: Choice, quota: Array | None, factor: Array, *, h: Array, at: Array):
    assert quota is not None
    extra = len(factor) - len(h)
    # An input that was always zero costs nothing to lose.
    alive = jnp.pad(jnp.diagonal(h)[at] > 0, (0, extra))
    scale = jnp.where(alive, 1 / jnp.diagonal(factor), 0.0)
    spans = -(-len(h) // choice.span)
    quota = jnp.pad(quota, (0, len(factor) // choice.span - spans))
    return _Chooser(choice, quota, scale, len(h))


def _sweep(w, keep, grid, factor, *, snap, block, find, choose) -> tuple[Array, Array, Any]:
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
            qparams = find(jnp.where(kept & valid, rows, 0.0))
            here = jax.tree.map(lambda p: jnp.broadcast_to(p, (block, *p.shape[1:])), qparams)
            rounded = lambda x, grid, keep: jnp.where(keep, find.format.fake_quant(x, grid), 0.0)

        def row(j, carry):
            rows, kept, q, errors = carry
            value = rounded(rows[j], jax.tree.map(lambda g: g[j], here), kept[j])
            error = (rows[j] - value) / corner[j, j]
            rows = rows - corner[j][:, None] * error[None]
            return rows, kept, q.at[j].set(value), errors.at[j].set(error)

        def span(number, carry):
            rows, kept, *rest = carry
            first, width = number * choose.choice.span, choose.choice.span
            part = lambda x: lax.dynamic_slice_in_dim(x, first, width)
            chosen = choose(part(rows), part(kept), at + first)
            kept = lax.dynamic_update_slice_in_dim(kept, chosen, first, 0)
            return lax.fori_loop(first, first + width, row, (rows, kept, *rest))

        empty = jnp.zeros((block, n), w.dtype)
        body, count = (row, block) if choose is None else (span, block // choose.choice.span)
        _, kept, q, errors = lax.fori_loop(0, count, body, (rows, kept, empty, empty))
        qparams = jax.tree.map(lambda p: p[0], qparams)
        return w - _matmul(upper.T, errors), (q, kept, qparams)

    _, (q, kept, qparams) = lax.scan(step, w, jnp.arange(0, size, block))
    return q.reshape(size, n), kept.reshape(size, n), qparams


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
