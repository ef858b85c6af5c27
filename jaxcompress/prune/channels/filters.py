"""Scores of filters from weights alone: norms, distances to the others, BatchNorm's scales, AFIE.

Scores are float32, one per channel, and higher stays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import entr

from jaxcompress.core.compressor import at_path, holds, is_float_array
from jaxcompress.core.numerics.top_k import keep_count, top_k_mask, top_k_masks
from jaxcompress.core.paths import leaves_with_paths, match_rules


def filter_norms(w: Array, axis: int = -1, *, order: float = 1) -> Array:
    """||F_i|| of every filter F_i, a slice of w along `axis`; float32 [n].

    This is the third reading of "L1 pruning": filters are ranked, none is compared with a number.

    Args:
      w: [...] floats.
      axis: of the channels; -1, the outputs of a Flax kernel.
      order: 1 (the paper's), 2, any other p > 0, or inf.

    Raises:
      ValueError: an axis that w does not have, an order that is not positive, NaN in w.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets, arXiv 1608.08710.

    >>> print(filter_norms(jnp.array([[3.0, -1.0], [4.0, 1.0]])))
    [7. 2.]
    >>> print(filter_norms(jnp.array([[3.0, -1.0], [4.0, 1.0]]), order=2)[0])
    5.0
    """
    if not order > 0:
        raise ValueError(f"order must be positive, got {order}")
    magnitude = jnp.abs(_filters(w, axis))
    if order == 1:
        return jnp.sum(magnitude, axis=1)
    # ||F|| = m * (sum (|F| / m)^p)^(1/p), m the largest: no power overflows or vanishes.
    largest = jnp.max(magnitude, axis=1, initial=0.0)
    if order == float("inf"):
        return largest
    relative = magnitude / jnp.where(largest > 0, largest, 1.0)[:, None]
    return largest * jnp.sum(relative**order, axis=1) ** (1 / order)


def fpgm(w: Array, axis: int = -1) -> Array:
    """S_i = sum_j ||F_i - F_j||_2 of every filter; the lowest is the easiest to replace.

    The filter nearest to the geometric median has the lowest S. Unlike a norm it does not change
    when one constant is added to all filters. Time n^2 d, memory n d: one filter at a time.

    Args:
      w: [...] floats.
      axis: of the n filters; -1, the outputs of a Flax kernel.

    Returns:
      float32 [n].

    Raises:
      ValueError: an axis that w does not have, NaN in w.

    Source: He et al. 2019, Filter Pruning via Geometric Median, arXiv 1811.00250.

    >>> print(fpgm(jnp.array([[0.0, 1.0, 5.0]])))
    [6. 5. 9.]
    """
    filters = _filters(w, axis)
    # Differences and not the Gram matrix: |a|^2 + |b|^2 - 2 a b of near filters is rounding.
    distances = lambda f: jnp.sqrt(jnp.sum(jnp.square(filters - f[None]), axis=1))
    return lax.map(lambda f: jnp.sum(distances(f)), filters)


def afie(w: Array) -> Array:
    """Average filter information entropy of a layer, a float32 scalar: H(p) / outputs.

    With the singular values s of the kernel's mean over space [in, out], p = softmax((s - min s) /
    (max s - min s)), uniform if all s are equal up to rounding. It scores layers, not filters: the
    share to prune in a layer goes as 1 / AFIE. As the exponents lie in [0, 1], H is within 0.124 of
    log min(in, out) whatever the weights: it says little more than the width of the layer.

    Args:
      w: [*space, in, out] floats, in and out at least 1.

    Raises:
      ValueError: fewer than two axes, an empty kernel, NaN in w.

    Source: Lu et al. 2022, Entropy Induced Pruning Framework, arXiv 2208.06660.
    """
    if w.ndim < 2 or w.size == 0:
        raise ValueError(f"w must be a kernel [*space, in, out], got shape {w.shape}")
    _refuse(w)
    w = w.astype(jnp.float32)
    s = jnp.linalg.svd(jnp.mean(w, axis=tuple(range(w.ndim - 2))), compute_uv=False)
    span, rounding = s[0] - s[-1], max(w.shape[-2:]) * float(jnp.finfo(jnp.float32).eps) * s[0]
    # p = softmax((s - s_min) / (s_max - s_min)), K = -sum p log p, AFIE = K / outputs
    p = jax.nn.softmax(jnp.where(span > rounding, (s - s[-1]) / span, 0.0))
    return jnp.sum(entr(p)) / w.shape[-1]


def slimming(params: Any, rule: str) -> dict[str, Array]:
    """|gamma| of every channel of the matched BatchNorm scales: {path: float32, gamma's shape}.

    Args:
      params: any tree.
      rule: regex on whole paths, e.g. ".*BatchNorm.*/scale".

    Raises:
      ValueError: the rule matches nothing, or a leaf that is no array of floats with an axis; NaN.

    Source: Liu et al. 2017, Network Slimming, arXiv 1708.06519.

    >>> params = {"norm": {"scale": jnp.array([0.5, -2.0]), "bias": jnp.ones(2)}}
    >>> print(slimming(params, ".*scale"))
    {'norm/scale': Array([0.5, 2. ], dtype=float32)}
    """
    return {path: jnp.abs(gamma) for path, gamma in _scales(params, rule).items()}


def slimming_masks(params: Any, rule: str, *, sparsity: Any, at_least: int = 1) -> dict[str, Array]:
    """Which channels stay when the share `sparsity` with the smallest |gamma| of all layers goes.

    The paper's global percentile with an exact count: round((1 - sparsity) * channels) stay. A
    percentile can empty a layer and cut the network, so the `at_least` largest of each stay first.

    Args:
      params, rule: as in `slimming`.
      sparsity: share of channels to prune, in [0, 1]; may be traced.
      at_least: channels that stay in every layer.

    Returns:
      {path: bool, gamma's shape}. A leaf counts as one layer.

    Raises:
      ValueError: as in `slimming`; more channels to prune than `at_least` allows. Where sparsity is
        traced, as many stay as have to.
    """
    if at_least < 0:
        raise ValueError(f"at_least must not be negative, got {at_least}")
    scores = slimming(params, rule)
    first = {path: min(at_least, s.size) for path, s in scores.items()}
    total, needed = sum(s.size for s in scores.values()), sum(first.values())
    keep = keep_count(total, sparsity)
    if isinstance(keep, int) and keep < needed:
        raise ValueError(
            f"sparsity {sparsity} leaves {keep} of {total} channels, but at_least={at_least} keeps "
            f"{needed}; the highest sparsity is {(total - needed) / max(total, 1):.4f}"
        )
    sure = {path: top_k_mask(s, first[path]) for path, s in scores.items()}
    ranked = {path: jnp.where(sure[path], jnp.inf, s) for path, s in scores.items()}
    return top_k_masks(ranked, keep if isinstance(keep, int) else jnp.maximum(keep, needed))


def slimming_penalty(params: Any, rule: str, *, strength: Any = 1e-4) -> Array:
    """strength * sum |gamma| over the matched BatchNorm scales, to be added to the loss.

    Its derivative is strength * sign(gamma), 0 at 0. Arguments and errors as of `slimming`.

    >>> params = {"scale": jnp.array([0.5, -2.0, 0.0])}
    >>> print(jax.grad(lambda p: slimming_penalty(p, "scale", strength=0.1))(params)["scale"])
    [ 0.1 -0.1  0. ]
    """
    # |gamma| as gamma * sign(gamma): the derivative of abs at 0 would be 1.
    scales = _scales(params, rule).values()
    return strength * sum(jnp.sum(gamma * jnp.sign(gamma)) for gamma in scales)


def _scales(params: Any, rule: str) -> dict[str, Array]:
    leaves = leaves_with_paths(params)
    matched = match_rules({rule: rule}, [path for path, _ in leaves])
    scales = {}
    for path, gamma in leaves:
        if matched[path]:
            with at_path(path):
                if not is_float_array(gamma) or not gamma.shape:
                    raise ValueError("a BatchNorm scale must be an array of floats with an axis")
                _refuse(gamma)
            scales[path] = gamma.astype(jnp.float32)
    return scales


def _filters(w: Array, axis: int) -> Array:
    # float32 [n, d]
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis {axis} is none of an array of shape {w.shape}")
    _refuse(w)
    w = jnp.moveaxis(w, axis, 0).astype(jnp.float32)
    return w.reshape(w.shape[0], w.size // max(w.shape[0], 1))


def _refuse(w: Array) -> None:
    if not holds(lambda x: ~jnp.isnan(x), w):
        raise ValueError("weights must not be NaN")
