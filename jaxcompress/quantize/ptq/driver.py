"""Runs a solver over the layers of a network: inputs of the float or of the quantized one."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.core.notices import warn
from jaxcompress.graph.layers.layer_by_layer import Progress, matrices, solve_layers
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.layers.statistics import Moments
from jaxcompress.quantize.ptq.leaf_specs import Rules, Spec, plan

__all__ = ["Found", "Inputs", "Progress", "Solve", "drive", "matrices"]

Inputs = Literal["float", "quantized"]


class Found(NamedTuple):
    """What a solver gives for a layer: the leaf, and the format's arrays for it."""

    leaf: Array
    qparams: Any


class Solve(Protocol):
    """(layer, leaf, qparams, moments, spec) -> Found."""

    def __call__(
        self, layer: Layer, leaf: Array, qparams: Any, moments: Moments, spec: Spec, /
    ) -> Found: ...


def drive(
    solve: Solve,
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    *,
    spec: Rules,
    inputs: Inputs = "float",
    grids: Mapping[str, Any] | None = None,
    layer_at_a_time: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Solves every layer that `spec` takes, in order; params on their grids, and the state.

    Weights that several contractions use are solved once, for the inputs of all of them; where that
    cannot be (`graph.layers.uses`), they are rounded to nearest, and a warning names them.

    Args as in `gptq`.

    Raises:
      ValueError: as `spec.plan`; an unknown `inputs`.
    """
    if inputs not in ("float", "quantized"):
        raise ValueError(f"inputs must be 'float' or 'quantized', got {inputs!r}")
    planned = plan(apply_fn, params, data, spec)
    state = planned.recipe.init(params)
    if planned.apart:
        warn(f"rounded to nearest, since their uses have no inputs in common: {planned.apart}")

    def solve_layer(layer: Layer, leaf: Array, moments: Moments) -> Array:
        nonlocal state
        qparams = planned.qparams(state, layer.path)
        found = solve(layer, leaf, qparams, moments, planned.spec[layer.path])
        state = planned.with_qparams(state, {layer.path: found.qparams})
        return found.leaf

    solved = solve_layers(
        solve_layer,
        apply_fn,
        params,
        planned.batches,
        pools=planned.pools,
        prefix=inputs == "quantized",
        grids=grids,
        layer_at_a_time=layer_at_a_time,
        progress=progress,
    )
    return planned.recipe.apply(solved, state), state
