"""Scales of inputs moved into the weights: SmoothQuant and AWQ."""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.packed import fake_quantize
from jaxcompress.graph.absorb import Absorption, absorbable, channels_of, ranges, rescale, slots
from jaxcompress.graph.capture import Moments, capture
from jaxcompress.graph.matrices import Layer
from jaxcompress.quantize.ptq.spec import Plan, Rules, Spec, leaf, plan
from jaxcompress.quantize.weights import qparams_of


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
    (`graph.absorb.absorbable`): the scale of a norm, the layer before a ReLU, attention's values.
    All layers that read X count in max|W|. Meant for quantized activations, of which a few channels
    are far larger than the rest.

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
        inputs = _per_channel(group, layers[0], moments[layers[0].tap.name].largest)
        weights = ranges(params, group.consumers, group.channels)
        alive = (inputs > 0) & (weights > 0)
        x, w = jnp.where(alive, inputs, 1.0), jnp.where(alive, weights, 1.0)
        # s = max|X|^alpha / max|W|^(1 - alpha)
        params = rescale(params, group, w ** (1 - alpha) / x**alpha)
    return params, planned.recipe.init(params)


def awq(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    grid: int = 20,
) -> tuple[Any, CompressState]:
    """Protects the weights of large inputs: X / s and s W, s = mean|X|^a / sqrt(max s min s).

    For every tensor X that can be scaled, the a out of `grid` between 0 and 1 with the least
    sum over its layers of ||(Q(s W) / s - W)^T X||^2, from X X^T. a = 0 rounds to nearest, so the
    sum is never more than that of rounding to nearest. A `Spec` with `calibrate=quantize.mse()`
    clips as well.

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
    groups, taking = _groups(apply_fn, params, planned)
    exponents = jnp.linspace(0.0, 1.0, grid)
    moments = _moments(apply_fn, params, planned, taking, gram=True)
    for group, layers in zip(groups, taking, strict=True):
        first = moments[layers[0].tap.name]
        inputs = _mean_per_channel(group, layers[0], first)
        losses = jnp.zeros(grid)
        for layer in layers:
            losses += _losses(
                leaf(params, layer.path),
                _by_rows(moments[layer.tap.name]),
                inputs,
                exponents,
                layer=_Static((layer, channels_of(group, layer))),
                spec=planned.spec[layer.path],
            )
        best = exponents[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
        params = rescale(params, group, 1 / activation_scales(inputs, best))
    return params, planned.recipe.init(params)


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
    weights: Array, hessian: Array, inputs: Array, exponents: Array, *, layer: Any, spec: Spec
) -> Array:
    # tr(D^T H D), D = Q(s W) / s - W, for every exponent.
    view, channel = layer
    w = view.take(weights).astype(jnp.float32)

    def loss(exponent):
        s = activation_scales(inputs, exponent)
        s = jnp.where(channel < 0, 1.0, s[channel])[..., None]  # [S, G, K, 1]
        scaled = view.put(weights, w * s)
        where = spec.where
        qparams = qparams_of(scaled, spec.format, where, calibrate=spec.calibrate)
        rounded = fake_quantize(scaled, qparams, format=spec.format, granularity=where)
        delta = view.take(rounded).astype(jnp.float32) / s - w
        high = lax.Precision.HIGHEST
        return jnp.sum(delta * jnp.einsum("sgkl,sgln->sgkn", hessian, delta, precision=high))

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
        warnings.warn(f"no input of these layers can be scaled: {reasons}", stacklevel=3)
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


def _per_channel(group: Absorption, layer: Layer, values: Array) -> Array:
    # The largest of the values [S, G, K] of each channel; 0 where there is none.
    at = slots(group, layer)
    return jnp.zeros(group.channels).at[at].max(values.reshape(-1), mode="drop")


def _mean_per_channel(group: Absorption, layer: Layer, moments: Moments) -> Array:
    at = slots(group, layer)
    zeros = jnp.zeros(group.channels)
    rows = jnp.broadcast_to(moments.count[..., None], moments.magnitude.shape)
    total = zeros.at[at].add(moments.magnitude.reshape(-1), mode="drop")
    return total / jnp.maximum(zeros.at[at].add(rows.reshape(-1), mode="drop"), 1.0)


def _by_rows(moments: Moments) -> Array:
    # X X^T over the mean number of rows of a matrix: one that more rows reach counts more.
    return moments.gram / jnp.maximum(jnp.mean(moments.count), 1.0)
