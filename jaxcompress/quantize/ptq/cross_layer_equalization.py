"""Cross-layer equalization: channels get scales with which all ranges of the weights are alike.

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv
1906.04721, sections 4.1 and 4.2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.notices import warn
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Batches, Moments, capture
from jaxcompress.graph.scaling.bias_absorption import shiftable
from jaxcompress.graph.scaling.migration import (
    Absorption,
    Elements,
    absorbable,
    channels_of,
    ranges,
    rescale,
    slots,
    spread,
)
from jaxcompress.quantize.ptq.leaf_specs import Rules, leaf, plan, replaced


@on_any_mesh
def equalize(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    limit: float = 2.0**20,
    absorb_bias: bool = True,
) -> tuple[Any, CompressState]:
    """Equal ranges of the weights in front of and behind every channel; the same function.

    For a channel with weights of range r1 in front and r2 behind, with ReLU, pooling or nothing
    between them, t = sqrt(r2 / r1) makes both sqrt(r1 r2). Chains of layers are repeated until
    nothing moves. It is meant for one scale per tensor (`Spec(format, axis=None)`), where one large
    channel costs all others their precision. Fold BatchNorm first (`fold_batch_norm`).

    Args:
      apply_fn: pure, (params, *inputs) -> outputs.
      params: float parameters.
      data: batches, tuples of inputs; the first one's shapes are used, and all of them by
        `absorb_bias`.
      spec: how the equalized weights are stored.
      iterations: at most.
      tolerance: stop when no scale changes by more than this share.
      limit: scales stay between 1 / limit and limit.
      absorb_bias: afterwards, see `absorb_high_bias`.

    Returns:
      (params, state): the other parameters of the same function, and the state of `spec` for them.

    Raises:
      ValueError: as `spec.plan`; iterations below 1, tolerance not above 0, limit below 1.
    """
    if iterations < 1 or tolerance <= 0 or limit < 1:
        raise ValueError(
            "iterations must be at least 1, tolerance above 0 and limit at least 1, got "
            f"{iterations=}, {tolerance=}, {limit=}"
        )
    planned = plan(apply_fn, params, data, spec)
    found, refused = absorbable(apply_fn, params, *planned.batches[0])
    groups = tuple(g for g in found if _weights(g.producers) and _weights(g.consumers))
    if not groups:
        warn(f"nothing to equalize: {_reasons(refused)}")
    scales = equal_scales(params, groups, iterations=iterations, tolerance=tolerance, limit=limit)
    for group, t in zip(groups, scales, strict=True):
        params = rescale(params, group, t)
    if absorb_bias:
        params = absorb_high_bias(apply_fn, params, planned.batches, groups)
    return params, planned.recipe.init(params)


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refused.items()) or "no layer reads another"


def _weights(parts: Sequence[Elements]) -> tuple[Elements, ...]:
    return tuple(elements for elements in parts if elements.weight)


def equal_scales(
    params: Any,
    groups: Sequence[Absorption],
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    limit: float = 2.0**20,
) -> list[Array]:
    """The scales [channels] of every group that make the ranges of its weights equal.

    A channel without weights on one side that are not 0 keeps the scale 1.
    """
    ones = [jnp.ones(group.channels) for group in groups]

    @jax.jit
    def sweep(totals: list[Array], params: Any) -> tuple[list[Array], Array]:
        # Always from the given weights: rounding happens once.
        for group, t in zip(groups, totals, strict=True):
            params = rescale(params, group, t)
        found, change = [], jnp.zeros(())
        for group, total in zip(groups, totals, strict=True):
            front = ranges(params, _weights(group.producers), group.channels)
            behind = ranges(params, _weights(group.consumers), group.channels)
            alive = (front > 0) & (behind > 0)
            # t = sqrt(r2 / r1)
            t = jnp.sqrt(jnp.where(alive, behind, 1.0) / jnp.where(alive, front, 1.0))
            new = jnp.clip(total * t, 1 / limit, limit)
            params = rescale(params, group, new / total)
            change = jnp.maximum(change, jnp.max(jnp.abs(jnp.log(new / total)), initial=0.0))
            found.append(new)
        return found, change

    totals = ones
    for _ in range(iterations if groups else 0):
        totals, change = sweep(totals, params)
        if float(change) < tolerance:
            break
    return totals


@on_any_mesh
def absorb_high_bias(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Batches,
    groups: Sequence[Absorption],
) -> Any:
    """Moves what activations nearly always exceed into the next biases, so that ranges shrink.

    relu(y - c) = relu(y) - c where y >= c: with c = max(0, mean - 3 std) of a channel, over the
    data, b1 <- b1 - c and b2 <- b2 + W2^T c. Exact for inputs on which no channel falls below its
    c. Only where a bias is followed by a ReLU and then, besides views, by layers with biases of
    their own; convolutions with padding are left alone: on the border c is not added.

    Args:
      apply_fn, params, batches: as `equalize`.
      groups: of `graph.scaling.migration.absorbable`.
    """
    shifts = shiftable(apply_fn, params, batches[0], groups)
    behind = [layer for shift in shifts for layer, _ in shift.consumers]
    moments = capture(apply_fn, params, batches, layers=behind, gram=False) if behind else {}
    for group, front, consumers in shifts:
        layer, _ = consumers[0]
        c = _least(group, layer, moments[layer.tap.name])
        bias = leaf(params, front.path)
        params = replaced(params, {front.path: bias - spread(front, c, 0.0).astype(bias.dtype)})
        for layer, bias in consumers:
            # [S, G, N] sum over inputs of W2 c
            at = channels_of(group, layer)
            inputs = jnp.where(at < 0, 0.0, c[at])
            w = layer.take(leaf(params, layer.path)).astype(jnp.float32)
            more = jnp.einsum("sgkn,sgk->sgn", w, inputs, precision=lax.Precision.HIGHEST)
            old = leaf(params, bias.path)
            new = old.reshape(-1).at[bias.index].add(more.astype(old.dtype))
            params = replaced(params, {bias.path: new.reshape(old.shape)})
    return params


def _least(group: Absorption, layer: Layer, moments: Moments) -> Array:
    # c = max(0, mean - 3 std), the least over the inputs that share a channel.
    c = jnp.maximum(moments.mean - 3 * jnp.sqrt(moments.variance), 0.0).reshape(-1)
    least = jnp.full(group.channels, jnp.inf).at[slots(group, layer)].min(c, mode="drop")
    return jnp.where(jnp.isfinite(least), least, 0.0)
