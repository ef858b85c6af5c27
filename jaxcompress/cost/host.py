"""Measures this machine's CPU, as XLA uses it, into a device file.

python -m jaxcompress.cost.host host.toml
"""

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxcompress.core.files import replacing
from jaxcompress.cost.timing.probes import Fitted, Timings, fits, timings


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


def measure(
    *,
    watts: float = 0.0,
    repeats: int = 25,
    short: bool = False,
    found: Timings | None = None,
) -> str:
    """The text of a device file of this machine's CPU; takes about a minute.

    Args:
      watts: active power, which is not measured; 0 predicts no energy.
      repeats, short: as in `timings`.
      found: timings that were taken before, instead of new ones.

    Raises:
      ValueError: as of `timings`, or `watts` below 0.
    """
    if watts < 0:
        raise ValueError(f"need watts >= 0, got {watts=}")
    found = timings(repeats=repeats, short=short) if found is None else found
    fitted, vector, packet = fits(found.probes, found.seconds)
    source = f"python -m jaxcompress.cost.host, JAX {jax.__version__}, {datetime.date.today()}"
    bandwidths = {"cache": max(found.cached, found.dram), "dram": found.dram}
    lines = [
        f"description = {json.dumps(f'{_processor()}, {_cores()} cores')}\n\n[memory.cache]\n",
        _number("capacity", _cache_bytes(), "B", "level 2, of all cores: the operating system"),
        _number("bandwidth", bandwidths["cache"], "B/s", f"{source}: kernels on 256 KiB"),
        "\n[memory.dram]\n",
        _number("capacity", _memory_bytes(), "B", "the operating system"),
        _number("bandwidth", bandwidths["dram"], "B/s", f"{source}: sum"),
        f'\n[runtime.xla]\ndescription = "XLA of JAX {jax.__version__} on the CPU, float32"\n',
        'rates = "peak"\nweights = ["cache", "dram"]\nactivations = ["cache", "dram"]\n',
        'fusion = "loops"\n',
        _number("active_power", watts, "W", "as given to the command", "estimate"),
        _number("overhead", found.overhead, "s", f"{source}: kernels on 1 KiB"),
        _number("call", found.call, "s", f"{source}: 100 arrays, among other programs"),
        "\n[runtime.xla.alignment]\n",
        _number("vector", vector, "channel", f"{source}: the best fit of 1, 4, 8 and 16"),
        _number("packet", packet, "channel", f"{source}: the best fit of 1, 4, 8 and 16"),
    ]
    for op, speed in fitted.items():
        lines.append(_throughput(op, speed, source))
    lines.append(
        '\n[[runtime.xla.elementwise]]\ntype = "float32"\n'
        f'value = {found.elementwise:.6g}\nunit = "op/s"\n'
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
