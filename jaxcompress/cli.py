"""The command line: quantize large checkpoints, look into files, cost, export and time them.

jaxcompress quantize model.safetensors model-int4.safetensors --format int4 --group 32
jaxcompress inspect model-int4.safetensors
jaxcompress devices
jaxcompress cost packed.safetensors --model my.nets:apply --input float32[1,32,32,3] --device ...
jaxcompress export packed.safetensors model.onnx --model my.nets:apply --input float32[1,32,32,3]
jaxcompress bench float32.onnx model.onnx model.tflite
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxcompress import cli_models, cost, formats
from jaxcompress.core.paths import near_misses
from jaxcompress.export.checkpoint import foreign
from jaxcompress.export.checkpoint.container_reader import read_header
from jaxcompress.export.checkpoint.stream_read import inspect
from jaxcompress.export.checkpoint.streaming import Progress, StreamReport, quantize_file

_INTERVAL_S = 5.0  # between two lines of progress, where there is no bar


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    0: done. 2: what the user gave cannot be done, with one line `error: ...` on standard error
    (`python -X dev` shows where). 130: stopped by Ctrl-C. 141: nobody reads on, as under `head`.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, `| head -1` say
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ends
    except (ValueError, TypeError, OSError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxcompress", description="Compress networks for the device they must run on."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    look = commands.add_parser("inspect", help="what lies in a packed, plain or exported file")
    look.add_argument("file", help="*.safetensors, *.onnx, *.tflite, *.stablehlo")
    look.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    look.set_defaults(run=_inspect)
    cli_models.add_commands(commands)
    names = commands.add_parser("devices", help="list the devices of the cost model")
    names.set_defaults(run=lambda args: print("\n".join(cost.devices())))
    return parser


def _add_quantize(commands) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a packed file of a safetensors checkpoint of any size",
        description="Quantizes a checkpoint tensor by tensor. Killed, the same command goes on "
        "where it was; the target's name is taken when all is done.",
    )
    add = parser.add_argument
    add("source", help="*.safetensors, a folder of shards, or *.safetensors.index.json")
    add("target", help="the packed file, for jaxcompress.export.load")
    add("--format", required=True, help="int4, uint4, nf4, mxfp4, nvfp4, float8_e4m3, ternary, ...")
    add(
        "--axis",
        default="0",
        help="channel axes, each index with its own scale: 0 for the [out, in] of PyTorch "
        "(default), -1 for the [in, out] of Flax, 0,1 for stacked experts, none for one scale "
        "per tensor",
    )
    add("--group", type=int, help="elements per scale inside a channel; default: the format's")
    add("--include", default=".*", metavar="REGEX", help="whole names to quantize; default: all")
    add("--exclude", metavar="REGEX", help="whole names to copy unchanged")
    add("--min-dims", type=int, default=2, help="tensors with fewer axes are copied; default: 2")
    add("--calibrate", help="min_max (default), mse, octav, kl, percentile, percentile:99.9")
    add("--force", action="store_true", help="replace an existing target")
    add("--restart", action="store_true", help="forget what an earlier run has done")
    add("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> None:
    started_s = time.perf_counter()
    with _progress() as progress:
        report = quantize_file(
            args.source,
            args.target,
            format=_format(args.format),
            axis=_axes(args.axis),
            group=args.group,
            include=args.include,
            exclude=args.exclude,
            min_dims=args.min_dims,
            calibrate=args.calibrate,
            resume=not args.restart,
            force=args.force,
            progress=progress,
        )
    seconds = time.perf_counter() - started_s
    if args.json:
        print(json.dumps({**report._asdict(), "quantize_s": seconds}), flush=True)
    else:
        print(_summary(report, args.target, seconds))


def _summary(report: StreamReport, target: str, seconds: float) -> str:
    return (
        f"{target}: {report.quantized} of {report.tensors} tensors quantized to "
        f"{report.bits_per_weight:.3f} bits per weight; {report.source_bytes:,} -> "
        f"{report.file_bytes:,} bytes in {seconds:.1f} s"
    )


def _format(name: str) -> formats.Format:
    try:
        return formats.parse(name)
    except ValueError as error:
        words = re.findall(r"\w+", str(error).partition("known: ")[2])
        known = [
            *filter(_is_format, words),
            *(f"{k}int{bits}" for k in ("", "u") for bits in (4, 8)),
        ]
        nearest = near_misses(name, dict.fromkeys(known))
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"--format: {error}{hint}") from error


def _is_format(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(formats.parse(name))
    return False


def _axes(text: str) -> tuple[int, ...] | None:
    if text == "none":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--axis must be integers such as 0, -1 or 0,1, or none, got {text!r}"
        ) from None


def byte_bar(*, transient: bool = False) -> Any:
    """A `rich.progress.Progress` of bytes on standard error; None where rich is not installed."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(stderr=True), transient=transient)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Progress on standard error: a bar on a terminal, if rich is there, else lines."""
    found = byte_bar(transient=True)
    if found is None or not sys.stderr.isatty():
        yield _lines()
        return
    with found as bar:
        task = bar.add_task("quantizing", total=None)

        def show(at: Progress) -> None:
            if at.note:
                bar.console.print(at.note)
            label = f"{at.done_tensors}/{at.tensors} {at.name[-40:]}"
            bar.update(task, description=label, total=at.source_bytes, completed=at.done_bytes)

        yield show


def _lines() -> Callable[[Progress], None]:
    last_s = time.monotonic()

    def show(at: Progress) -> None:
        nonlocal last_s
        if at.note:
            print(at.note, file=sys.stderr, flush=True)
        if time.monotonic() - last_s >= _INTERVAL_S or at.done_tensors == at.tensors:
            last_s = time.monotonic()
            percent = 100 * at.done_bytes / max(at.source_bytes, 1)
            line = f"{percent:3.0f} %  {at.done_tensors}/{at.tensors} tensors  {at.name}"
            print(line, file=sys.stderr, flush=True)

    return show


def _inspect(args: argparse.Namespace) -> None:
    if Path(args.file).suffix in (".onnx", ".tflite", ".stablehlo"):
        found = cli_models.describe(Path(args.file))
        if args.json:
            print(json.dumps(found))
            return
        for name, value in found.items():
            rows = value.items() if isinstance(value, dict) else [(value, "")]
            print("\n".join(f"{name:12} {key!s:32} {count}".rstrip() for key, count in rows))
        return
    leaves = inspect(args.file)
    header = read_header(args.file)
    if "jaxcompress" not in header.metadata:
        kind = foreign.described(Path(args.file), header.entries, header.metadata)
        print(f"{args.file}: {kind}", file=sys.stderr)
    if args.json:
        rows = [{**leaf._asdict(), "bits_per_weight": leaf.bits_per_weight} for leaf in leaves]
        print(json.dumps({"leaves": rows, "payload_bytes": sum(x.stored_bytes for x in leaves)}))
        return
    rows = [("name", "format", "shape", "bits/weight", "bytes")]
    for leaf in leaves:
        shape = "x".join(map(str, leaf.shape)) or "()"
        format = f"{leaf.format}, sparse" if leaf.sparse else leaf.format
        bits = f"{leaf.bits_per_weight:.3f}"
        rows.append((leaf.name, format, shape, bits, f"{leaf.stored_bytes:,}"))
    rows.append((f"{len(leaves)} leaves", "", "", "", f"{sum(x.stored_bytes for x in leaves):,}"))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    for name, format, shape, bits, size in rows:
        left = f"{name:{widths[0]}}  {format:{widths[1]}}  {shape:>{widths[2]}}"
        print(f"{left}  {bits:>{widths[3]}}  {size:>{widths[4]}}")
