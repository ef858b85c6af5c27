"""Bias correction: quantized layers give the mean output that the float ones gave.

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv
1906.04721, section 4.2; here with the means of data instead of those of BatchNorm.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.graph.biases import Bias, biases
from jaxcompress.graph.capture import Moments, capture
from jaxcompress.quantize.ptq.driver import Inputs, matrices
from jaxcompress.quantize.ptq.spec import Rules, leaf, plan, replaced


def correct_bias(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    quantized: tuple[Any, CompressState] | None = None,
    inputs: Inputs = "float",
    grids: Mapping[str, Any] | None = None,
) -> tuple[Any, CompressState]:
    """Biases moved by the mean change of the outputs: b <- b - (E[Q(w)^T x'] - E[w^T x]).

    Layers without a bias, or with one that a rule of `spec` quantizes, are left alone; a warning
    names them.

    Args:
      apply_fn, params, data, spec: as `gptq`; `params` are the float parameters.
      quantized: (params, state) of another method; None: rounded to nearest.
      inputs: "float": x' = x, only the weights' errors are corrected, exactly. "quantized": layer
        by layer, x' being the inputs in the quantized network, its earlier biases corrected.
      grids: {tap: Grid}; with "quantized", activations are put on them.

    Returns:
      (params, state): as in `quantized`, with other biases.

    Raises:
      ValueError: as `spec.plan`; no layer has a bias.
    """
    if inputs not in ("float", "quantized"):
        raise ValueError(f"inputs must be 'float' or 'quantized', got {inputs!r}")
    planned = plan(apply_fn, params, data, spec)
    batches, recipe = planned.batches, planned.recipe
    current, state = quantized or (params, recipe.init(params))
    found = biases(apply_fn, params, *batches[0], layers=planned.layers)
    found = {name: bias for name, bias in found.items() if bias.path not in planned.rules}
    chosen = [layer for layer in planned.layers if layer.tap.name in found]
    if not chosen:
        raise ValueError("spec: none of its layers has a bias that could be corrected")
    if left := [layer.path for layer in planned.layers if layer.tap.name not in found]:
        warnings.warn(f"no bias to correct: {', '.join(left)}", stacklevel=2)
    float_means = capture(apply_fn, params, batches, layers=chosen, gram=False)
    view = recipe.apply(current, state)
    for layer in chosen:
        name = layer.tap.name
        before = float_means[name]
        after = before
        if inputs == "quantized":
            how = {"layers": [layer], "gram": False, "grids": grids}
            after = capture(apply_fn, view, batches, **how)[name]
        wanted = _mean_output(matrices(layer, leaf(params, layer.path)), before)
        shift = _mean_output(matrices(layer, leaf(view, layer.path)), after) - wanted
        bias = found[name]
        moved = _moved(leaf(current, bias.path), bias, shift, before.count)
        current, view = (replaced(tree, {bias.path: moved}) for tree in (current, view))
    return current, state


def _mean_output(w: Array, moments: Moments) -> Array:
    # [S, G, N]
    return jnp.einsum("sgkn,sgk->sgn", w, moments.mean, precision=lax.Precision.HIGHEST)


def _moved(leaf: Array, bias: Bias, shift: Array, rows: Array) -> Array:
    # Outputs that share an element share the mean of their shifts, over the rows [S, G] of each.
    flat, rows = leaf.reshape(-1).astype(jnp.float32), rows[..., None]
    total = jnp.zeros_like(flat).at[bias.index].add(shift * rows)
    count = jnp.zeros_like(flat).at[bias.index].add(jnp.broadcast_to(rows, shift.shape))
    moved = flat - total / jnp.maximum(count, 1)
    return moved.astype(leaf.dtype).reshape(leaf.shape)
