"""A device and the runtime on it: rates, memories and power, every number with its source."""

import functools
import importlib.resources
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxcompress.core.paths import near_misses

GRADES = ("datasheet", "measured", "derived", "estimate")
"""How a number is known: stated by the maker or in a published table; measured on the device;
computed from numbers of the first two grades; anything weaker (recalled, second hand, assumed)."""

OPS = ("conv", "pointwise", "depthwise", "dense", "matmul")
"""Classes of contractions: convolution, 1x1 convolution, depthwise convolution, weights times
activations, activations times activations."""


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, where it is from, and how well it is known (one of `GRADES`)."""

    value: float
    unit: str
    source: str
    grade: str


@dataclass(frozen=True)
class Memory:
    """One memory: capacity [B] and bandwidth [B/s]."""

    name: str
    capacity: Quantity
    bandwidth: Quantity


@dataclass(frozen=True)
class Rate:
    """How fast contractions of one kind run.

    The rate counts multiply-accumulates that are carried out: a kernel for 2:4 sparse weights
    carries out half of the dense ones. Pattern: "dense", "unstructured" (any zeros are skipped)
    or "N:M". Beside its MACs a kernel gathers its operand: `unfold` is how fast the elements of
    patches (positions x taps x input channels) are copied; it is what makes few output channels
    slow; `ragged` where the input channels are no multiple of the alignment "packet". None where
    it is not known apart.
    """

    weight: str  # number type, see `cost.dtypes`
    activation: str
    op: str  # one of OPS
    pattern: str
    rate: Quantity  # MAC/s, or cycle/MAC
    unfold: Quantity | None = None  # element/s, or cycle/element
    ragged: Quantity | None = None  # the same; None: as unfold
    overhead: Quantity | None = None  # s per call; None: that of the device

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the rate is listed under."""
        return self.weight, self.activation, self.pattern, self.op


@dataclass(frozen=True)
class Vector:
    """How fast operations that are no contractions run."""

    type: str  # number type, see `cost.dtypes`
    rate: Quantity  # op/s, or cycle/op


@dataclass(frozen=True)
class Measurements:
    """What a runtime's rates were fitted on.

    Attributes:
      kinds: classes of contractions (of `OPS`) that the networks have.
      macs: least and most multiply-accumulates of one call of a contraction.
      networks: names of the measured networks.
      types: number types of the weights that these networks had.
      error: |log(measured / estimated)| of networks or boards left out; None: not known.
    """

    kinds: tuple[str, ...]
    macs: tuple[float, float]
    networks: tuple[str, ...]
    types: tuple[str, ...]
    error: Quantity | None = None


@dataclass(frozen=True)
class Device:
    """A device with one of its runtimes; build it with `device`.

    Attributes:
      name, runtime, description: for people; `device(f"{name}:{runtime}")` gives it again.
      rates: "peak" (no kernel is faster) or "effective" (from whole networks as they were measured,
        what happens between contractions included).
      clock: Hz; None where no rate is in cycles.
      memories: by name.
      weight_memories, activation_memories: names, fastest first: all weights lie in the first that
        holds them, all activations likewise; in the last if none does.
      active_power: W while it computes.
      overhead: s per call of a kernel.
      call: s per run of the whole network; None: nothing.
      throughput: the rates.
      unpack: cycles to widen one stored weight, by the widest type that the entry is for.
      elementwise: rates of other operations; where there is none, only their bytes take time.
      fusion: what becomes one kernel, one of `kernels.FUSIONS`.
      voltage: V, at which the power holds; None if it is not known.
      reserved: B of a memory that program, stack or operating system take.
      alignment: channels to whose multiples kernels pad a weight's "inputs" and "outputs", and
        gathered patches ("vector"); of whose multiples they gather fast ("packet").
      version: of the runtime that was measured; "" if it is not known.
      fit: what the rates were fitted on; None: no measured network, or none that the file names.
      calibrated: measurements of the device itself that its rates were brought to, see
        `calibrate`; 0: the rates are those of the file.
    """

    name: str
    runtime: str
    description: str
    rates: str
    clock: Quantity | None
    memories: Mapping[str, Memory]
    weight_memories: tuple[str, ...]
    activation_memories: tuple[str, ...]
    active_power: Quantity
    overhead: Quantity
    throughput: tuple[Rate, ...]
    unpack: Mapping[str, Quantity]
    elementwise: tuple[Vector, ...] = ()
    fusion: str = "elementwise"
    call: Quantity | None = None
    voltage: Quantity | None = None
    reserved: Mapping[str, Quantity] = field(default_factory=dict)
    alignment: Mapping[str, Quantity] = field(default_factory=dict)
    version: str = ""
    fit: Measurements | None = None
    calibrated: int = 0

    def available(self, memory: str) -> int:
        """Bytes of a memory that are free for the network."""
        taken = self.reserved[memory].value if memory in self.reserved else 0
        return max(int(self.memories[memory].capacity.value - taken), 0)

    def place(self, memories: Sequence[str], size: int) -> str:
        """The first of the memories that holds `size` bytes, else the last."""
        return next((name for name in memories if size <= self.available(name)), memories[-1])

    def per_s(self, quantity: Quantity) -> float:
        """A rate per second, of one that is in cycles for each or per second."""
        if quantity.unit.startswith("cycle/") and self.clock is not None:
            return self.clock.value / quantity.value
        return quantity.value

    def macs_per_s(self, rate: Rate) -> float:
        """The rate in multiply-accumulates per second."""
        return self.per_s(rate.rate)

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Every number of the device under the name it has in its file."""
        if self.clock is not None:
            yield "clock", self.clock
        for memory in self.memories.values():
            yield f"memory.{memory.name}.capacity", memory.capacity
            yield f"memory.{memory.name}.bandwidth", memory.bandwidth
        yield "active_power", self.active_power
        yield "overhead", self.overhead
        for name in ("call", "voltage"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)
        yield from ((f"reserved.{name}", q) for name, q in self.reserved.items())
        yield from ((f"alignment.{name}", q) for name, q in self.alignment.items())
        for rate in self.throughput:
            yield "throughput " + " ".join(rate.key), rate.rate
            for name in ("unfold", "ragged", "overhead"):
                if getattr(rate, name) is not None:
                    yield " ".join((name, *rate.key)), getattr(rate, name)
        for weight, quantity in self.unpack.items():
            yield f"unpack {weight}", quantity
        if self.fit is not None and self.fit.error is not None:
            yield "fit.error", self.fit.error
        for vector in self.elementwise:
            yield f"elementwise {vector.type}", vector.rate


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    folder = importlib.resources.files("jaxcompress.cost") / "devices"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): tomllib.loads(f.read_text("utf-8")) for f in files}


def devices() -> tuple[str, ...]:
    """Names of the devices that come with the library, one per runtime; the first is the default.

    >>> [name for name in devices() if name.startswith("stm32l4")]
    ['stm32l4r5', 'stm32l4r5:tflm']
    """
    return tuple(
        f"{name}:{runtime}" if i else name
        for name, spec in _shipped().items()
        for i, runtime in enumerate(spec["runtime"])
    )


def device(name_or_path: "str | os.PathLike[str] | Device") -> Device:
    """A device by name, `name:runtime`, or the path of a TOML file (`:runtime` may follow it).

    The files in `jaxcompress/cost/devices` are examples of the form.

    Raises:
      ValueError: no such device, runtime or file, or the file is not of the form; the message
        names the key, what is missing and what would be right.

    >>> device("stm32l4r5").clock.value
    120000000.0
    """
    from jaxcompress.cost.device_file import parse

    if isinstance(name_or_path, Device):
        return name_or_path
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            "device: must be a name, the path of a .toml file or a Device, got "
            f"{type(name_or_path).__name__}"
        )
    text = os.fspath(name_or_path)
    base, colon, runtime = text.rpartition(":")
    if not colon or text.endswith(".toml"):
        base, runtime = text, ""
    if base.endswith(".toml"):
        return parse(_load(base), Path(base).stem, runtime=runtime, file=base)
    if base not in _shipped():
        nearest = ", ".join(map(repr, near_misses(base, devices())))
        raise ValueError(
            f"unknown device {text!r}; "
            + (f"nearest: {nearest}; " if nearest else "")
            + f"available: {', '.join(devices())}; or the path of a .toml file"
        )
    return parse(_shipped()[base], base, runtime=runtime, file=f"{base}.toml")


def template() -> str:
    """The text of a device file to start from, with all that it may hold.

    >>> "[runtime.tflm]" in template()
    True
    """
    return (importlib.resources.files("jaxcompress.cost") / "template.toml").read_text("utf-8")


def device_of_tables(tables: Mapping[str, Any], *, name: str, runtime: str = "") -> Device:
    """A device from the tables that its file would have.

    Raises:
      ValueError: they are not of the form.
    """
    from jaxcompress.cost.device_file import parse

    return parse(tables, name, runtime=runtime, file=name)


def _load(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"device file {path!r} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"device file {path!r} is not TOML: {error}") from error
