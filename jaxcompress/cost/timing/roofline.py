"""Roofline latency of one kernel: the rate that applies to it, and what bounds it."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxcompress.cost import dtypes
from jaxcompress.cost.device_model import Device, Rate


class Load(NamedTuple):
    """What a kernel asks of a device, all its calls together."""

    name: str
    op: str  # one of device.OPS; "" if there is no contraction
    macs: int  # zeros included
    calls: int
    weight_dtype: str
    activation_dtype: str
    pattern: str  # of the zeros in the weights: "dense" | "unstructured" | "N:M"
    density: float
    weights: int  # weights that a call widens, times the calls
    weight_read_bytes: float  # weights as they are stored, read once per call
    dense_read_bytes: float  # the same if zeros were stored like the rest
    activation_bytes: int  # arrays read and written, once per call
    weight_memory: str = ""  # where they lie; "": the fastest
    activation_memory: str = ""
    fill: float = 1.0  # share of the channels, padded as the device wants them, that are there
    patches: int = 0  # elements of the operand, once for each time it meets a kernel
    inputs: int = 0  # input channels
    operations: int = 0  # other than multiply-accumulates, of a kernel without contraction


class Timing(NamedTuple):
    """How long a kernel takes, and why."""

    latency_s: float  # max(compute, memory) + overhead
    compute_s: float
    memory_s: float
    overhead_s: float
    macs_effective: int  # multiply-accumulates that are carried out
    read_bytes: float  # weights read
    bound: str  # "compute" | "memory" | "overhead" | "" if it takes no time
    traffic: Mapping[str, float]  # B by memory
    rate: Rate | None  # of the contraction
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
    # Integers too wide for all of them are computed as floats.
    types, floats = (load.weight_dtype, load.activation_dtype), ("float32", "float32")
    whole = all(dtypes.kind(name).family == "int" for name in types)
    as_floats = [r for r in usable if whole and (r.weight, r.activation) == floats]
    for rows in (exact, wider, as_floats):
        for op in (load.op, "conv") if load.op == "pointwise" else (load.op,):
            same_op = [rate for rate in rows if rate.op == op]
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
    if rate.op != load.op and (load.op, rate.op) != ("pointwise", "conv"):
        reasons.append(f"no rate for {load.op}, taken as {rate.op}")
    return "; ".join(reasons)


def _timing(device: Device, load: Load, rate: Rate) -> Timing:
    # t = max(MACs_eff / (rate * fill) + unfold + unpack, bytes / bandwidth of every memory)
    #     + overhead
    effective = round(load.macs * kept_fraction(rate.pattern, load.density))
    unpack_s = _unpack_s(device, load, rate)
    compute_s = effective / load.fill / device.macs_per_s(rate) + unpack_s
    compute_s += _unfold_s(device, load, rate)
    # Without a kernel for the zeros, the weights are expanded before they are used.
    skipping = rate.pattern != "dense" or load.pattern == "dense"
    read = load.weight_read_bytes if skipping else load.dense_read_bytes
    fallback = _fallback(device, load, rate, unpack_s)
    return _bounded(device, load, compute_s, effective, read, rate=rate, fallback=fallback)


def _unfold_s(device: Device, load: Load, rate: Rate) -> float:
    # Vectors that the input channels do not fill are gathered as if they did.
    if rate.unfold is None and rate.ragged is None:
        return 0.0
    lanes = {
        name: int(device.alignment[name].value) if name in device.alignment else 1
        for name in ("vector", "packet")
    }
    slow = rate.ragged is not None and load.inputs % lanes["packet"] != 0
    speed = rate.ragged if slow else rate.unfold
    if speed is None:
        return 0.0
    channels = max(load.inputs, 1)
    padded = -(-channels // lanes["vector"]) * lanes["vector"] / channels
    return load.patches * padded / device.per_s(speed)


def _bounded(
    device: Device,
    load: Load,
    compute_s: float,
    effective: int,
    read: float,
    *,
    rate: Rate | None,
    fallback: str = "",
) -> Timing:
    traffic = dict.fromkeys(device.memories, 0.0)
    traffic[load.weight_memory or device.weight_memories[0]] += read
    traffic[load.activation_memory or device.activation_memories[0]] += load.activation_bytes
    memory_s = max(b / device.memories[name].bandwidth.value for name, b in traffic.items())
    per_call = device.overhead if rate is None or rate.overhead is None else rate.overhead
    overhead_s = per_call.value * load.calls
    if rate is None and device.rates == "effective":  # contained in the rates of contractions
        memory_s = overhead_s = 0.0
    busy_s = max(compute_s, memory_s)
    bound = "compute" if compute_s >= memory_s else "memory"
    if overhead_s > busy_s:
        bound = "overhead"
    return Timing(
        busy_s + overhead_s,
        compute_s,
        memory_s,
        overhead_s,
        effective,
        read,
        bound if busy_s + overhead_s else "",
        traffic,
        rate,
        fallback,
    )


def _elementwise(device: Device, load: Load) -> Timing:
    usable = [v for v in device.elementwise if dtypes.holds(v.type, load.activation_dtype)]
    rate = max((device.per_s(v.rate) for v in usable), default=math.inf)
    compute_s = 0.0 if device.rates == "effective" else load.operations / rate
    return _bounded(device, load, compute_s, 0, load.weight_read_bytes, rate=None)


def timing(device: Device, load: Load) -> Timing:
    """Latency of a kernel: t = max(MACs / rate, bytes / bandwidth) + overhead.

    Where the device knows it, gathering the patches of a convolution adds to the MACs. The rate
    is that of the operands' types where the device lists it, for its class of
    contraction and the pattern of its zeros. Else it is the fastest among the listed types that
    hold the operands, plus the cycles to unpack narrower weights. Zeros save multiply-accumulates
    and reads only if there is a rate for their pattern. Weights and activations in one memory
    share its bandwidth. Without a contraction the operations run at the device's elementwise rate;
    on a device of "effective" rates, which contain them, they take no time of their own.

    Raises:
      ValueError: no listed type holds the operands.
    """
    if not load.op:
        return _elementwise(device, load)
    timings = [(rate, _timing(device, load, rate)) for rate in _rows(device, load)]
    by_time = lambda pair: (pair[1].latency_s, dtypes.kind(pair[0].weight).digits)
    return min(timings, key=by_time)[1]
