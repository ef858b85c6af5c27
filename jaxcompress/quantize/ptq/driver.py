"""Runs a solver over the layers of a network: inputs of the float or of the quantized one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import CompressState
from jaxcompress.graph.capture import Moments, capture, stream
from jaxcompress.graph.matrices import Layer
from jaxcompress.quantize.ptq.spec import Plan, Rules, Spec, leaf, plan, replaced

Inputs = Literal["float", "quantized"]
Progress = Callable[[Iterable], Iterable]


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

    Args as in `gptq`.

    Raises:
      ValueError: as `spec.plan`; an unknown `inputs`.
    """
    if inputs not in ("float", "quantized"):
        raise ValueError(f"inputs must be 'float' or 'quantized', got {inputs!r}")
    planned = plan(apply_fn, params, data, spec)
    state = planned.recipe.init(params)
    current = params
    if inputs == "float":
        seen = _of_float(apply_fn, params, planned, grids=grids, one=layer_at_a_time)
    else:
        seen = ((layer, None) for layer in planned.layers)
    for layer, moments in progress(_Sized(seen, len(planned.layers))):
        if moments is None:
            now = capture(apply_fn, current, planned.batches, layers=[layer], grids=grids)
            moments = now[layer.tap.name]
        qparams = planned.qparams(state, layer.path)
        found = solve(layer, leaf(current, layer.path), qparams, moments, planned.spec[layer.path])
        state = planned.with_qparams(state, {layer.path: found.qparams})
        current = replaced(current, {layer.path: found.leaf})
    return planned.recipe.apply(current, state), state


class _Sized:
    """An iterator with a length, for progress bars."""

    def __init__(self, items: Iterator, length: int):
        self.items, self.length = items, length

    def __iter__(self) -> Iterator:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length


def _of_float(
    apply_fn: Callable[..., Any], params: Any, planned: Plan, *, grids: Any, one: bool
) -> Iterator[tuple[Layer, Moments]]:
    if one:
        yield from stream(apply_fn, params, planned.batches, layers=planned.layers, grids=grids)
        return
    found = capture(apply_fn, params, planned.batches, layers=planned.layers, grids=grids)
    for layer in planned.layers:
        yield layer, found.pop(layer.tap.name)


def matrices(layer: Layer, leaf: Array) -> Array:
    """The weights of a layer, float32 [S, G, K, N]."""
    return layer.take(leaf).astype(jnp.float32)
