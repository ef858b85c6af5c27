"""AC/DC: dense and sparse phases in turn, sparse at the end."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import Compressor
from jaxcompress.prune.masking.magnitudes import magnitude
from jaxcompress.prune.masking.schedules import check_sparsity
from jaxcompress.prune.masking.scopes_of_comparison import Scope
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


@dataclass(frozen=True)
class Alternating:
    """The schedule of `alternating`."""

    sparsity: Any
    start: int
    sparse: int
    dense: int
    end: int

    def __call__(self, step: Array) -> Array:
        zero = jnp.zeros((), jnp.float32)
        return jnp.where(self._is_sparse(step), jnp.asarray(self.sparsity, jnp.float32), zero)

    def fires(self, step: Array) -> Array:
        step = jnp.asarray(step)
        # In the first step of a phase, and where the last begins.
        return (self._is_sparse(step) != self._is_sparse(step - 1)) | (step == self.end)

    def _is_sparse(self, step: Array) -> Array:
        since = jnp.asarray(step) - self.start
        return ((since >= 0) & (since % (self.sparse + self.dense) < self.sparse)) | (
            jnp.asarray(step) >= self.end
        )


def alternating(sparsity: float, *, start: int, sparse: int, dense: int, end: int) -> Alternating:
    """Dense before `start`; then `sparse` steps at `sparsity` and `dense` steps at 0, in turn.

    From `end` on it is `sparsity`. Masks are renewed in the first step of each phase, and stay.

    Args:
      sparsity: in [0, 1]; may be traced.
      start, end: steps, 0 <= start <= end.
      sparse, dense: lengths of the phases in steps, at least 1.

    Raises:
      ValueError: a sparsity outside [0, 1]; steps out of order, a phase without a step.

    >>> schedule = alternating(0.5, start=1, sparse=2, dense=1, end=7)
    >>> [float(schedule(t)) for t in range(9)]
    [0.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.0, 0.5, 0.5]
    >>> [t for t in range(9) if schedule.fires(t)]
    [1, 3, 4, 6, 7]
    """
    check_sparsity("sparsity", sparsity)
    if not 0 <= start <= end or sparse < 1 or dense < 1:
        raise ValueError(
            f"alternating needs 0 <= start <= end and phases of at least 1 step, got "
            f"{start=}, {sparse=}, {dense=}, {end=}"
        )
    return Alternating(sparsity, start, sparse, dense, end)


def ac_dc(
    sparsity: float,
    *,
    start: int,
    sparse: int,
    dense: int,
    end: int,
    scope: str | Scope = "global",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Trains dense and with the largest |w| only, in turn, and sparse at the end.

    A sparse phase keeps the mask of its first step. In a dense phase what was pruned begins at 0;
    train with `dynamic_optimizer(tx)`, so that its moments do too.

    Args:
      sparsity, start, sparse, dense, end: as in `alternating`. (ImageNet in the paper: 100 epochs,
        start 10, phases of 5, end 85 after a longer dense phase.)
      scope, structure, min_ndim: as in `magnitude`.

    Raises:
      ValueError: as `alternating` and `magnitude`.

    Source: Peste et al. 2021, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks, arXiv 2106.12379.

    >>> comp = ac_dc(0.5, start=1, sparse=1, dense=1, end=9)
    >>> w = jnp.array([[3.0, -1.0]])
    >>> state = comp.init(w)
    >>> for _ in range(3):
    ...     state = comp.update(w, state)
    ...     print(comp.apply(w, state))
    [[3. 0.]]
    [[ 3. -1.]]
    [[3. 0.]]
    """
    schedule = alternating(sparsity, start=start, sparse=sparse, dense=dense, end=end)
    return magnitude(schedule, scope=scope, structure=structure, min_ndim=min_ndim)
