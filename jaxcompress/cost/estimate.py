"""Cost of a packed network on a device: MACs, bytes, latency and energy, layer by layer."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress.core.packed import packed_bytes, unpack
from jaxcompress.cost import count
from jaxcompress.cost.count import ActivationTypes, Stored
from jaxcompress.cost.device import Device, Rate
from jaxcompress.cost.device import device as device_of
from jaxcompress.cost.energy import active_energy
from jaxcompress.cost.latency import Timing, timing
from jaxcompress.cost.result import OTHER, Cost, LayerCost
from jaxcompress.graph import Graph, trace


def estimate(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    device: "str | os.PathLike[str] | Device",
    activations: Any = None,
) -> Cost:
    """Cost of `apply_fn(params, *inputs)`, for the inputs as they are (a batch costs as a batch).

    Nothing is computed and no weight is allocated: the function is traced on the shapes that
    `unpack(params)` gives. Stored bits and zeros are looked up by the path of the parameter that
    feeds a contraction.

    Args:
      apply_fn: pure function of the unpacked parameters and the inputs.
      params: arrays, `QTensor`s, `Masked`s (what `Compressor.pack` gives), or their shapes.
      *inputs: arrays or `jax.ShapeDtypeStruct`s.
      device: a name of `cost.devices()`, the path of a TOML file, or a `Device`.
      activations: None (the traced dtypes), a number of bits, a format, or a mapping from names
        of sites or taps (`graph.trace`) to bits or formats.

    Raises:
      ValueError: an unknown device or name in `activations`; types that the device cannot run.

    >>> import jax, jax.numpy as jnp
    >>> w = jax.ShapeDtypeStruct((64, 10), jnp.int8)
    >>> x = jax.ShapeDtypeStruct((1, 64), jnp.int8)
    >>> cost = estimate(lambda p, x: x @ p["w"], {"w": w}, x, device="stm32l4r5")
    >>> cost.macs, cost.weight_bytes, cost.activation_bytes
    (640, 640, 74)
    """
    spec, stored = device_of(device), count.stored(params)
    graph = trace(apply_fn, jax.eval_shape(unpack, params), *inputs)
    types = count.ActivationTypes(graph, activations)
    layers, timings = _layers(graph, stored, types, spec)
    rest = packed_bytes(params) - sum(layer.weight_bytes for layer in layers)
    if rest:
        layers.append(LayerCost(OTHER, rest))
    return Cost(
        macs=sum(layer.macs for layer in layers),
        flops=sum(layer.flops for layer in layers),
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        activation_bytes=sum(layer.activation_bytes for layer in layers),
        peak_bytes=max((layer.peak_bytes for layer in layers), default=0),
        latency_s=sum(layer.latency_s for layer in layers),
        energy_j=sum(layer.energy_j for layer in layers),
        layers=tuple(layers),
        device=spec,
        notes=_notes(graph, inputs, spec, timings),
    )


def _layers(
    graph: Graph, stored: dict[str, Stored], types: ActivationTypes, device: Device
) -> tuple[list[LayerCost], list[Timing]]:
    patterns = {rate.pattern for rate in device.throughput} - {"dense"}
    layers, timings, counted = [], [], set()
    for site in graph.sites:
        load = count.load(site, types, stored.__getitem__, patterns=patterns)
        time = timing(device, load)
        leaves = [stored[path] for path in site.params]
        timings.append(time)
        layers.append(
            LayerCost(
                name=load.name,
                op=load.op,
                macs=load.macs,
                flops=2 * load.macs,
                macs_effective=time.macs_effective,
                weight_dtype=load.weight_dtype,
                activation_dtype=load.activation_dtype,
                pattern=load.pattern,
                density=load.density,
                weight_bits=8 * sum(x.bytes for x in leaves) / max(sum(x.size for x in leaves), 1),
                weight_bytes=sum(x.bytes for x in leaves if x.path not in counted),
                weight_read_bytes=round(time.read_bytes),
                activation_bytes=load.activation_bytes,
                peak_bytes=count.activation_bytes(site, types),
                compute_s=time.compute_s,
                memory_s=time.memory_s,
                overhead_s=time.overhead_s,
                latency_s=time.latency_s,
                energy_j=active_energy(device, time.latency_s),
                bound=time.bound,
                fallback=time.fallback,
            )
        )
        counted.update(site.params)
    return layers, timings


def _kernel(rate: Rate) -> str:
    pattern = "" if rate.pattern == "dense" else f"{rate.pattern} "
    return f"{pattern}{rate.op} {rate.weight} x {rate.activation}"


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _notes(graph: Graph, inputs: Any, device: Device, timings: list[Timing]) -> tuple[str, ...]:
    shapes = [str(tuple(getattr(leaf, "shape", ()))) for leaf in jax.tree.leaves(inputs)]
    notes = [f"for inputs of shape {', '.join(shapes) or '()'} as given, not per example"]
    if device.rates == "peak":
        notes.append("rates are peaks: kernels reach less, so compute times are lower bounds")
        notes.append("only contractions take time; operands and outputs go to memory (no fusion)")
    used = {time.rate.key: time.rate for time in timings}.values()
    if used:
        notes.append("rates used: " + ", ".join(f"{_kernel(r)} ({r.rate.grade})" for r in used))
    notes.append(
        f"energy is active power ({device.active_power.value:g} W, {device.active_power.grade}) "
        "times latency"
    )
    notes.append("peak bytes are a lower bound: operands and output of one contraction at a time")
    uses = [path for site in graph.sites for path in site.params]
    shared = sorted(path for path, n in Counter(uses).items() if n > 1)
    if shared:
        notes.append(f"used by several contractions, bytes counted at the first: {_some(shared)}")
    lists = {
        "loops of unknown length, counted as one pass": graph.unknown_trips,
        "not counted, the trace cannot enter them": graph.unentered,
        "of parameters alone, taken as computed beforehand": [fold.name for fold in graph.folds],
        "all branches of a conditional are counted": [s.name for s in graph.sites if s.branches],
    }
    notes += [f"{what}: {_some(names)}" for what, names in lists.items() if names]
    return tuple(notes)
