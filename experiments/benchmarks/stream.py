"""Quantizing a checkpoint larger than the memory it may take, killed three times on the way.

Command   python -m experiments.benchmarks.stream --json
Device    CPU, 2 cores; 8 GB of source take some minutes and 17 GB of disk
Result    experiments/results/stream_benchmark.json

A seeded bfloat16 checkpoint of the shape of a language model (one embedding of an eighth of all
bytes, layers of 1/40 each, norms) is written in four shards with an index. A child process runs
`jaxcompress quantize --format int4 --group 32` on it without interruption; another one is killed
(SIGKILL) when a quarter, a half and three quarters of the tensors are in its journal, and the same
command is given again each time. `peak_rss_bytes` is the largest resident memory of any child,
`copy_s` the time of a plain copy of the shards, written through to the disk as the packed file is.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments._report import Options, Report, run
from jaxcompress.export import container

KILLS = 3
SHARDS = 4


@dataclasses.dataclass(frozen=True)
class Args(Options):
    gigabytes: float = 8.0
    """Size of the checkpoint, in units of 1e9 bytes."""
    format: str = "int4"
    """Of the weights."""
    group: int = 32
    """Elements per scale."""
    folder: Path | None = None
    """Where the files lie while it runs; default: the system's temporary folder."""


def checkpoint_shapes(source_bytes: int, columns: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Names, shapes and dtypes of the tensors of each shard."""

    def matrix(share: float) -> jax.ShapeDtypeStruct:
        rows = max(round(share * source_bytes / (2 * columns)), 1)
        return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)

    shards = [{} for _ in range(SHARDS)]
    shards[0]["model.embed_tokens.weight"] = matrix(1 / 8)
    for layer in range(35):
        shard = shards[(layer + 5) * SHARDS // 40]
        shard[f"model.layers.{layer}.mlp.weight"] = matrix(1 / 40)
        norm = jax.ShapeDtypeStruct((columns,), jnp.float32)
        shard[f"model.layers.{layer}.norm.weight"] = norm
    return shards


def write_checkpoint(folder: Path, args: Args, report: Report, columns: int) -> None:
    """The shards and their index, never more than a piece of a tensor in memory."""
    rng = np.random.default_rng(args.seed)
    pool = rng.standard_normal(2**22, np.float32)
    shards = checkpoint_shapes(round(args.gigabytes * 1e9), columns)
    places = {}
    for number, shapes in enumerate(report.progress(shards, "writing the checkpoint")):
        file = folder / f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        header, entries = container.layout(shapes, {})
        with file.open("wb") as out:
            out.write(container.seal(header, 0))
            for name, (dtype, shape, _, _) in entries.items():
                places[name] = file.name
                left, scale = math.prod(shape), np.float32(rng.uniform(0.01, 0.05))
                while left:
                    first = rng.integers(len(pool) // 2)
                    piece = pool[first : first + min(left, len(pool) // 2)]
                    out.write((piece * scale).astype(dtype).tobytes())
                    left -= len(piece)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def committed(target: Path) -> int:
    """Tensors in the journal of an unfinished run."""
    try:
        lines = target.with_name(f".{target.name}.journal").read_text().split("\n")
        return sum(len(json.loads(line)) for line in lines[2:])
    except (OSError, ValueError):
        return 0


def resident_bytes(pid: int) -> int:
    """The largest resident memory of a process so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in status.split("\n") if "VmHWM" in x), 0)


def quantize(args: Args, source: Path, target: Path, *, kill_at: float | None) -> dict:
    """One run of the command line in a child; killed when `kill_at` tensors are done."""
    command = [sys.executable, "-m", "jaxcompress", "quantize", str(source), str(target)]
    command += ["--format", args.format, "--group", str(args.group), "--json"]
    started_s, peak, begun_s = time.perf_counter(), 0, None
    part = target.with_name(f".{target.name}.part")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None:
            peak = max(peak, resident_bytes(child.pid))
            begun_s = begun_s or (time.perf_counter() if part.exists() else None)
            # A short run ends before its first commit: there the clock decides.
            late = args.short and begun_s and time.perf_counter() - begun_s > 0.1
            if kill_at is not None and (late or committed(target) >= kill_at):
                child.kill()
            time.sleep(0.01)
        out = child.stdout.read() if child.stdout else b""
    seconds = time.perf_counter() - started_s
    if child.returncode not in ((0,) if kill_at is None else (0, -9)):
        raise RuntimeError(f"the child ended with status {child.returncode}")
    figures = json.loads(out.splitlines()[-1]) if out else {}
    return {**figures, "peak": peak, "seconds": seconds, "killed": child.returncode == -9}


def copy_s(source: Path, target: Path) -> float:
    """Seconds of a plain copy of the shards, one after the other, to the disk."""
    started_s = time.perf_counter()
    for shard in sorted(source.glob("*.safetensors")):
        shutil.copyfile(shard, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
        target.unlink()
    return time.perf_counter() - started_s


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(args: Args, report: Report) -> dict[str, object]:
    if args.short:
        args = dataclasses.replace(args, gigabytes=0.004)
    free = shutil.disk_usage(args.folder or tempfile.gettempdir()).free
    if free < 2.2 * args.gigabytes * 1e9:
        raise ValueError(f"needs {2.2 * args.gigabytes:.0f} GB of disk, {free / 1e9:.0f} are free")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, whole, pieces = (Path(folder) / name for name in ("source", "whole", "pieces"))
        source.mkdir()
        write_checkpoint(source, args, report, 256 if args.short else 4096)
        plain = quantize(args, source, whole, kill_at=None)
        copied_s = copy_s(source, Path(folder) / "copy")
        marks = [(k + 1) * plain["tensors"] / (KILLS + 1) for k in range(KILLS)]
        runs = [quantize(args, source, pieces, kill_at=mark) for mark in marks]
        last = quantize(args, source, pieces, kill_at=None)
        identical = sha256(whole) == sha256(pieces)
        left = sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("."))
    if left or not identical:
        raise RuntimeError(f"identical: {identical}; left beside the file: {left}")
    return {
        "peak_rss_bytes": max(child["peak"] for child in (plain, *runs, last)),
        "kills": sum(child["killed"] for child in runs),
        "resumed_tensors": last["resumed"],
        "tensors": last["tensors"],
        "identical": identical,
        "quantize_s": plain["quantize_s"],
        "process_s": plain["seconds"],
        "interrupted_s": sum(child["seconds"] for child in (*runs, last)),
        "copy_s": copied_s,
        "gb_per_s": plain["source_bytes"] / plain["quantize_s"] / 1e9,
        "copy_gb_per_s": plain["source_bytes"] / copied_s / 1e9,
        "source_bytes": plain["source_bytes"],
        "payload_bytes": plain["payload_bytes"],
        "bits_per_weight": plain["bits_per_weight"],
    }


if __name__ == "__main__":
    run(main, "stream_benchmark")
