"""What Wanda and SparseGPT share: shares of zeros by path, layers, and the masks they give.

A layer is a product of rows of inputs with matrices [K, N] (`graph.layers.matrices`): K inputs, for
convolutions taps times input channels with the channels last, and N outputs. So the "rows" of the
papers' weights are columns here. n of m goes along the input channels, tap by tap, as `n_m` does.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.compressor import CompressState, at_path, holds, is_float_array
from jaxcompress.core.notices import warn
from jaxcompress.core.numerics.top_k import keep_count, top_k_mask
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sparse import kept_in_line
from jaxcompress.graph.layers.layer_by_layer import Progress, match_layers, solve_layers
from jaxcompress.graph.layers.matrices import Layer, layers
from jaxcompress.graph.layers.statistics import Batches, Moments, check_batches
from jaxcompress.graph.layers.uses import Pool, pools
from jaxcompress.prune.masking.mask_state import PruneState, apply_masks, is_dense

Inputs = Literal["dense", "pruned"]
Share = float | tuple[int, int]  # of zeros; or (n, m): n of m consecutive channels stay
Rules = Share | Mapping[str, Share]


class Targets(NamedTuple):
    """What is pruned, and with which data.

    Attributes:
      pools: the weights, in order of execution, each with all that uses them.
      shares: path of a leaf -> its `Share`; leaves that are only quantized have none.
      batches: the data, a list.
    """

    pools: list[Pool]
    shares: dict[str, Share]
    batches: Batches


def targets(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    sparsity: Rules,
    *,
    quantize: Mapping[str, Any] | None = None,
) -> Targets:
    """Matches shares of zeros (and formats) with the layers of a network.

    Warns of leaves that a rule takes and that stay dense: no contraction takes them as they are, or
    their uses have no inputs in common (`graph.layers.uses`).

    Raises:
      ValueError: no data; a rule that matches nothing, or no layer; a share out of range; NaN or
        Inf in a weight.
      TypeError: a share is none; a batch is no tuple.
    """
    given = isinstance(sparsity, Mapping)
    rules = sparsity if isinstance(sparsity, Mapping) else {".*": sparsity}
    shares = {rule: _checked_share(rule if given else "", share) for rule, share in rules.items()}
    batches = check_batches(data)
    found = layers(apply_fn, params, *batches[0])
    matched = match_layers(found, params, rules, name="sparsity")
    if given and matched.left:
        _warn(f"left dense, since no contraction takes them as they are: {matched.left}")
    taken = {layer.path: shares[matched.rules[layer.path]] for layer in matched.layers}
    also: set[str] = set()
    if quantize:
        stored = match_layers(found, params, quantize, name="quantize")
        also = {layer.path for layer in stored.layers}
        if stored.left:
            _warn(f"rounded only, since no contraction takes them as they are: {stored.left}")
    flat = dict(leaves_with_paths(params))
    full = {path for path in {*taken, *also} if is_float_array(flat[path]) and flat[path].size}
    for path in sorted(full):
        with at_path(path):
            if not holds(jnp.isfinite, flat[path]):
                raise ValueError("a weight to prune must not be NaN or Inf")
    solved, apart = pools([layer for layer in found.layers if layer.path in full], found.readers)
    if apart:
        names = ", ".join(f"{path} ({why})" for path, why in apart.items())
        left = "rounded only" if apart.keys().isdisjoint(taken) else "left dense"
        _warn(f"{left}, since their uses have no inputs in common: {names}")
    have_pools = {pool.layer.path for pool in solved}
    kept_shares = {path: share for path, share in taken.items() if path in have_pools}
    return Targets(list(solved), kept_shares, batches)


def _warn(message: str) -> None:
    warn(message)


def _checked_share(rule: str, share: Any) -> Share:
    where = f"sparsity of {rule!r}" if rule else "sparsity"
    if isinstance(share, tuple | list) and len(share) == 2:
        n, m = share
        if not all(isinstance(k, int | np.integer) for k in share) or not 0 < n <= m:
            raise ValueError(f"{where}: (n, m) needs whole numbers 0 < n <= m, got {share}")
        return int(n), int(m)
    if isinstance(share, bool) or not isinstance(share, int | float | np.number):
        raise TypeError(
            f"{where} must be a share of zeros in [0, 1], or (n, m) to keep n of m consecutive "
            f"inputs, got {share!r}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"{where} must be a share of zeros in [0, 1], got {share}")
    return float(share)


class Pruned(NamedTuple):
    """What a solver gives for a layer."""

    weights: Array  # [S, G, K, N]
    keep: Array  # bool [S, G, K, N]


class Solve(Protocol):
    """(layer, leaf, moments, share, keep) -> Pruned; `keep` bool [S, G, K, N]: may stay."""

    def __call__(
        self, layer: Layer, leaf: Array, moments: Moments, share: Share, keep: Array, /
    ) -> Pruned: ...


def prune_layers(
    solve: Solve,
    apply_fn: Callable[..., Any],
    params: Any,
    planned: Targets,
    *,
    masks: Any,
    inputs: Inputs,
    gram: bool,
    grids: Mapping[str, Any] | None,
    layer_at_a_time: bool,
    progress: Progress,
) -> tuple[Any, Any]:
    """Solves every layer in order; the params with exact zeros, and the masks.

    Args as in `sparse_gpt`; `gram`: whether the solver looks at X^T X.
    """
    if inputs not in ("dense", "pruned"):
        raise ValueError(f"inputs must be 'dense' or 'pruned', got {inputs!r}")
    kept = _opened(params, masks, planned.shares)

    def solve_layer(layer: Layer, leaf: Array, moments: Moments) -> Array:
        allowed = layer.take(jnp.broadcast_to(kept[layer.path], leaf.shape))
        share = planned.shares.get(layer.path, 0.0)
        found = solve(layer, leaf, moments, share, allowed)
        if not is_dense(leaf, kept[layer.path]):
            kept[layer.path] = layer.put(kept[layer.path], found.keep)
        return layer.put(leaf, found.weights)

    solved = solve_layers(
        solve_layer,
        apply_fn,
        params,
        planned.batches,
        pools=planned.pools,
        prefix=inputs == "pruned",
        gram=gram,
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )
    found = jax.tree.structure(params).unflatten(kept.values())
    return apply_masks(solved, found), found


def _opened(params: Any, masks: Any, shares: Mapping[str, Share]) -> dict[str, Array]:
    # The masks by path, those of what is pruned of the leaf's shape.
    if masks is None:
        masks = jax.tree.map(lambda w: jnp.ones((), bool), params)
    if jax.tree.structure(masks) != jax.tree.structure(params):
        raise ValueError("masks must have the structure of params, as prune.masks(state, params)")
    pairs = zip(leaves_with_paths(params), jax.tree.leaves(masks), strict=True)
    opened = {}
    for (path, w), mask in pairs:
        mask = jnp.asarray(mask)
        with at_path(path):
            if mask.dtype != bool or mask.shape not in ((), jnp.shape(w)):
                raise ValueError(
                    f"a mask must be bool of shape () or {jnp.shape(w)}, "
                    f"got {mask.dtype} {mask.shape}"
                )
        opened[path] = jnp.broadcast_to(mask, w.shape) if path in shares else mask
    return opened


def state_of(masks: Any) -> CompressState:
    """The state of a compressor that hides what these masks hide."""
    return CompressState(buffers=PruneState(masks, jnp.zeros((), jnp.int32)))


class Spans(NamedTuple):
    """Which inputs of an output are compared with each other, and how many of them stay.

    Attributes:
      size: inputs of a span.
      quota: int32 [spans] how many of each stay.
      places: int [spans * size], which input lies where; -1 for places that fill a span up.
    """

    size: int
    quota: Any
    places: np.ndarray


def spans_of(share: Share, inputs: int, channels: int) -> Spans:
    """The spans of an output.

    N:M goes along the input channels, as `n_m` does: the channels of every tap of a convolution are
    divided for themselves, and the last span of each may be shorter.

    Args:
      share: of zeros, or (n, m).
      inputs: of an output: taps times channels.
      channels: `Layer.channels`.

    >>> spans_of((2, 4), 6, 3).places.tolist()  # two taps of three channels
    [0, 1, 2, -1, 3, 4, 5, -1]
    """
    if not isinstance(share, tuple):
        return Spans(inputs, np.array([keep_count(inputs, share)], np.int32), np.arange(inputs))
    n, m = share
    channels = channels if channels and inputs % channels == 0 else inputs
    lines = np.arange(inputs).reshape(-1, max(channels, 1))
    lines = np.pad(lines, ((0, 0), (0, -lines.shape[1] % m)), constant_values=-1)
    sizes = (lines.reshape(-1, m) >= 0).sum(1)
    quota = np.array([kept_in_line(int(size), n, m) for size in sizes], np.int32)
    return Spans(m, quota, lines.reshape(-1))


def spread_out(x: Array, places: np.ndarray, fill: Any) -> Array:
    """x [..., K, N] with its inputs at their places, and `fill` between them."""
    filled = jnp.take(x, np.maximum(places, 0), axis=-2)
    return jnp.where((places >= 0)[:, None], filled, jnp.asarray(fill, x.dtype))


def top_of_spans(scores: Array, keep: Array, spans: Spans) -> Array:
    """The mask of the largest scores of every span of every output.

    Args:
      scores: [..., K, N].
      keep: bool, as scores: which may stay.
      spans: the spans.
    """
    *lead, _, n = scores.shape
    wide = spread_out(jnp.where(keep, scores, -jnp.inf), spans.places, -jnp.inf)
    rows = jnp.moveaxis(wide, -1, -2).reshape(-1, spans.size)  # of [..., N, spans]
    quotas = jnp.broadcast_to(spans.quota, (math.prod(lead) * n, len(spans.quota))).reshape(-1)
    mask = jnp.moveaxis(jax.vmap(top_k_mask)(rows, quotas).reshape(*lead, n, -1), -1, -2)
    return mask[..., spans.places >= 0, :] & keep
