"""Which weights are compared with each other: a leaf's, all, ERK's shares, what is worth its cost.

A scope selects among units (see `structure`), which for unstructured pruning are the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.numerics.top_k import keep_count, top_k_mask, top_k_masks
from jaxcompress.core.paths import match_rules


class Units(NamedTuple):
    """The units of one leaf.

    Attributes:
      path, shape: of the leaf.
      scores: [...] one per unit, higher stays.
      weights: int, how many weights go with each unit; broadcastable to scores.
    """

    path: str
    shape: tuple[int, ...]
    scores: Array
    weights: np.ndarray


class Scope(Protocol):
    """Chooses units of several leaves; hashable and immutable."""

    def select(self, leaves: Sequence[Units], sparsity: Any) -> list[Array]:
        """Masks of the units; `sparsity` is a number in [0, 1] or a traced scalar."""
        ...


@dataclass(frozen=True)
class Layer:
    """The sparsity holds in every leaf: "layer"."""

    def select(self, leaves: Sequence[Units], sparsity: Any) -> list[Array]:
        return [_top([u.scores], keep_count(u.scores.size, sparsity))[0] for u in leaves]


@dataclass(frozen=True)
class Global:
    """The sparsity holds over all leaves together, their scores compared: "global"."""

    def select(self, leaves: Sequence[Units], sparsity: Any) -> list[Array]:
        total = sum(u.scores.size for u in leaves)
        return _top([u.scores for u in leaves], keep_count(total, sparsity))


@dataclass(frozen=True)
class ERK:
    """The scope of `erk`."""

    dense: tuple[str, ...]

    def select(self, leaves: Sequence[Units], sparsity: Any) -> list[Array]:
        counts = erk_counts(leaves, sparsity, dense=self.dense)
        return [top_k_mask(u.scores, k) for u, k in zip(leaves, counts, strict=True)]


def erk(*, dense: Sequence[str] = ()) -> ERK:
    """Each leaf keeps a share in proportion to (sum of its axes) / (product of its axes).

    density_l = min(1, eps sum(shape_l) / prod(shape_l)), with eps such that of N units in all
    exactly K = round((1 - sparsity) N) stay: small layers stay denser. A leaf with U_l units keeps
    round(density_l U_l); eps is the largest float32 whose sum does not exceed K, and what is then
    missing (leaves of one shape round up at the same eps) goes to the first of the leaves that
    round up next, in flatten order.

    Args:
      dense: regexes on paths of leaves that keep everything; they count in the sparsity.

    Raises:
      ValueError: (at init) a regex that matches nothing; a sparsity, if a number, that the dense
        leaves do not allow.

    Source: Evci et al. 2020, Rigging the Lottery, arXiv 1911.11134; Mocanu et al. 2018, SET.
    """
    return ERK((dense,) if isinstance(dense, str) else tuple(dense))


def erk_counts(leaves: Sequence[Units], sparsity: Any, *, dense: Sequence[str] = ()) -> Array:
    """How many units each leaf keeps under `erk`; int32 [leaves], of exact sum."""
    if not leaves:
        return jnp.zeros((0,), jnp.int32)
    matched = match_rules({rule: rule for rule in dense}, [u.path for u in leaves])
    fixed = np.asarray([matched[u.path] is not None for u in leaves])
    sizes = np.asarray([u.scores.size for u in leaves], np.int32)
    total, needed = int(sizes.sum()), int(sizes[fixed].sum())
    keep = keep_count(total, sparsity)
    if isinstance(keep, int) and keep < needed:
        raise ValueError(
            f"erk: sparsity {sparsity} leaves {keep} of {total}, but the dense leaves have {needed}"
            f"; the highest sparsity is {(total - needed) / total:.4f}"
        )
    # density_l U_l = eps q_l
    q = np.asarray([sum(u.shape) * (u.scores.size / max(np.prod(u.shape), 1)) for u in leaves])
    return _apportion(jnp.int32(keep), q.astype(np.float32), sizes, fixed)


def _apportion(keep: Array, q: np.ndarray, sizes: np.ndarray, fixed: np.ndarray) -> Array:
    most = np.nextafter(sizes.astype(np.float32), np.float32(0))  # an int32, as `sizes` may not be

    def counts(eps_bits):
        # k_l = min(U_l, round(eps q_l))
        share = jnp.round(lax.bitcast_convert_type(eps_bits, np.float32) * q)
        free = jnp.where(share > most, sizes, jnp.minimum(share, most).astype(np.int32))
        return jnp.where(fixed, sizes, free)

    last = np.finfo(np.float32).max.view(np.uint32) - np.uint32(1)
    bits = largest(lambda bits: jnp.sum(counts(bits)) <= keep, last)
    now = counts(bits)
    room = counts(bits + np.uint32(1)) - now
    before = jnp.cumsum(room) - room
    return now + jnp.clip(keep - jnp.sum(now) - before, 0, room)


def as_scope(scope: Any) -> Scope:
    """A scope from its name or a scope.

    Raises:
      ValueError: anything else.
    """
    named = {"layer": Layer(), "global": Global()}
    if isinstance(scope, str) and scope in named:
        return named[scope]
    if isinstance(scope, str) or not hasattr(scope, "select"):
        raise ValueError(
            f'scope must be "layer" or "global", or erk(...) or cost_weighted(...), got {scope!r}'
        )
    return scope


def _top(scores: list[Array], keep: Any) -> list[Array]:
    if isinstance(keep, int) and keep == 0:  # all groups N:M, say: there is nothing to compare
        return [jnp.zeros(s.shape, bool) for s in scores]
    return top_k_masks(scores, keep)


def largest(fits: Any, high: Any) -> Array:
    """The largest uint32 up to `high` that fits, or 0; `fits` must hold up to some number."""

    def halve(_, ends):
        low, high = ends
        middle = high - (high - low) // np.uint32(2)
        good = fits(middle)
        below = jnp.maximum(middle, np.uint32(1)) - np.uint32(1)
        return jnp.where(good, middle, low), jnp.where(good, high, below)

    start = jnp.uint32(0), jnp.asarray(high, np.uint32)
    return lax.fori_loop(0, 32, halve, start)[0]
