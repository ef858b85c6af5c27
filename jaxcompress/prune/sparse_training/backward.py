"""A sparse forward pass with gradients beyond it: STE, SR-STE, Top-KAST.

Hidden weights keep their values and go on learning, so train with the plain optimizer: a
`masked_optimizer` would set them to zero. `apply` hides them, `pack` leaves them out.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    is_float_array,
    quartet,
    state_leaves,
)
from jaxcompress.formats import straight_through
from jaxcompress.prune.masking.magnitudes import absolute
from jaxcompress.prune.masking.mask_state import PruneState, check_owner, hide, is_dense, pack_masks
from jaxcompress.prune.masking.n_to_m import n_m
from jaxcompress.prune.masking.scopes_of_comparison import Scope
from jaxcompress.prune.masking.scored import Criterion, by_score
from jaxcompress.prune.masking.structures import UNSTRUCTURED, Structure


def hide_through(w: Any, mask: Array, passing: Any = True) -> Any:
    """`hide(w, mask)`, whose derivative by w is 1 where `passing` (default: everywhere), else 0.

    >>> w, mask = jnp.array([2.0, 3.0]), jnp.array([True, False])
    >>> print(hide_through(w, mask), jax.grad(lambda w: jnp.sum(hide_through(w, mask)))(w))
    [2. 0.] [1. 1.]
    """
    hidden = hide(w, mask)
    if hidden is w:
        return w
    return straight_through(w, jax.lax.stop_gradient(hidden), jnp.asarray(passing))


def ste(
    sparsity: Any,
    *,
    scope: str | Scope = "layer",
    structure: Structure = UNSTRUCTURED,
    min_ndim: int = 2,
) -> Compressor:
    """Forward m * w, m the largest |w|; the gradient reaches all w, so that any may come back.

    With a schedule this is the GMP-STE of the literature. Masks are renewed where the schedule
    fires: for a number at every `update`.

    Args:
      sparsity, scope, structure, min_ndim: as in `by_score`.

    Raises:
      ValueError: as `by_score`.

    Source: Bengio et al. 2013, arXiv 1308.3432; Lin et al. 2020, Dynamic Model Pruning with
    Feedback, arXiv 2006.07253.

    >>> comp = ste(0.5)
    >>> w = jnp.array([[3.0, -1.0]])
    >>> print(jax.grad(lambda w: jnp.sum(comp.apply(w, comp.init(w))))(w))
    [[1. 1.]]
    """
    criterion = Criterion(absolute, view=hide_through)
    return by_score(criterion, sparsity, scope=scope, structure=structure, min_ndim=min_ndim)


def sr_ste(n: int, m: int, *, axis: int = -2, decay: float = 2e-4, min_ndim: int = 2) -> Compressor:
    """N:M from scratch: forward m * w, and for w the gradient g + decay (1 - m) w.

    The decay of what is hidden keeps masks from flipping to and fro. It is added where gradients
    flow back through `apply`, whatever the loss and its scale, and once per differentiation: for
    gradients per example (vmap of grad) once for each. The masks are renewed at every `update`.

    Args:
      n, m, axis: as in `n_m`: n of m consecutive weights stay; axis -2, inputs of a Flax kernel.
      decay: lambda, not negative; the paper's is 2e-4.
      min_ndim: leaves with fewer axes stay dense, and so do integers.

    Raises:
      ValueError: a negative decay; as `n_m` and `by_score`.

    Source: Zhou et al. 2021, Learning N:M fine-grained structured sparse neural networks from
    scratch, arXiv 2102.04010.

    >>> comp = sr_ste(1, 2, axis=-1, decay=0.5)
    >>> w = jnp.array([[3.0, -1.0]])
    >>> print(jax.grad(lambda w: jnp.sum(comp.apply(w, comp.init(w))))(w))
    [[1.  0.5]]
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must not be negative, got {decay}")

    def view(w, mask):
        # A leaf that is not masked is none of the method's.
        return _hide_refined(w, mask, decay) if hide(w, mask) is not w else w

    criterion = Criterion(absolute, view=view)
    return by_score(criterion, structure=n_m(n, m, axis=axis), min_ndim=min_ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _hide_refined(w: Array, mask: Array, decay: float) -> Array:
    del decay
    return hide(w, mask)


def _refined_forward(w: Array, mask: Array, decay: float) -> Any:
    del decay
    return hide(w, mask), (w, mask)


def _refined_backward(decay: float, kept: Any, g: Array) -> Any:
    w, mask = kept
    # g + lambda (1 - m) w
    return g + hide(jnp.asarray(decay, w.dtype) * w, ~mask), None


_hide_refined.defvjp(_refined_forward, _refined_backward)


def top_kast(
    forward: Any, backward: Any, *, scope: str | Scope = "layer", min_ndim: int = 2
) -> Compressor:
    """Forward A, the largest |w|; backward B, more of them: the gradient is exactly 0 outside B.

    A is part of B, and `masks` gives A; B lies in the state's `stats`, see `backward_masks`. All
    weights keep their values, so that they may come back: with plain SGD those outside B stay as
    they are, with momentum or weight decay freeze them by `hold()`, last in a chain, with
    masks=backward_masks(state). Without a growing penalty (`top_kast_penalty`) B \\ A explores
    little.

    Args:
      forward: share of zeros of A, a number or a schedule. A number renews A at every `update`,
        `linear(s, s, end=steps, every=n)` at every n-th; a ramp only up to its end.
      backward: share of zeros of B, not above `forward`; likewise.
      scope: as in `by_score`.
      min_ndim: leaves with fewer axes stay dense, and so do integers.

    Raises:
      ValueError: `backward` above `forward` (numbers); as `by_score`.

    Source: Jayakumar et al. 2020, Top-KAST: Top-K Always Sparse Training, arXiv 2106.03517.

    >>> comp = top_kast(2 / 3, 1 / 3)
    >>> w = jnp.array([[3.0, -2.0, 1.0]])
    >>> print(jax.grad(lambda w: jnp.sum(comp.apply(w, comp.init(w))))(w))
    [[1. 1. 0.]]
    """
    if isinstance(forward, int | float) and isinstance(backward, int | float):
        if backward > forward:
            raise ValueError(
                f"the backward pass must not be sparser than the forward pass, got "
                f"{forward=}, {backward=}"
            )
    sets = [
        by_score(Criterion(absolute), s, scope=scope, min_ndim=min_ndim)
        for s in (forward, backward)
    ]

    def joined(a, b):
        # With schedules of their own, or shares that round, B could lack what A has.
        wide = jax.tree.map(jnp.logical_or, a.buffers.masks, b.buffers.masks)
        return CompressState(buffers=a.buffers._replace(stats=wide))

    def init(params):
        return joined(*(comp.init(params) for comp in sets))

    def apply(params, state):
        check_owner(state)
        return jax.tree.map(hide_through, params, state.buffers.masks, backward_masks(state))

    def update(params, state, *, grads=None, **extra):
        del grads, extra
        check_owner(state)
        a, step, b = state.buffers
        parts = [CompressState(buffers=PruneState(m, step)) for m in (a, b)]
        return joined(*(c.update(params, p) for c, p in zip(sets, parts, strict=True)))

    def pack(params, state):
        return pack_masks(params, state.buffers.masks)

    return quartet(init, apply, update, pack)


def backward_masks(state: CompressState) -> Any:
    """B of a state of `top_kast`: where its gradients are not 0; the params' structure.

    Raises:
      ValueError: a state of another compressor.
    """
    check_owner(state)
    if jax.tree.structure(state.buffers.stats) != jax.tree.structure(state.buffers.masks):
        raise ValueError("the state is not one of top_kast: it holds no masks of a backward pass")
    return state.buffers.stats


def top_kast_penalty(params: Any, state: CompressState) -> Array:
    """1/2 sum_A w^2 + 1/(2 D) sum_{B \\ A} w^2, D the density of A in its leaf; float32 [].

    Times a factor, a term of the loss: B \\ A decays faster than A, so that new weights enter A
    only if their gradients insist. Dense leaves do not count.

    Args:
      params: those of the state.
      state: of `top_kast`.

    Raises:
      ValueError: a state of another compressor.

    >>> comp = top_kast(0.75, 0.5)
    >>> w = jnp.array([[4.0, 2.0, 1.0, 1.0]])
    >>> print(top_kast_penalty(w, comp.init(w)))  # 1/2 (16 + 4 / 0.25)
    16.0
    """
    check_owner(state)
    treedef = jax.tree.structure(params)
    masks, wide = (state_leaves(treedef, m) for m in (state.buffers.masks, backward_masks(state)))
    total = jnp.zeros((), jnp.float32)
    for w, a, b in zip(jax.tree.leaves(params), masks, wide, strict=True):
        if not is_float_array(w) or is_dense(w, a) or not w.size:
            continue
        density = jnp.mean(a.astype(jnp.float32))
        squares = jnp.square(w.astype(jnp.float32))
        inner, outer = (jnp.sum(jnp.where(m, squares, 0.0)) for m in (a, b & ~a))
        total += (inner + outer / jnp.maximum(density, 1.0 / w.size)) / 2
    return total
