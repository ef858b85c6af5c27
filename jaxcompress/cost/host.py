"""Measures this machine's CPU, as XLA uses it, into a device file.

    python -m jaxcompress.cost.host host.toml

Small networks of one kind of layer are timed, interleaved; rates, the speed of gathering patches
and the overhead of a kernel are the non-negative least squares fit to the medians.
"""

import argparse
import datetime
import functools
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import nnls

from jaxcompress.core.files import replacing
from jaxcompress.cost.clock import interleaved

_LANES = (1, 4, 8, 16)
_CALLS = 24  # layers in a row: the cost of a call from Python is shared by them


class Probe(NamedTuple):
    """A program to time, and what one of its layers is made of."""

    op: str
    run: Callable[[], Any]
    macs: int
    patches: int
    inputs: int  # channels


def _conv(op: str, size: int, width: int, taps: int, *, groups: int = 1) -> Probe:
    x = jax.random.normal(jax.random.key(0), (1, size, size, width))
    w = jax.random.normal(jax.random.key(1), (taps, taps, width // groups, width))
    w = w / (taps * (width // groups) ** 0.5)
    patches = size * size * taps * taps * width

    @jax.jit
    def run(x, w):
        for _ in range(_CALLS):
            x = lax.conv_general_dilated(
                x,
                w,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
        return x

    return Probe(op, lambda: run(x, w), patches * width // groups, patches, width // groups)


def _dot(op: str, rows: int, width: int, *, batch: int = 1) -> Probe:
    x = jax.random.normal(jax.random.key(0), (batch, rows, width))
    w = jax.random.normal(jax.random.key(1), (batch, width, width)) / width**0.5

    @jax.jit
    def run(x, w):
        for _ in range(_CALLS):
            x = jnp.matmul(x, w)
        return x

    patches = batch * rows * width
    return Probe(op, lambda: run(x, w), patches * width, patches, width)


def probes(*, short: bool = False) -> list[Probe]:
    """The programs that are timed: widths and sizes that small networks have."""
    sizes = [(32, 4), (32, 8), (32, 16), (16, 8), (16, 32), (8, 16), (8, 64)]
    more = [(32, 12), (32, 24), (16, 16), (16, 24), (16, 64), (8, 32), (8, 48), (16, 4), (24, 4)]
    sizes = sizes[:3] if short else sizes + more
    found = [_conv("conv", size, width, 3) for size, width in sizes]
    found += [_conv("pointwise", size, 4 * width, 1) for size, width in sizes[:7]]
    found += [_conv("depthwise", s, w, 3, groups=w) for s, w in sizes[:7]]
    found += [_dot("dense", rows, width) for rows, width in ((1, 64), (16, 256), (128, 256))]
    return found + [_dot("matmul", rows, 64, batch=8) for rows in (8, 64, 256)]


class Fitted(NamedTuple):
    """Speed of one class of layers: t = macs / rate + patches / unfold + overhead.

    Attributes:
      rate: MAC/s.
      unfold, ragged: elements of patches per second, input channels padded to `vector`, where they
        are a multiple of `packet` and where not; inf where gathering costs nothing.
      overhead: s.
      error: mean relative error that the fit leaves.
    """

    rate: float
    unfold: float
    ragged: float
    overhead: float
    error: float


def fit(
    macs: Sequence[float],
    patches: Sequence[float],
    inputs: Sequence[int],
    seconds: Sequence[float],
    *,
    vector: int = 1,
    packet: int = 1,
) -> Fitted:
    """Fits times of layers; relative errors are minimized, no cost is negative.

    >>> fitted = fit([100, 200, 100], [10, 10, 40], [8, 8, 8], [3.1, 5.1, 3.4])
    >>> [round(x, 3) for x in fitted]
    [50.0, 100.0, inf, 1.0, 0.0]
    """
    channels = np.asarray(inputs)
    ragged = channels % packet != 0
    padded = np.asarray(patches, float) * (-(-channels // vector) * vector / channels)
    columns = [
        np.asarray(macs, float),
        np.where(ragged, 0.0, padded),
        np.where(ragged, padded, 0.0),
        np.ones(len(seconds)),
    ]
    design = np.stack(columns, axis=1) / np.asarray(seconds, float)[:, None]
    scale = np.maximum(design.max(axis=0), 1e-300)
    found = nnls(design / scale, np.ones(len(seconds)))[0] / scale
    rate, unfold, slow = (float(1 / x) if x > 0 else float("inf") for x in found[:3])
    error = float(np.mean(np.abs(design @ found - 1)))
    return Fitted(rate, unfold, slow, float(found[3]), error)


def _fits(timed: list[Probe], seconds: list[float]) -> tuple[dict[str, Fitted], int, int]:
    # Of the widths of vectors that processors have, those that leave the smallest error.
    groups = {op: [i for i, p in enumerate(timed) if p.op == op] for op in {p.op for p in timed}}

    def fitted(op: str, vector: int = 1, packet: int = 1) -> Fitted:
        chosen = [timed[i] for i in groups[op]]
        return fit(
            [p.macs for p in chosen],
            [p.patches for p in chosen],
            [p.inputs for p in chosen],
            [seconds[i] for i in groups[op]],
            vector=vector,
            packet=packet,
        )

    tried = {(v, p): fitted("conv", v, p) for v in _LANES for p in _LANES if p <= v}
    # Packets that are not full cannot be gathered faster than full ones.
    sound = [lanes for lanes, found in tried.items() if found.ragged <= found.unfold]
    best = min([(1, 1), *sound], key=lambda lanes: tried[lanes].error)
    found = {op: fitted(op) for op in sorted(groups)}
    return {**found, "conv": tried[best]}, *best


def bandwidth(size: int, *, repeats: int) -> float:
    """Bytes per second that a sum over `size` bytes reads."""
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return size / interleaved({"sum": lambda: total(x)}, repeats=repeats)["sum"]


def elementwise(*, repeats: int) -> tuple[float, float, float]:
    """Operations per second, bytes per second in the cache, and seconds of overhead of a kernel.

    The first from many operations in one kernel, the others from one operation in many kernels on
    arrays of two sizes.
    """
    count, loops, small, large = 64, 200, 1 << 8, 1 << 16

    @jax.jit
    def chain(x):
        for i in range(count // 2):
            x = (x + 0.5) * (0.25 + i / 128)
        return x

    @jax.jit
    def kernels(x):
        return lax.fori_loop(0, loops, lambda _, x: x * 0.5 + 0.25, x)

    xs = {n: jnp.ones(n, jnp.float32) for n in (small, large)}
    runs = {str(n): functools.partial(kernels, x) for n, x in xs.items()}
    taken = interleaved({**runs, "chain": lambda: chain(xs[large])}, repeats=repeats)
    slope = (taken[str(large)] - taken[str(small)]) / loops / (large - small)
    return count * large / taken["chain"], 8 / slope, taken[str(small)] / loops


def call_overhead(*, repeats: int) -> float:
    """Seconds that a call from Python with 100 arrays takes, as many as small networks have."""
    arrays = [jnp.ones(16) for _ in range(100)]
    first = jax.jit(lambda arrays: arrays[0] + 1.0)
    return interleaved({"call": lambda: first(arrays)}, repeats=4 * repeats)["call"]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":", 1)[1] for line in lines if line.startswith("model name"))
        return next(names).strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cache_bytes() -> int:
    found = 1 << 18
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = ((folder / name).read_text().strip() for name in ("level", "size"))
        except OSError:
            continue
        if level == "2" and size.endswith("K"):
            found = int(size[:-1]) << 10
    return found * _cores()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def _number(key: str, value: float, unit: str, source: str, grade: str = "measured") -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return (
        f"{key} = {{ value = {text}, unit = {json.dumps(unit)}, "
        f"grade = {json.dumps(grade)}, source = {json.dumps(source)} }}\n"
    )


def measure(*, watts: float = 0.0, repeats: int = 25, short: bool = False) -> str:
    """The text of a device file of this machine's CPU; takes about a minute.

    Args:
      watts: active power, which is not measured; 0 predicts no energy.
      repeats: rounds of timing.
      short: fewer programs, for tests; the figures mean little.

    Raises:
      ValueError: JAX does not run on a CPU here, or `watts` or `repeats` are out of range.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(f"measures a CPU, but JAX runs on {jax.default_backend()!r}")
    if watts < 0 or repeats < 1:
        raise ValueError(f"need watts >= 0 and repeats >= 1, got {watts=}, {repeats=}")
    timed = probes(short=short)
    medians = interleaved({str(i): p.run for i, p in enumerate(timed)}, repeats=repeats)
    fitted, vector, packet = _fits(timed, [medians[str(i)] / _CALLS for i in range(len(timed))])
    rate, cached, overhead = elementwise(repeats=repeats)
    dram = bandwidth((16 if short else 256) << 20, repeats=repeats)
    source = f"python -m jaxcompress.cost.host, JAX {jax.__version__}, {datetime.date.today()}"
    lines = [
        f"description = {json.dumps(f'{_processor()}, {_cores()} cores')}\n\n[memory.cache]\n",
        _number("capacity", _cache_bytes(), "B", "level 2, of all cores: the operating system"),
        _number("bandwidth", max(cached, dram), "B/s", f"{source}: kernels on 256 KiB"),
        "\n[memory.dram]\n",
        _number("capacity", _memory_bytes(), "B", "the operating system"),
        _number("bandwidth", dram, "B/s", f"{source}: sum"),
        f'\n[runtime.xla]\ndescription = "XLA of JAX {jax.__version__} on the CPU, float32"\n',
        'rates = "peak"\nweights = ["cache", "dram"]\nactivations = ["cache", "dram"]\n',
        'fusion = "loops"\n',
        _number("active_power", watts, "W", "as given to the command", "estimate"),
        _number("overhead", overhead, "s", f"{source}: kernels on 1 KiB"),
        _number("call", call_overhead(repeats=repeats), "s", f"{source}: 100 arrays"),
        "\n[runtime.xla.alignment]\n",
        _number("vector", vector, "channel", f"{source}: the best fit of 1, 4, 8 and 16"),
        _number("packet", packet, "channel", f"{source}: the best fit of 1, 4, 8 and 16"),
    ]
    for op, speed in fitted.items():
        lines.append(_throughput(op, speed, source))
    lines.append(
        f'\n[[runtime.xla.elementwise]]\ntype = "float32"\nvalue = {rate:.6g}\nunit = "op/s"\n'
        f'grade = "measured"\nsource = {json.dumps(source + ": chain in the cache")}\n'
    )
    return "".join(lines)


def _throughput(op: str, speed: Fitted, source: str) -> str:
    note = f"{source}: fit, mean error {speed.error:.0%}"
    lines = [
        "\n[[runtime.xla.throughput]]\n"
        f'weight = "float32"\nactivation = "float32"\nop = "{op}"\n'
        f'value = {min(speed.rate, 1e15):.6g}\nunit = "MAC/s"\ngrade = "measured"\n'
        f"source = {json.dumps(note)}\n",
        _number("overhead", max(speed.overhead, 1e-9), "s", note),
    ]
    for key in ("unfold", "ragged"):
        if np.isfinite(getattr(speed, key)):
            lines.append(_number(key, getattr(speed, key), "element/s", note))
    return "".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: measures, writes the file, says how to use it."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxcompress.cost.host", description="Measures this CPU into a device file."
    )
    parser.add_argument("file", type=Path, help="where to write it, NAME.toml")
    parser.add_argument("--watts", type=float, default=0.0, help="active power, if you know it")
    parser.add_argument("--repeats", type=int, default=25, help="rounds of timing")
    parser.add_argument("--short", action="store_true", help="seconds instead of a minute")
    args = parser.parse_args(argv)
    if args.file.suffix != ".toml":
        parser.error(f"file must end in .toml, got {args.file}")
    text = measure(watts=args.watts, repeats=args.repeats, short=args.short)
    with replacing(args.file) as file:
        file.write(text.encode())
    print(f"wrote {args.file}: jc.cost.estimate(..., device={str(args.file)!r})")


if __name__ == "__main__":
    main()
