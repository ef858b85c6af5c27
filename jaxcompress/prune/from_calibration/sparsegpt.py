"""SparseGPT: prunes input by input, and lets the inputs to come make up for each error."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.combine import by_path
from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    absent_if_empty,
    identity,
    is_float_array,
)
from jaxcompress.core.numerics.column_sweep import Choice, Exact, solve, with_damping
from jaxcompress.core.numerics.top_k import keep_count
from jaxcompress.core.paths import leaves_with_paths, match_rules
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats import Format, Granularity
from jaxcompress.graph.layers.layer_by_layer import Progress, grid_of, matrices
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.prune.from_calibration.calibrated import (
    Inputs,
    Pruned,
    Rules,
    Share,
    prune_layers,
    spans_of,
    spread_out,
    state_of,
    targets,
)
from jaxcompress.prune.masking.mask_state import apply_masks


class Stored(Protocol):
    """How a weight is stored: a `quantize.Spec`."""

    @property
    def format(self) -> Format: ...
    @property
    def where(self) -> Granularity: ...
    def weights(self) -> Compressor: ...


@on_any_mesh
def sparse_gpt(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    sparsity: Rules,
    *,
    quantize: Mapping[str, Stored] | None = None,
    block: int = 128,
    damping: float = 0.01,
    sweeps: int = 0,
    masks: Any = None,
    inputs: Inputs = "dense",
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Zeroes weights, and changes the others so that the outputs of every layer stay.

    The inputs are taken in blocks. When a block is reached, its weights of all outputs (or every m
    input channels of each) are compared by w_i^2 / [(H_FF)^-1]_ii, H = X^T X and F the inputs not
    yet done; the smallest become zero, one input after the other, and those still to come make up
    for it. A leaf of N weights keeps exactly round((1 - sparsity) N), each block its share of them;
    or n of m. Inputs that were always zero go first. An output that the changes make worse than the
    same mask alone keeps its weights.

    Args:
      apply_fn, params, data, sparsity: as in `wanda`.
      quantize: {regex on the path: `quantize.Spec`}: what is kept is rounded on the way, to grids
        that the weights as they are place. Its layers need no rule of `sparsity`: it is GPTQ then.
      block: inputs that are compared with each other; with (n, m) a multiple of m is taken.
      damping: share of the mean of diag(H) that is added to it; ten times as much, with a warning,
        where the factorization fails.
      sweeps: passes of coordinate descent afterwards with the masks fixed, none of which makes the
        error larger: the limit is least squares on the mask.
      masks: as in `wanda`: what they hide stays hidden, in the masks that come back too.
      inputs, grids, layer_at_a_time, progress: as in `wanda`; one X^T X at a time.

    Returns:
      (params, state): exact zeros, and the masks, for the `apply` and `pack` of pruning; with
      `quantize` on their grids, for `chain(quantize.recipe(...), <pruning>)`.

    Raises:
      ValueError, TypeError: as `wanda`; `block` below 1; X^T X that is not positive definite at any
        damping; a rule of `quantize` that matches nothing, or what it says is no `Spec`.

    Source: Frantar and Alistarh 2023, SparseGPT, arXiv 2301.00774.

    >>> import jax
    >>> w, x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    >>> pruned, state = sparse_gpt(lambda p, x: x @ p, w, [(x,)], 0.5)
    >>> int(jnp.sum(pruned == 0))
    32
    >>> masked = jnp.where(state.buffers.masks, w, 0)
    >>> bool(jnp.sum((x @ (pruned - w)) ** 2) < jnp.sum((x @ (masked - w)) ** 2))
    True
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    recipe = _recipe(quantize)
    planned = targets(apply_fn, params, data, sparsity, quantize=quantize)
    stored = _stored(params, quantize)

    def solve_layer(
        layer: Layer, leaf: Array, moments: Moments, share: Share, keep: Array
    ) -> Pruned:
        w = matrices(layer, leaf)
        format, grid = Exact(), ()
        if layer.path in stored:
            spec, qparams = stored[layer.path]
            format, grid = grid_of(layer, spec.format, qparams, where=spec.where, shape=leaf.shape)
        places, choice = _choice(share, w.shape, block, layer.channels)
        filled = lambda x: spread_out(x, places, 0)
        square = filled(jnp.swapaxes(filled(moments.hessian), -1, -2))
        args = filled(w), square, filled(keep), jax.tree.map(filled, grid)
        how = {"format": format, "sweeps": sweeps, **choice}
        run = lambda damp: solve(*args, damp, jnp.arange(len(places)), **how)
        found = with_damping(run, damping, name=layer.tap.name)
        there = places >= 0
        return Pruned(found.weights[:, :, there], found.keep[:, :, there])

    pruned, found = prune_layers(
        solve_layer,
        apply_fn,
        params,
        planned,
        masks=masks,
        inputs=inputs,
        gram=True,
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )
    state = state_of(found)
    if quantize is None:
        return pruned, state
    scales = recipe.init(params)
    rounded = apply_masks(recipe.apply(pruned, scales), found)
    makers = absent_if_empty((scales.maker, state.maker))
    return rounded, CompressState((), (scales.buffers, state.buffers), makers)


def _recipe(quantize: Mapping[str, Stored] | None) -> Compressor:
    for rule, entry in (quantize or {}).items():
        if not all(hasattr(entry, name) for name in ("format", "where", "weights")):
            raise TypeError(
                f"quantize: {rule!r} must be a quantize.Spec, got {type(entry).__name__}"
            )
    weights = {rule: entry.weights() for rule, entry in (quantize or {}).items()}
    return by_path(weights, default=identity())


class _Scaled(NamedTuple):
    spec: Stored
    qparams: Any  # of the leaf as it was given


def _stored(params: Any, quantize: Mapping[str, Stored] | None) -> dict[str, _Scaled]:
    flat = [(path, w) for path, w in leaves_with_paths(params) if is_float_array(w)]
    rules = match_rules(quantize, [path for path, _ in flat]) if quantize else {}
    specs = {path: quantize[rule] for path, rule in rules.items() if quantize and rule}
    return {
        path: _Scaled(specs[path], specs[path].weights().init(w).buffers)
        for path, w in flat
        if path in specs
    }


def _choice(
    share: Share, shape: tuple[int, ...], block: int, channels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    # Where the inputs lie; the sweep's block, what is compared, and how many stay [S, G, spans].
    *lead, size, n = shape
    if isinstance(share, tuple):
        span, quota, places = spans_of(share, size, channels)
        width = span * min(max(1, block // span), len(quota))
        quotas = jnp.broadcast_to(jnp.asarray(quota), (*lead, len(quota)))
        chosen = {"block": width, "choice": Choice(span, together=False), "quota": quotas}
        return places, chosen
    places, width = np.arange(size), min(block, size)
    if share == 0:
        return places, {"block": width}
    # Differences of rounded totals: every block has its share, and the leaf has it exactly.
    ends = np.minimum(np.arange(1, -(-size // width) + 1) * width, size) * n
    totals = (np.arange(math.prod(lead))[:, None] * size * n + ends).reshape(-1)
    kept = np.array([keep_count(int(total), share) for total in (0, *totals)])
    quotas = jnp.asarray(np.diff(kept).reshape(*lead, -1), jnp.int32)
    return places, {"block": width, "choice": Choice(width, together=True), "quota": quotas}
