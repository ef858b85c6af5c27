"""Cost of a packed network on a device: MACs, bytes, latency and energy, kernel by kernel."""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxcompress.core.packed import packed_bytes, unpack
from jaxcompress.core.paths import unique
from jaxcompress.cost import count, operations
from jaxcompress.cost.arena import Arena, arena
from jaxcompress.cost.count import Stored
from jaxcompress.cost.device_model import Device, Rate
from jaxcompress.cost.device_model import device as device_of
from jaxcompress.cost.energies import active_energy
from jaxcompress.cost.operations import Work
from jaxcompress.cost.result import CALL, OTHER, Cost, LayerCost
from jaxcompress.cost.timing.basis import basis, outside
from jaxcompress.cost.timing.fused_kernels import FUSIONS, Kernel, kernels
from jaxcompress.cost.timing.roofline import Load, timing
from jaxcompress.cost.types import ActivationTypes
from jaxcompress.graph import Site
from jaxcompress.graph.flat_list import END, LOOP, Inlined, Trips, inline
from jaxcompress.graph.primitives import names
from jaxcompress.graph.tracing import Program, trace_program
from jaxcompress.graph.unentered import report


def estimate(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    device: "str | os.PathLike[str] | Device",
    activations: Any = None,
    trips: Trips = None,
    fusion: str | None = None,
) -> Cost:
    """Cost of `apply_fn(params, *inputs)`, for the inputs as they are (a batch costs as a batch).

    Nothing is computed and no weight is allocated: the function is traced on the shapes that
    `unpack(params)` gives. Stored bits and zeros are looked up by the path of the parameter that
    feeds a contraction. Loops count with their trips, of a conditional the heavier branch; what
    no result needs is left out, and what no input reaches is taken as computed beforehand. Any
    function can be costed, a gradient or a whole training step too. Contractions inside what cannot
    be looked into (kernels, callbacks) are not counted: a warning and a note name them. The result
    names runtime and version that the device file describes, has an interval of the latency, and
    says of each layer whether its kind and size lay within the fit.

    Args:
      apply_fn: pure function of the unpacked parameters and the inputs.
      params: arrays, `QTensor`s, `Masked`s (what `Compressor.pack` gives), or their shapes.
      *inputs: arrays or `jax.ShapeDtypeStruct`s.
      device: a name of `cost.devices()`, the path of a TOML file, or a `Device`.
      activations: None (the traced dtypes), a number of bits, a format, or a mapping from names
        of sites or taps (`graph.trace`) to bits or formats.
      trips: how often loops of unknown length run: a number, or a mapping from their scopes (the
        notes of the result name them); once, if it is not given.
      fusion: one of `kernels.FUSIONS`; None for what the device's runtime does.

    Raises:
      ValueError: an unknown device, name in `activations` or loop in `trips`; types that the
        device cannot run.

    >>> import jax, jax.numpy as jnp
    >>> w = jax.ShapeDtypeStruct((64, 10), jnp.int8)
    >>> x = jax.ShapeDtypeStruct((1, 64), jnp.int8)
    >>> cost = estimate(lambda p, x: x @ p["w"], {"w": w}, x, device="stm32l4r5")
    >>> cost.macs, cost.weight_bytes, cost.activation_bytes
    (640, 640, 74)
    """
    seen = analyse(
        apply_fn,
        params,
        *inputs,
        device=device,
        activations=activations,
        trips=trips,
        fusion=fusion,
    )
    report(_beyond(seen.program, seen.flat))
    spec, rows = seen.device, _rows(seen)
    layers = [row.layer for row in rows]
    if spec.call is not None:
        layers.append(_call(spec, spec.call.value))
    rest = packed_bytes(params) - sum(layer.weight_bytes for layer in layers)
    if rest:
        layers.append(LayerCost(OTHER, rest))
    total = {
        name: sum(getattr(layer, name) for layer in layers)
        for name in (
            "macs valid_macs flops transcendentals weight_bytes activation_bytes latency_s energy_j"
        ).split()
    }
    factor = math.exp(basis(spec).spread)
    return Cost(
        **total,
        runtime=spec.runtime,
        version=spec.version,
        interval_s=(total["latency_s"] / factor, total["latency_s"] * factor),
        peak_bytes=seen.arena.peak_bytes,
        layers=tuple(layers),
        device=spec,
        weight_memory=seen.weight_memory,
        activation_memory=seen.activation_memory,
        notes=_notes(seen, inputs, rows),
    )


def _call(device: Device, seconds: float) -> LayerCost:
    energy = active_energy(device, seconds)
    return LayerCost(
        CALL, 0, overhead_s=seconds, latency_s=seconds, energy_j=energy, bound="overhead"
    )


class Analysis(NamedTuple):
    """What is known of a program on a device before it is timed."""

    device: Device
    stored: dict[str, Stored]
    program: Program
    flat: Inlined
    types: ActivationTypes
    fusion: str
    kernels: list[Kernel]
    arena: Arena
    weight_memory: str
    activation_memory: str

    def site(self, kernel: Kernel) -> Site | None:
        """The contraction of a kernel."""
        found = kernel.contraction
        return None if found is None else self.program.contractions[found.place]

    def load(self, kernel: Kernel, name: str) -> Load:
        """What a kernel asks of the device; `name` is for one without a contraction."""
        site, lookup = self.site(kernel), self.stored.__getitem__
        if site is None:
            load = count.light_load(kernel, name, self.types, lookup)
        else:
            load = count.load(kernel, site, self.types, lookup, device=self.device)
        return load._replace(
            weight_memory=self.weight_memory, activation_memory=self.activation_memory
        )


def analyse(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    device: "str | os.PathLike[str] | Device",
    activations: Any = None,
    trips: Trips = None,
    fusion: str | None = None,
) -> Analysis:
    """Traces, fuses and places a program; arguments as `estimate`."""
    spec, stored = device_of(device), count.stored(params)
    if fusion is not None and fusion not in FUSIONS:
        raise ValueError(f"fusion: must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    program = trace_program(apply_fn, jax.eval_shape(unpack, params), *inputs, dead_code=False)
    flat = inline(program, weigh=operations.weight, trips=trips)
    types = ActivationTypes(program.graph, activations, program=flat, sites=program.contractions)
    found = kernels(flat, fusion=fusion or spec.fusion)
    live = arena(flat, found, value_bytes=types.value_bytes)
    return Analysis(
        spec,
        stored,
        program,
        flat,
        types,
        fusion or spec.fusion,
        found,
        live,
        spec.place(spec.weight_memories, packed_bytes(params)),
        spec.place(spec.activation_memories, live.peak_bytes),
    )


class _Row(NamedTuple):
    layer: LayerCost
    rate: Rate | None
    unruled: tuple[str, ...]


def _rows(seen: Analysis) -> list[_Row]:
    rows, counted, names = [], set(), set()
    for kernel, live in zip(seen.kernels, seen.arena.live_bytes, strict=True):
        if kernel.marks:
            continue
        site = seen.site(kernel)
        load = seen.load(kernel, "" if site else _name(kernel, names))
        leaves = [seen.stored[path] for path in site.params] if site else []
        new = [leaf for leaf in leaves if leaf.path not in counted]
        counted.update(leaf.path for leaf in leaves)
        rows.append(_row(kernel, load, seen.device, leaves, new, live))
    return rows


def _name(kernel: Kernel, taken: set[str]) -> str:
    base = "/".join(filter(None, (kernel.root.scope, kernel.root.primitive)))
    name = unique(base, taken)
    taken.add(name)
    return name


def _row(
    kernel: Kernel,
    load: Load,
    device: Device,
    leaves: list[Stored],
    new: list[Stored],
    live_bytes: int,
) -> _Row:
    time = timing(device, load)
    ruled = [(op, operations.work(op)) for op in kernel.ops]
    done = operations.total(work or operations.unruled(op) for op, work in ruled) * kernel.times
    unruled = tuple(op.primitive for op, work in ruled if work is None)
    beyond = outside(device, load, time.rate)
    elements = max(sum(leaf.size for leaf in leaves), 1)
    layer = LayerCost(
        name=load.name,
        op=load.op,
        macs=done.macs,
        valid_macs=done.valid_macs,
        flops=done.flops,
        transcendentals=done.transcendentals,
        macs_effective=time.macs_effective,
        weight_dtype=load.weight_dtype,
        activation_dtype=load.activation_dtype,
        pattern=load.pattern if load.op else "",
        density=load.density,
        weight_bits=8 * sum(leaf.bytes for leaf in leaves) / elements,
        weight_bytes=sum(leaf.bytes for leaf in new),
        weight_read_bytes=round(time.read_bytes),
        activation_bytes=load.activation_bytes,
        live_bytes=live_bytes,
        traffic_bytes={name: round(n) for name, n in time.traffic.items()},
        compute_s=time.compute_s,
        memory_s=time.memory_s,
        overhead_s=time.overhead_s,
        latency_s=time.latency_s,
        energy_j=active_energy(device, time.latency_s),
        bound=time.bound,
        fallback=time.fallback,
        in_fit=not beyond,
        outside=beyond,
    )
    return _Row(layer, time.rate, unruled)


class Counts(NamedTuple):
    """Operations of a function, on no device in particular.

    Attributes:
      macs, valid_macs, flops, transcendentals: as in `Cost`.
      valid_flops: 2 * valid_macs + all other operations: what XLA counts.
      unruled: primitives without a rule, taken as one operation per element of their results.
      assumed_trips: loops of unknown length that were counted once.
    """

    macs: int
    valid_macs: int
    flops: int
    valid_flops: int
    transcendentals: int
    unruled: tuple[str, ...]
    assumed_trips: tuple[str, ...]


def counts(
    fn: Callable[..., Any], params: Any, *inputs: Any, trips: Trips = None, fold: bool = True
) -> Counts:
    """Operations of `fn(params, *inputs)`; arguments may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: pure function of arrays.
      params: pytree of arrays.
      *inputs: pytrees of arrays.
      trips: as in `estimate`.
      fold: leave out what no input reaches, as computed beforehand.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 8))
    >>> got = counts(lambda p, x: jnp.tanh(x @ p) + 1, jnp.ones((8, 4)), x)
    >>> got.macs, got.flops, got.transcendentals
    (32, 68, 4)
    """
    program = trace_program(fn, params, *inputs, dead_code=False)
    flat = inline(program, weigh=operations.weight, trips=trips)
    done, unruled = Work(), []
    for op in flat.ops:
        if fold and not any(flat.values[n].origin.moves for n in op.outputs):
            continue
        found = operations.work(op)
        if found is None:
            unruled.append(op.primitive)
        done = done.plus((found or operations.unruled(op)) * op.times)
    return Counts(
        done.macs,
        done.valid_macs,
        done.flops,
        done.valid_flops,
        done.transcendentals,
        tuple(sorted(set(unruled))),
        flat.assumed_trips,
    )


def _kernel_name(rate: Rate) -> str:
    pattern = "" if rate.pattern == "dense" else f"{rate.pattern} "
    return f"{pattern}{rate.op} {rate.weight} x {rate.activation}"


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _notes(seen: Analysis, inputs: Any, rows: list[_Row]) -> tuple[str, ...]:
    graph, device, fusion = seen.program.graph, seen.device, seen.fusion
    shapes = [str(tuple(getattr(leaf, "shape", ()))) for leaf in jax.tree.leaves(inputs)]
    notes = [f"for inputs of shape {', '.join(shapes) or '()'} as given, not per example"]
    notes.append(basis(device).note)
    strange = [f"{row.layer.name} ({row.layer.outside})" for row in rows if not row.layer.in_fit]
    if strange and device.fit is not None:
        notes.append(f"outside the fit: {_some(strange)}")
    if device.rates == "peak" and not device.calibrated:
        notes.append("rates are peaks: kernels reach less, so compute times are lower bounds")
    notes.append(f"kernels are fused as {fusion!r}; peak bytes by liveness of what lies in between")
    used = {row.rate.key: row.rate for row in rows if row.rate is not None}.values()
    if used:
        rates = ", ".join(f"{_kernel_name(r)} ({r.rate.grade})" for r in used)
        notes.append(f"rates used: {rates}")
    notes.append(
        f"energy is active power ({device.active_power.value:g} W, {device.active_power.grade}) "
        "times latency"
    )
    uses = [path for site in graph.sites for path in site.params]
    shared = sorted(path for path, n in Counter(uses).items() if n > 1)
    if shared:
        notes.append(f"used by several contractions, bytes counted at the first: {_some(shared)}")
    notes += [
        f"{what}: {_some(names)}" for what, names in _listed(seen.program, seen.flat, rows) if names
    ]
    return tuple(notes)


def _beyond(program: Program, flat: Inlined) -> list[str]:
    """What is not among the operations either; bodies for each device are."""
    open_ones = {*names("contract"), LOOP, END}
    shut = {op.place for op in flat.ops if op.primitive not in open_ones}
    inside = lambda place: any(place[:depth] in shut for depth in range(1, len(place) + 1))
    return list(dict.fromkeys(text for place, text in program.beyond.items() if inside(place)))


def _listed(program: Program, flat: Inlined, rows: list[_Row]) -> list[tuple[str, list[str]]]:
    unruled = sorted({name for row in rows for name in row.unruled})
    return [
        ("not looked into, its contractions are not counted", _beyond(program, flat)),
        ("loops of unknown length, counted as one pass", list(flat.assumed_trips)),
        ("no rule for these primitives, one operation per element assumed", unruled),
        (
            "of parameters alone, taken as computed beforehand",
            [f.name for f in program.graph.folds],
        ),
        ("of a conditional the heavier branch is counted", list(flat.choices)),
    ]
