"""Entropy of activations: channels that say the same thing for every image go first.

A channel's feature map is averaged over its positions, the averages over many images are counted
into B bins, and H = -sum_k p_k log p_k in nats is the score: 0 for a channel that is constant, at
most log B. Higher stays. Scores are comparable inside a layer, not between layers: prune a share of
every layer, and with fine-tuning after each score the next one with the pruned network (`sites`).
Nothing here says what the next layer does with a channel: compare with a Taylor criterion. Which
channels are meant, and what is pruned with them: see `taps`. For the entropy of being on or off see
`activity.on_off_entropy`.

What the range of the bins is matters more than their number:

- "layer", the default: one range for all channels of a layer. A channel that hardly moves compared
  with its neighbours fills one bin: H = 0 (noise across the edge of two bins: at most log 2).
- "channel": a range for each. A trap: H does not change under x -> a x + b, so a dead channel with
  noise of 1e-4 scores as high as a useful one. For layers whose channels differ in scale by design.

Readings of "entropy pruning" that this is not:

- "the entropy of a weight": one number has no entropy. With p_i = |w_i| / sum |w| the term
  -p_i log p_i rises with |w_i| while p_i < 1/e, and no more than two weights of a tensor can have
  more: this is magnitude pruning, so use `magnitude`.
- "the entropy of the histogram of a neuron's weights": the shape of their distribution. It does not
  depend on their scale, so a neuron and a millionth of it score alike, and it knows no activity.

Source: Luo and Wu 2017, An entropy-based pruning method for CNN compression, arXiv 1706.05791.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.special import entr

from jaxcompress.core.compressor import at_path, holds
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.prune.channels.input_channels import (
    Batch,
    channels,
    chosen_taps,
    gather,
    maps,
    peek,
    pooled,
    refuse,
)

_SMALL = 2.0**-10


class Span(NamedTuple):
    """Ranges of channels so far."""

    low: Array  # float32 [..., c]; inf before the first sample
    high: Array  # float32 [..., c]; -inf before the first sample
    finite: Array  # bool [..., c]


class ChannelHistogram(NamedTuple):
    """Counts of the samples of every channel in equal bins between `low` and `high`."""

    counts: Array  # int32 [..., c, bins]
    skipped: Array  # int32 [..., c] samples that were NaN or Inf
    low: Array  # float32 [..., c]
    high: Array  # float32 [..., c]


def empty_span(shape: tuple[int, ...]) -> Span:
    """The range of nothing, for channels of `shape`."""
    top = jnp.full(shape, jnp.inf, jnp.float32)
    return Span(top, -top, jnp.ones(shape, bool))


def widen(span: Span, x: Array) -> Span:
    """The range with the samples x, [n, *space, c], averaged over space."""
    z = pooled(x)
    new = Span(
        jnp.min(z, axis=0, initial=jnp.inf),
        jnp.max(z, axis=0, initial=-jnp.inf),
        jnp.all(jnp.isfinite(z), axis=0),  # on its own: extremes may drop NaN on CPU
    )
    return join(span, new)


def join(a: Span, b: Span) -> Span:
    """The range of the samples of both."""
    low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
    return Span(low, high, a.finite & b.finite)


def limits(span: Span, range: str = "layer") -> tuple[Array, Array]:
    """Low and high ends of the bins, [..., c] each: one range per "layer" or per "channel".

    NaN where nothing was seen, or something that was not finite.

    Raises:
      ValueError: a range of another name.
    """
    _check_range(range)
    low, high, finite = span
    if range == "layer":
        low = jnp.broadcast_to(jnp.min(low, -1, keepdims=True, initial=jnp.inf), low.shape)
        high = jnp.broadcast_to(jnp.max(high, -1, keepdims=True, initial=-jnp.inf), high.shape)
        finite = jnp.broadcast_to(jnp.all(finite, -1, keepdims=True), finite.shape)
    known = finite & (low <= high)
    return jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan)


def init(low: Array, high: Array, *, bins: int = 30) -> ChannelHistogram:
    """An empty histogram between `low` and `high`, [..., c] each; numbers beyond go to its ends.

    Raises:
      ValueError: fewer than two bins, low above high.

    >>> state = add(init(jnp.zeros(2), jnp.ones(2), bins=4), jnp.array([[0.1, 0.5], [0.9, 0.5]]))
    >>> print(state.counts)
    [[1 0 0 1]
     [0 0 2 0]]
    >>> print(entropy(state))
    [0.6931472 0.       ]
    """
    _check_bins(bins)
    low, high = (jnp.asarray(end).astype(jnp.float32) for end in (low, high))
    if not holds(lambda above: ~above, low > high):
        raise ValueError("range: low must not lie above high")
    counts = jnp.zeros((*low.shape, bins), jnp.int32)
    return ChannelHistogram(counts, jnp.zeros(low.shape, jnp.int32), low, high)


def add(state: ChannelHistogram, x: Array) -> ChannelHistogram:
    """Counts the samples x, [n, *space, c], averaged over space. Works under jit and vmap."""
    z, (counts, skipped, low, high) = pooled(x), state
    bins = counts.shape[-1]
    # Scaled down, so that the width of any finite range and its inverse are normal numbers. A range
    # without width is one bin.
    z_, low_, high_ = (x * _SMALL for x in (z, low, high))
    ratio = bins / (high_ - low_)
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 0.0)
    # k = floor((z - low) / (high - low) * B); the last bin includes its upper end
    k = jnp.clip(jnp.floor((z_ - low_[None]) * ratio[None]), 0.0, bins - 1.0)
    fine = jnp.isfinite(z) & (jnp.isfinite(low) & jnp.isfinite(high))[None]
    k = jnp.where(fine, k, -1.0).astype(jnp.int32)
    # Bin by bin: no scatter, no array of samples times bins, and shards of samples only add counts.
    of_bin = lambda b: jnp.sum(k == b, axis=0, dtype=jnp.int32)
    new = lax.map(of_bin, jnp.arange(bins, dtype=jnp.int32)).T  # [c, bins]
    return state._replace(
        counts=counts + new, skipped=skipped + jnp.sum(~fine, axis=0, dtype=jnp.int32)
    )


def merge(a: ChannelHistogram, b: ChannelHistogram) -> ChannelHistogram:
    """The histogram of the samples of both, exactly.

    Raises:
      ValueError: they have other ranges or bins. Where they are traced, the ranges become NaN.
    """
    if a.counts.shape != b.counts.shape:
        raise ValueError(f"merge: counts have the shapes {a.counts.shape} and {b.counts.shape}")
    differ = (a.low < b.low) | (a.low > b.low) | (a.high < b.high) | (a.high > b.high)
    if not holds(lambda x: ~x, differ):
        raise ValueError("merge: the histograms have different ranges; count both over one range")
    low = jnp.where((a.low == b.low) & (a.high == b.high), a.low, jnp.nan)
    return ChannelHistogram(a.counts + b.counts, a.skipped + b.skipped, low, a.high)


def across(state: ChannelHistogram, axis_name: Any) -> ChannelHistogram:
    """The histogram of the samples of all shards of a mapped axis, which share one range."""
    counts, skipped = lax.psum((state.counts, state.skipped), axis_name)
    return state._replace(counts=counts, skipped=skipped)


def entropy(state: ChannelHistogram) -> Array:
    """Entropy of every channel in nats, float32 [..., c], in [0, log bins].

    NaN where nothing was seen, or something that was not finite.
    """
    seen = jnp.sum(state.counts, axis=-1)
    p = state.counts.astype(jnp.float32) / jnp.maximum(seen, 1).astype(jnp.float32)[..., None]
    # H = -sum_k p_k log p_k
    h = jnp.abs(jnp.sum(entr(p), axis=-1))  # -0 of a constant channel
    known = (seen > 0) & (state.skipped == 0) & jnp.isfinite(state.low)
    return jnp.where(known, h, jnp.nan)


@on_any_mesh
def activation_entropy(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[Batch],
    *,
    bins: int = 30,
    range: str | Mapping[str, tuple[Any, Any]] = "layer",
    sites: str | None = None,
) -> dict[str, Array]:
    """The entropy of every input channel of the contractions, over the samples of `data`.

    Two passes, one for the range and one for the counts; one if ranges are given. A sample is the
    average of a channel over the positions of a convolution's input, or a row of a product's.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: its parameters.
      data: tuples of inputs; a few thousand images, as the estimate is biased below log(samples).
      bins: number of bins B.
      range: "layer" or "channel", see the module; or {tap name: (low, high)}, numbers or arrays of
        [channels].
      sites: regex on the names of the sites; None: all contractions with a weight.

    Returns:
      {tap name: float32 [*loops, channels]} in nats; NaN in a branch that was never taken.

    Raises:
      ValueError: no batch, no such site, a site without a range, NaN or Inf in an activation.

    >>> import jax
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": jnp.array([[1.0, 1e-4, -1.0]]), "down": jnp.ones((3, 1))}
    >>> x = jnp.arange(4.0)[:, None]
    >>> print(activation_entropy(fn, params, [(x,)], bins=4, sites="down")["down"])
    [1.3862944 0.        0.       ]
    """
    _check_bins(bins)
    if not isinstance(range, Mapping):
        _check_range(range)
    first, batches = peek(data)
    taps = chosen_taps(apply_fn, params, first, sites)
    shapes = {tap.name: (*tap.site.loops, channels(tap)) for tap in taps}
    if isinstance(range, Mapping):
        ends = {name: _given(range, name, shape) for name, shape in shapes.items()}
    else:
        batches = list(batches)
        spans = {name: empty_span(shape) for name, shape in shapes.items()}
        spans = gather(apply_fn, params, batches, spans, add=_widen)
        for name, span in spans.items():
            refuse(name, span.finite)
        ends = {name: limits(span, range) for name, span in spans.items()}
    states = {name: init(*pair, bins=bins) for name, pair in ends.items()}
    states = gather(apply_fn, params, batches, states, add=_add)
    for name, state in states.items():
        refuse(name, state.skipped == 0)
    return {name: entropy(state) for name, state in states.items()}


# Functions of the module, so that a second call does not compile again.
_widen = lambda tap, x, span: widen(span, maps(tap, x))
_add = lambda tap, x, state: add(state, maps(tap, x))


def _given(ranges: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    if name not in ranges:
        raise ValueError(f"range: there is none for {name!r}; give (low, high) or choose sites")
    with at_path(f"range: {name!r}"):
        ends = (np.asarray(end, np.float32) for end in ranges[name])
        low, high = (np.broadcast_to(end, shape) for end in ends)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise ValueError("needs finite low <= high")
    return jnp.asarray(low), jnp.asarray(high)


def _check_range(range: str) -> None:
    if range not in ("layer", "channel"):
        raise ValueError(f'range must be "layer", "channel" or ranges by site, got {range!r}')


def _check_bins(bins: int) -> None:
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
