"""Bias correction: quantized layers give the mean output that the float ones gave.

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv
1906.04721, section 4.2; here with the means of data instead of those of BatchNorm.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.notices import warn
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.graph.layers.biases import Bias, biases_and_readers
from jaxcompress.graph.layers.matrices import Layer, layers_of
from jaxcompress.graph.layers.statistics import Moments, capture
from jaxcompress.graph.tracing import Program, trace_program
from jaxcompress.quantize.ptq.driver import Inputs, matrices
from jaxcompress.quantize.ptq.leaf_specs import Plan, Rules, leaf, plan, replaced


@on_any_mesh
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

    A bias that several layers add, or several outputs of one, moves by the mean over all rows of
    all of them: layers whose weights stay count as no change. Layers without a bias, or with one
    that a rule of `spec` quantizes or that something else reads too, are left alone; a warning
    names them.

    Args:
      apply_fn, params, data, spec: as `gptq`; `params` are the float parameters.
      quantized: (params, state) of another method; None: rounded to nearest.
      inputs: "float": x' = x, only the weights' errors are corrected, exactly. "quantized": layer
        by layer, x' being the inputs in the quantized network, its earlier biases corrected; a
        shared bias is corrected for its first layer, with what the later ones get by then.
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
    shared = _shared(trace_program(apply_fn, params, *batches[0]), planned)
    every = [layer for added in shared for layer, _ in added]
    float_means = capture(apply_fn, params, batches, layers=every, gram=False)
    view = recipe.apply(current, state)
    for added in shared:
        seen, path = float_means, added[0][1].path
        if inputs == "quantized":
            uses = [layer for layer, _ in added]
            seen = capture(apply_fn, view, batches, layers=uses, gram=False, grids=grids)
        shifts = []
        for layer, bias in added:
            before, after = float_means[layer.tap.name], seen[layer.tap.name]
            wanted = _mean_output(matrices(layer, leaf(params, layer.path)), before)
            shift = _mean_output(matrices(layer, leaf(view, layer.path)), after) - wanted
            shifts.append((bias.index, shift, before.count))
        moved = _moved(leaf(current, path), shifts)
        current, view = (replaced(tree, {path: moved}) for tree in (current, view))
    return current, state


_Added = list[tuple[Layer, Bias]]  # all layers that add one leaf, in order of execution


def _shared(program: Program, planned: Plan) -> list[_Added]:
    # The biases to correct, each with all layers that add it; warns of what is left alone.
    known = layers_of(program).layers
    found, others = biases_and_readers(program, layers=known)
    read = {reader.path: reader.what for reader in others}
    quantized = {layer.tap.name for layer in planned.layers}
    added: dict[str, _Added] = {}
    for layer in known:
        bias = found.get(layer.tap.name)
        if bias and bias.path not in planned.rules and bias.path not in read:
            added.setdefault(bias.path, []).append((layer, bias))
    chosen = [
        uses for uses in added.values() if any(layer.tap.name in quantized for layer, _ in uses)
    ]
    if not chosen:
        raise ValueError("spec: none of its layers has a bias that could be corrected")
    done = {layer.tap.name for uses in chosen for layer, _ in uses}
    left = {}
    for layer in planned.layers:
        if layer.tap.name not in done:
            bias = found.get(layer.tap.name)
            also = read.get(bias.path) if bias else None
            left[layer.path] = f" ({bias.path} is also read by {also})" if bias and also else ""
    if left:
        names = ", ".join(path + why for path, why in left.items())
        warn(f"no bias to correct: {names}")
    return chosen


def _mean_output(w: Array, moments: Moments) -> Array:
    # [S, G, N]
    return jnp.einsum("sgkn,sgk->sgn", w, moments.mean, precision=lax.Precision.HIGHEST)


def _moved(leaf: Array, shifts: Sequence[tuple[np.ndarray, Array, Array]]) -> Array:
    # An element moves by the mean shift over all rows and outputs that share it.
    flat = leaf.reshape(-1).astype(jnp.float32)
    total, count = jnp.zeros_like(flat), jnp.zeros_like(flat)
    for index, shift, rows in shifts:
        rows = rows.reshape(*rows.shape, *(1,) * (shift.ndim - rows.ndim))
        total = total.at[index].add(rows * shift)
        count = count.at[index].add(jnp.broadcast_to(rows, shift.shape))
    moved = flat - total / jnp.maximum(count, 1)
    return moved.astype(leaf.dtype).reshape(leaf.shape)
