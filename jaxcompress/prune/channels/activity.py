"""What channels do over data: shares of zeros (APoZ), on and off, ranks of feature maps (HRank).

Which channels are meant, and what is pruned with them: see `taps`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import entr

from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph import Tap
from jaxcompress.prune.channels.input_channels import (
    Batch,
    Tally,
    chosen_taps,
    empty_tally,
    gather,
    maps,
    peek,
    refuse,
    tallied,
)


@on_any_mesh
def apoz(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[Batch], *, sites: str | None = None
) -> dict[str, Array]:
    """1 - APoZ of every input channel: the share of its activations that are not zero.

    APoZ is the average percentage of zeros; channels with a high one are pruned first, so that
    with its complement higher stays, as everywhere here. Samples are images and positions.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: its parameters.
      data: tuples of inputs; read once, batch by batch.
      sites: regex on the names of the sites; None: all contractions with a weight.

    Returns:
      {tap name: float32 [*loops, channels]}, see `taps`; NaN where a branch was never taken.

    Raises:
      ValueError: no batch, no such site, NaN or Inf in an activation, with the site's name.

    Source: Hu et al. 2016, Network Trimming, arXiv 1607.03250.

    >>> import jax
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[1.0, -1.0, 1.0]]), "down": jnp.ones((3, 1))}
    >>> x = jnp.array([[1.0], [2.0], [-1.0], [3.0]])
    >>> print(apoz(fn, params, [(x,)], sites="down")["down"])
    [0.75 0.25 0.75]
    """
    return _scores(apply_fn, params, data, sites, count_nonzero)


@on_any_mesh
def on_off_entropy(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[Batch], *, sites: str | None = None
) -> dict[str, Array]:
    """Entropy of "is it on?" of every input channel: H(q), q the share of activations above zero.

    For ReLU, and any activation with the sign of its input, q = P(pre-activation > 0). H = 0: the
    neuron is always off, or always on and therefore linear; the mean over a layer is its score in
    EGP and NEPENTHE, and a layer of 0 can be folded into the next. Samples are images and
    positions, not averaged. Arguments, result and errors as of `apoz`.

    Source: Liao et al. 2023, Can unstructured pruning reduce the depth in deep neural networks?,
    arXiv 2308.06619; Liao et al. 2024, NEPENTHE, arXiv 2404.16890.
    """
    shares = _scores(apply_fn, params, data, sites, count_positive)
    return {name: binary_entropy(q) for name, q in shares.items()}


def binary_entropy(q: Array) -> Array:
    """-q log q - (1 - q) log(1 - q) in nats, of probabilities q.

    >>> print(binary_entropy(jnp.array([0.0, 0.02, 0.5])).round(3))
    [0.    0.098 0.693]
    """
    return jnp.abs(entr(q) + entr(1.0 - q))  # -0 at 0 and 1


@on_any_mesh
def hrank(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[Batch],
    *,
    sites: str | None = None,
    tol: float | None = None,
) -> dict[str, Array]:
    """The mean rank of the feature maps of every input channel of the 2-d convolutions.

    Args:
      apply_fn, params, data: as in `apoz`.
      sites: regex on the names of convolutions over two axes; None: all of them.
      tol: as in `map_ranks`.

    Returns:
      {tap name: float32 [*loops, channels]}, in [0, min(h, w)].

    Raises:
      ValueError: as in `apoz`; a negative `tol`.

    Source: Lin et al. 2020, HRank, arXiv 2002.10179.
    """
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    return _scores(apply_fn, params, data, sites, _CountRanks(tol), planes=True)


def map_ranks(x: Array, tol: float | None = None) -> Array:
    """Ranks of the feature maps of [N, h, w, C], int32 [N, C].

    Singular values count if they exceed `tol` times the largest of their map; by default that is
    max(h, w) * eps of the dtype of x, as in NumPy's matrix_rank. A zero map has rank 0.
    """
    h, w = x.shape[1:3]
    wide = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    tol = max(h, w) * float(jnp.finfo(wide).eps) if tol is None else tol
    x = jnp.moveaxis(x, -1, 1).astype(jnp.float32)
    if x.size == 0:
        return jnp.zeros(x.shape[:2], jnp.int32)
    s = jnp.linalg.svd(x, compute_uv=False)  # [N, C, min(h, w)], descending
    return jnp.sum(s > tol * s[..., :1], axis=-1, dtype=jnp.int32)


def count_nonzero(tap: Tap, x: Array, tally: Tally) -> Tally:
    """The tally of the activations that are not zero."""
    x = maps(tap, x)
    return tallied(tally, x != 0, jnp.isfinite(x))


def count_positive(tap: Tap, x: Array, tally: Tally) -> Tally:
    """The tally of the activations above zero."""
    x = maps(tap, x)
    return tallied(tally, x > 0, jnp.isfinite(x))


@dataclass(frozen=True)
class _CountRanks:
    # Compares by value, so that a second call of `hrank` does not compile again.
    tol: float | None

    def __call__(self, tap: Tap, x: Array, tally: Tally) -> Tally:
        x = maps(tap, x)
        finite = jnp.isfinite(x)
        ranks = map_ranks(jnp.where(finite, x, jnp.zeros((), x.dtype)), self.tol)
        return tallied(tally, ranks, jnp.all(finite, axis=(1, 2)))


def _scores(fn, params, data, sites, count, *, planes: bool = False) -> dict[str, Array]:
    first, batches = peek(data)
    taps = chosen_taps(fn, params, first, sites, planes=planes)
    states = {tap.name: empty_tally(tap) for tap in taps}
    tallies = gather(fn, params, batches, states, add=count)
    for name, tally in tallies.items():
        refuse(name, tally.skipped == 0)
    return {name: tally.mean for name, tally in tallies.items()}
