"""The result of an estimate: totals, one row per contraction, and whether it fits."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxcompress.cost.device_model import Device

OTHER = "other parameters"
"""Name of the row of the parameters that feed no contraction (biases, norms, embeddings)."""

CALL = "call"
"""Name of the row of what a run of the whole network takes besides its kernels."""


@dataclass(frozen=True)
class LayerCost:
    """Cost of one kernel, all its calls together: a contraction and what is fused to it, or less.

    Attributes:
      name: of the site in `graph.trace`; the scope and the primitive, if there is no contraction;
        or `OTHER` or `CALL`.
      op: one of `device.OPS`; "" without a contraction, as are the other words.
      macs, valid_macs: multiply-accumulates, zeros included, with and without padding.
      flops, transcendentals: 2 * macs + all other operations; exp, tanh, roots and the like apart.
      macs_effective: those that the device carries out.
      weight_dtype, activation_dtype, pattern, density: of the operands.
      weight_bits: stored bits per weight, scales and bitmask included; 0 without weights.
      weight_bytes: stored bytes; a parameter used by several sites counts at the first.
      weight_read_bytes: bytes of weights read, once per call.
      activation_bytes: arrays read and written at their bits, once per call.
      live_bytes: all activations that are needed while it runs.
      traffic_bytes: weights and activations moved, by memory.
      compute_s, memory_s, overhead_s: latency_s = max(compute_s, memory_s) + overhead_s.
      energy_j: active power of the device times latency_s.
      bound: "compute" | "memory" | "overhead", the largest of the three.
      fallback: what the device cannot do and does instead; "" if nothing.
      in_fit: whether kind and size lay within what the device's rates were fitted on; true of
        kernels without a contraction.
      outside: why not; "" if they do.
    """

    name: str
    weight_bytes: int
    op: str = ""
    macs: int = 0
    valid_macs: int = 0
    flops: int = 0
    transcendentals: int = 0
    macs_effective: int = 0
    weight_dtype: str = ""
    activation_dtype: str = ""
    pattern: str = ""
    density: float = 1.0
    weight_bits: float = 0.0
    weight_read_bytes: int = 0
    activation_bytes: int = 0
    live_bytes: int = 0
    traffic_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    compute_s: float = 0.0
    memory_s: float = 0.0
    overhead_s: float = 0.0
    latency_s: float = 0.0
    energy_j: float = 0.0
    bound: str = ""
    fallback: str = ""
    in_fit: bool = True
    outside: str = ""


@dataclass(frozen=True)
class Fit:
    """Bytes needed and available per memory; true if all fit, and printed as one line."""

    used: Mapping[str, int]
    capacity: Mapping[str, int]

    @property
    def bottleneck(self) -> str:
        """The memory that is fullest."""
        return max(self.used, key=self._share)

    def _share(self, name: str) -> float:
        return self.used[name] / max(self.capacity[name], 1)

    def __bool__(self) -> bool:
        return all(self.used[name] <= self.capacity[name] for name in self.used)

    def __str__(self) -> str:
        parts = [
            f"{name} {used:,} of {self.capacity[name]:,} B ({self._share(name):.1%})"
            for name, used in self.used.items()
        ]
        verdict = "fits" if self else "does not fit"
        return f"{verdict}: {', '.join(parts)}; fullest: {self.bottleneck}"


@dataclass(frozen=True)
class Cost:
    """What a network costs on a device, for the inputs that were given.

    Every total is the sum over `layers`, besides `peak_bytes`, which is the largest.

    Attributes:
      macs, valid_macs: multiply-accumulates of all contractions, with and without those on padding.
      flops, transcendentals: 2 * macs + all other operations; exp, tanh, roots and the like apart.
      weight_bytes: exactly `core.packed_bytes` of the parameters.
      activation_bytes: arrays that kernels read and write.
      peak_bytes: the arena: most bytes of activations needed at once, see `memory.arena`.
      latency_s, energy_j: of the kernels one after the other.
      weight_memory, activation_memory: where they lie.
      notes: what the figures rest on and leave out.
      runtime, version: of the runtime that the device file describes; "" if it does not say.
      interval_s: seconds between which the latency lies, as far as the fit can say; the notes say
        what that rests on.
    """

    macs: int
    valid_macs: int
    flops: int
    transcendentals: int
    weight_bytes: int
    activation_bytes: int
    peak_bytes: int
    latency_s: float
    energy_j: float
    layers: tuple[LayerCost, ...]
    device: Device
    weight_memory: str
    activation_memory: str
    notes: tuple[str, ...]
    runtime: str = ""
    version: str = ""
    interval_s: tuple[float, float] = (0.0, 0.0)

    @property
    def traffic_bytes(self) -> dict[str, int]:
        """Bytes moved, by memory."""
        return {
            name: sum(layer.traffic_bytes.get(name, 0) for layer in self.layers)
            for name in self.device.memories
        }

    def fits(self) -> Fit:
        """Weights and peak activations against the memories where the device keeps them."""
        used = dict.fromkeys((self.weight_memory, self.activation_memory), 0)
        used[self.weight_memory] += self.weight_bytes
        used[self.activation_memory] += self.peak_bytes
        return Fit(used, {name: self.device.available(name) for name in used})

    @property
    def bound(self) -> str:
        """What takes most of the time: "compute" | "memory" | "overhead", "" if nothing does."""
        seconds: dict[str, float] = {}
        for layer in self.layers:
            seconds[layer.bound] = seconds.get(layer.bound, 0.0) + layer.latency_s
        return max(seconds, key=lambda name: seconds[name], default="")

    def verdict(self) -> str:
        """Whether it fits, and what bounds it, in one line."""
        slowest = max(self.layers, key=lambda layer: layer.latency_s, default=None)
        if slowest is None or not slowest.latency_s:
            return str(self.fits())
        share = slowest.latency_s / self.latency_s
        return f"{self.fits()}; {self.bound} bound, slowest {slowest.name} ({share:.0%})"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        fit = self.fits()
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("layers", "device", "notes")
        }
        return plain | {
            "device": self.device.name,
            "runtime": self.device.runtime,
            "fits": bool(fit),
            "memory_used_bytes": dict(fit.used),
            "memory_capacity_bytes": dict(fit.capacity),
            "traffic_bytes": self.traffic_bytes,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from jaxcompress.cost.report import summary

        return summary(self)
