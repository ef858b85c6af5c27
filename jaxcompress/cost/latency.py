"""Roofline latency of one contraction: the rate that applies to it, and what bounds it."""

from typing import NamedTuple

from jaxcompress.cost import dtypes
from jaxcompress.cost.device import Device, Rate


class Load(NamedTuple):
    """What a contraction asks of a device, all its calls together."""

    name: str
    op: str  # one of device.OPS
    macs: int  # zeros included
    calls: int
    weight_dtype: str
    activation_dtype: str
    pattern: str  # of the zeros in the weights: "dense" | "unstructured" | "N:M"
    density: float
    weights: int  # weights that a call widens, times the calls
    weight_read_bytes: float  # weights as they are stored, read once per call
    dense_read_bytes: float  # the same if zeros were stored like the rest
    activation_bytes: int  # operands and output, once per call


class Timing(NamedTuple):
    """How long a contraction takes, and why."""

    latency_s: float  # max(compute, memory) + overhead
    compute_s: float
    memory_s: float
    overhead_s: float
    macs_effective: int  # multiply-accumulates that are carried out
    read_bytes: float  # weights read
    bound: str  # "compute" | "memory" | "overhead"
    rate: Rate
    fallback: str  # what the device cannot do and does instead, "" if nothing


def kept_fraction(pattern: str, density: float) -> float:
    """Share of the multiply-accumulates that a kernel for `pattern` carries out.

    >>> kept_fraction("2:4", 0.3), kept_fraction("unstructured", 0.3), kept_fraction("dense", 0.3)
    (0.5, 0.3, 1.0)
    """
    if pattern == "dense":
        return 1.0
    if pattern == "unstructured":
        return density
    kept, of = map(int, pattern.split(":"))
    return kept / of


def _skips(kernel: str, pattern: str) -> bool:
    # Whether a kernel for the pattern `kernel` can run weights with the zeros of `pattern`.
    if kernel in ("dense", pattern):
        return True
    return kernel == "unstructured" and pattern != "dense"


def _rows(device: Device, load: Load) -> list[Rate]:
    # Kernels for the types as they are come first: a runtime that has one uses it.
    usable = [rate for rate in device.throughput if _skips(rate.pattern, load.pattern)]
    exact = [
        rate
        for rate in usable
        if (rate.weight, rate.activation) == (load.weight_dtype, load.activation_dtype)
    ]
    wider = [
        rate
        for rate in usable
        if dtypes.holds(rate.weight, load.weight_dtype)
        and dtypes.holds(rate.activation, load.activation_dtype)
    ]
    for rows in (exact, wider):
        same_op = [rate for rate in rows if rate.op == load.op]
        if same_op:
            return same_op
        if rows:  # no rate for this class of contraction: the slowest one, to be safe
            slowest = min(rows, key=device.macs_per_s)
            return [rate for rate in rows if rate.op == slowest.op]
    listed = sorted({f"{rate.weight} x {rate.activation}" for rate in device.throughput})
    raise ValueError(
        f"{load.name!r}: device {device.name!r} with runtime {device.runtime!r} has no rate for "
        f"{load.weight_dtype} weights x {load.activation_dtype} activations, nor for wider types; "
        f"it has {', '.join(listed)}. Quantize the weights, or say how wide the activations are "
        "(activations=8)"
    )


def _unpack_s(device: Device, load: Load, rate: Rate) -> float:
    # Cycles to widen the weights: the entry of the narrowest type that holds the stored one.
    if rate.weight == load.weight_dtype or device.clock is None:
        return 0.0
    fitting = [w for w in device.unpack if dtypes.holds(w, load.weight_dtype)]
    if not fitting:
        return 0.0
    narrowest = min(fitting, key=lambda w: dtypes.kind(w).digits)
    return load.weights * device.unpack[narrowest].value / device.clock.value


def _fallback(device: Device, load: Load, rate: Rate, unpack_s: float) -> str:
    reasons = []
    stored, used = (load.weight_dtype, load.activation_dtype), (rate.weight, rate.activation)
    if stored != used:
        widening = f" after {unpack_s:.3g} s of unpacking" if unpack_s else ""
        reasons.append(f"{' x '.join(stored)} computed as {' x '.join(used)}{widening}")
    if rate.pattern == "dense" and load.pattern != "dense":
        reasons.append(f"{load.pattern} zeros ({1 - load.density:.1%}) save storage, not time")
    if rate.op != load.op:
        reasons.append(f"no rate for {load.op}, taken as {rate.op}")
    return "; ".join(reasons)


def _timing(device: Device, load: Load, rate: Rate) -> Timing:
    # t = max(MACs_eff / rate + unpack, bytes / bandwidth of every memory) + overhead
    effective = round(load.macs * kept_fraction(rate.pattern, load.density))
    unpack_s = _unpack_s(device, load, rate)
    compute_s = effective / device.macs_per_s(rate) + unpack_s
    # Without a kernel for the zeros, the weights are expanded before they are used.
    skipping = rate.pattern != "dense" or load.pattern == "dense"
    read = load.weight_read_bytes if skipping else load.dense_read_bytes
    traffic = dict.fromkeys(device.memories, 0.0)
    traffic[device.weight_memory] += read
    traffic[device.activation_memory] += load.activation_bytes
    memory_s = max(b / device.memories[name].bandwidth.value for name, b in traffic.items())
    overhead_s = device.overhead.value * load.calls
    busy_s = max(compute_s, memory_s)
    bound = "compute" if compute_s >= memory_s else "memory"
    if overhead_s > busy_s:
        bound = "overhead"
    fallback = _fallback(device, load, rate, unpack_s)
    return Timing(
        busy_s + overhead_s,
        compute_s,
        memory_s,
        overhead_s,
        effective,
        read,
        bound,
        rate,
        fallback,
    )


def timing(device: Device, load: Load) -> Timing:
    """Latency of a contraction: t = max(MACs / rate, bytes / bandwidth) + overhead.

    The rate is that of the operands' types where the device lists it, for its class of
    contraction and the pattern of its zeros. Else it is the fastest among the listed types that
    hold the operands, plus the cycles to unpack narrower weights. Zeros save multiply-accumulates
    and reads only if there is a rate for their pattern. Weights and activations in one memory
    share its bandwidth.

    Raises:
      ValueError: no listed type holds the operands.
    """
    timings = [_timing(device, load, rate) for rate in _rows(device, load)]
    return min(timings, key=lambda t: (t.latency_s, dtypes.kind(t.rate.weight).digits))
