"""Scales of inputs moved into the weights: SmoothQuant and AWQ."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.notices import warn
from jaxcompress.core.packed import fake_quantize
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments, capture
from jaxcompress.graph.scaling.migration import (
    Absorption,
    absorbable,
    ranges,
    rescale,
    slots,
    spread,
)
from jaxcompress.quantize.fake_quantized_weights import qparams_of
from jaxcompress.quantize.ptq.leaf_specs import Plan, Rules, Spec, leaf, plan


@on_any_mesh
def smooth_quant(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    alpha: float | Array = 0.5,
) -> tuple[Any, CompressState]:
    """Shares the ranges of inputs and weights: X / s and s W with s = max|X|^a / max|W|^(1 - a).

    The function stays the same; s goes out of what produces X, where that can be
    (`graph.scaling.migration.absorbable`): the scale of a norm, the layer before a ReLU,
    attention's values. All layers that read X count in max|W|, and all tensors that meet one weight
    in max|X|. Meant for quantized activations, of which a few channels are far larger than the
    rest.

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: float parameters.
      data: batches, tuples of inputs.
      spec: how the scaled weights are stored; other layers keep their scales.
      alpha: share of the inputs' range that the weights take over, 0 to 1; may be traced.

    Returns:
      (params, state).

    Raises:
      ValueError: as `spec.plan`; alpha outside [0, 1]; NaN or Inf in an input.

    Source: Xiao et al. 2023, arXiv 2211.10438.
    """
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    planned = plan(apply_fn, params, data, spec)
    groups, taking = _groups(apply_fn, params, planned)
    moments = _moments(apply_fn, params, planned, taking, gram=False)
    for group, layers in zip(groups, taking, strict=True):
        inputs = _largest(group, layers, moments)
        weights = ranges(params, group.consumers, group.channels)
        alive = (inputs > 0) & (weights > 0)
        x, w = jnp.where(alive, inputs, 1.0), jnp.where(alive, weights, 1.0)
        # s = max|X|^alpha / max|W|^(1 - alpha)
        params = rescale(params, group, w ** (1 - alpha) / x**alpha)
    return params, planned.recipe.init(params)


@on_any_mesh
def awq(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    grid: int = 20,
) -> tuple[Any, CompressState]:
    """Protects the weights of large inputs: X / s and s W, s = mean|X|^a / sqrt(max s min s).

    For every tensor X that can be scaled (or several that one weight meets), the a out of `grid`
    between 0 and 1 with the least sum over all uses of its weights of ||(Q(s W) / s - W)^T X||^2,
    from X X^T. a = 0 rounds to nearest, so the sum is never more than that of rounding to nearest.
    Weights that something else than contractions reads keep their scales; a warning names them. A
    `Spec` with `calibrate=quantize.mse()` clips as well.

    Args:
      apply_fn, params, data, spec: as `smooth_quant`.
      grid: number of exponents that are tried, at least 2.

    Returns:
      (params, state).

    Raises:
      ValueError: as `spec.plan`; grid below 2; NaN or Inf in an input.

    Source: Lin et al. 2024, arXiv 2306.00978.
    """
    if grid < 2:
        raise ValueError(f"grid must be at least 2, got {grid}")
    planned = plan(apply_fn, params, data, spec)
    groups, taking = _judged(*_groups(apply_fn, params, planned), planned)
    exponents = jnp.linspace(0.0, 1.0, grid)
    using = [_users(group, planned) for group in groups]
    moments = _moments(apply_fn, params, planned, using, gram=True)
    for group, layers, users in zip(groups, taking, using, strict=True):
        inputs = _mean_magnitude(group, layers, moments)
        losses = jnp.zeros(grid)
        for layer in users:
            (scaled,) = (part for part in group.consumers if part.path == layer.path)
            losses += _losses(
                leaf(params, layer.path),
                moments[layer.tap.name].gram,
                inputs,
                exponents,
                layer=_Static((layer, scaled)),
                spec=planned.spec[layer.path],
            )
        best = exponents[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
        params = rescale(params, group, 1 / activation_scales(inputs, best))
    return params, planned.recipe.init(params)


def _users(group: Absorption, planned: Plan) -> list[Layer]:
    # All uses of the weights that a group scales, those of other tensors too: they share grids.
    paths = {elements.path for elements in group.consumers}
    return [layer for layer in planned.layers if layer.path in paths]


def _paths(layers: Sequence[Layer]) -> set[str]:
    return {layer.path for layer in layers}


def _judged(
    groups: list[Absorption], taking: list[list[Layer]], planned: Plan
) -> tuple[list[Absorption], list[list[Layer]]]:
    # Those whose whole error layers show; warns of the others.
    left, kept = {}, []
    for number, layers in enumerate(taking):
        read = {
            layer.path: planned.read[layer.path] for layer in layers if layer.path in planned.read
        }
        left |= read
        kept += [] if read else [number]
    if left:
        names = ", ".join(f"{path} (also read by {what})" for path, what in left.items())
        warn(f"not scaled, since not only contractions read them: {names}")
    return [groups[k] for k in kept], [taking[k] for k in kept]


def activation_scales(inputs: Array, exponent: Array) -> Array:
    """s = x^a / sqrt(max s min s) of mean magnitudes x [channels]; 1 where x is 0."""
    alive = inputs > 0
    s = jnp.where(alive, inputs, 1.0) ** exponent
    high, low = jnp.max(s, initial=0.0, where=alive), jnp.min(s, initial=jnp.inf, where=alive)
    middle = jnp.sqrt(high) * jnp.sqrt(low)
    return jnp.where(alive & jnp.any(alive), s / middle, 1.0)


class _Static(tuple):
    """Compared by identity: a static argument."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@functools.partial(jax.jit, static_argnames=("layer", "spec"))
def _losses(
    weights: Array, gram: Array, inputs: Array, exponents: Array, *, layer: Any, spec: Spec
) -> Array:
    # tr(D^T X X^T D), D = Q(s W) / s - W, for every exponent.
    view, elements = layer
    wide = weights.astype(jnp.float32)

    def loss(exponent):
        s = spread(elements, activation_scales(inputs, exponent), 1.0)
        scaled = (wide * s).astype(weights.dtype)
        where = spec.where
        qparams = qparams_of(scaled, spec.format, where, calibrate=spec.calibrate)
        rounded = fake_quantize(scaled, qparams, format=spec.format, granularity=where)
        delta = view.take(rounded.astype(jnp.float32) / s - wide)
        high = lax.Precision.HIGHEST
        return jnp.sum(delta * jnp.einsum("sgkl,sgln->sgkn", gram, delta, precision=high))

    return lax.map(loss, exponents)


def _groups(
    apply_fn: Callable[..., Any], params: Any, planned: Plan
) -> tuple[list[Absorption], list[list[Layer]]]:
    # The tensors that layers of the plan read, and these layers; last ones first, so that the
    # outputs of a layer have their scales when those of its inputs are chosen.
    groups, taking = [], []
    found, refused = absorbable(apply_fn, params, *planned.batches[0])
    for group in found:
        paths = {elements.path for elements in group.consumers}
        layers = [
            layer
            for layer in planned.layers
            if layer.path in paths and layer.site.name in group.layers
        ]
        if layers:
            groups.append(group)
            taking.append(layers)
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        warn(f"no input of these layers can be scaled: {reasons}")
    return groups[::-1], taking[::-1]


def _moments(
    apply_fn: Callable[..., Any],
    params: Any,
    planned: Plan,
    taking: Sequence[Sequence[Layer]],
    *,
    gram: bool,
) -> Mapping[str, Moments]:
    chosen = {layer.tap.name: layer for layers in taking for layer in layers}
    if not chosen:
        return {}
    return capture(apply_fn, params, planned.batches, layers=list(chosen.values()), gram=gram)


def _largest(group: Absorption, layers: Sequence[Layer], moments: Mapping[str, Moments]) -> Array:
    # The largest input of each channel, [channels], over all layers; 0 where there is none.
    found = jnp.zeros(group.channels)
    for layer in layers:
        values = moments[layer.tap.name].largest.reshape(-1)
        found = found.at[slots(group, layer)].max(values, mode="drop")
    return found


def _mean_magnitude(
    group: Absorption, layers: Sequence[Layer], moments: Mapping[str, Moments]
) -> Array:
    # The mean magnitude of each channel, [channels], over all rows of all layers.
    total = count = jnp.zeros(group.channels)
    for layer in layers:
        at, seen = slots(group, layer), moments[layer.tap.name]
        rows = jnp.broadcast_to(seen.count[..., None], seen.magnitude.shape)
        total = total.at[at].add(seen.magnitude.reshape(-1), mode="drop")
        count = count.at[at].add(rows.reshape(-1), mode="drop")
    return total / jnp.maximum(count, 1.0)
