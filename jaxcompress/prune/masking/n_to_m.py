"""N:M: of every M consecutive weights N stay."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.sparse import kept_in_line
from jaxcompress.prune.masking.structures import check_axis, divided, first, merged, padded

_UNROLLED = 16  # comparisons of a group in one pass


@dataclass(frozen=True)
class NM:
    """The structure of `n_m`."""

    n: int
    m: int
    axis: int

    @property
    def share(self) -> float:
        """Of zeros, where all groups are N:M."""
        return 1 - self.n / self.m

    def check(self, shape: tuple[int, ...]) -> None:
        check_axis("n_m", self.axis, shape)

    def pool(self, scores: Array) -> Array:
        groups, kept = self._groups(scores.astype(jnp.float32))
        real = self._table(np.arange(self.m)[:, None] < self._sizes(scores.shape), scores.ndim)
        lost = jnp.sum(jnp.where(real & ~kept, groups, 0.0), axis=0)
        # A group too short to lose anything costs nothing to convert: its mean is 0.
        return lost / np.maximum(self.weights(scores.shape), 1).astype(np.float32)

    def expand(self, units: Array, scores: Array) -> Array:
        axis = self.axis % scores.ndim
        _, kept = self._groups(scores)
        mask = jnp.moveaxis(kept | units[None], 0, axis + 1)
        return first(merged(mask, axis), scores.shape[axis], axis)

    def weights(self, shape: tuple[int, ...]) -> np.ndarray:
        place = [1] * len(shape)
        place[self.axis] = -1
        return (self._sizes(shape) - self._quotas(shape)).reshape(place)

    def _sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        # int [G]: m, and what is left for the last group
        length = shape[self.axis]
        return np.minimum(length - np.arange(0, length, self.m), self.m)

    def _quotas(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray([kept_in_line(int(r), self.n, self.m) for r in self._sizes(shape)], int)

    def _table(self, table: np.ndarray, ndim: int) -> np.ndarray:
        # [m or 1, G] with the axes of what `_groups` gives.
        rank_of_groups = [1] * ndim
        rank_of_groups[self.axis] = -1
        return table.reshape(len(table), *rank_of_groups)

    def _groups(self, scores: Array) -> tuple[Array, Array]:
        # Scores [m, ..., G, ...], the last group filled up with what is never kept; and what is.
        # With the place in the group as the first axis every comparison is one of whole arrays.
        axis = self.axis % scores.ndim
        low = jnp.array(-jnp.inf, scores.dtype)
        clean = jnp.where(jnp.isnan(scores), low, scores)
        whole = divided(padded(clean, self.m, axis, low), self.m, axis)
        groups = jnp.moveaxis(whole, axis + 1, 0)
        place = jax.lax.broadcasted_iota(jnp.int32, (self.m, *[1] * scores.ndim), 0)

        def count(j, rank):
            # rank_i = #{j: s_j > s_i, or s_j = s_i and j < i}; the lowest ranks stay
            other = jax.lax.dynamic_index_in_dim(groups, j, axis=0)
            ahead = (other > groups) | ((other == groups) & (j < place))
            return rank + ahead.astype(rank.dtype)

        none = jnp.zeros(groups.shape, np.uint8 if self.m < 256 else np.int32)
        rank = jax.lax.fori_loop(0, self.m, count, none, unroll=min(self.m, _UNROLLED))
        quotas = self._table(self._quotas(scores.shape)[None].astype(none.dtype), scores.ndim)
        return groups, rank < quotas


def n_m(n: int, m: int, *, axis: int = -2) -> NM:
    """Of m consecutive weights along an axis the n with the highest scores stay.

    The pattern fixes the share of zeros, 1 - n/m: `magnitude(structure=n_m(2, 4))` is 2:4, and a
    number that says otherwise is an error. A schedule is the share of groups of m that are already
    N:M, the others being dense: `cubic(0.0, 1.0, ...)` for a ramp. Groups
    that lose least (in the mean over what they lose) are converted first. Of a last group of only
    r weights ceil(n r / m) stay; ties keep the lower index.

    Args:
      n, m: 0 < n <= m.
      axis: along which groups lie; -2, the inputs of a Flax kernel, which is what hardware skips.

    Raises:
      ValueError: n and m out of range; (at init) a leaf without the axis.

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378.

    >>> w = jnp.array([[4.0, 1.0, 3.0, 2.0, 5.0, 6.0]])
    >>> pattern = n_m(2, 4, axis=-1)
    >>> pattern.expand(jnp.zeros((1, 2), bool), w).astype(int).tolist()
    [[1, 0, 1, 0, 0, 1]]
    """
    if not 0 < n <= m:
        raise ValueError(f"n_m needs 0 < n <= m, got {n=}, {m=}")
    return NM(n, m, axis)
