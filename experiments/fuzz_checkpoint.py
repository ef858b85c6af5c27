"""Question: is any damaged or hostile checkpoint read wrongly, or able to harm who reads it?

    python -m experiments.fuzz_checkpoint --json

A small file with every kind of leaf (int4, int8, codebooks, ternary, small floats, block formats,
bitmask, CSR, N:M, plain arrays, grids of activations, metadata) is changed 10,000 times: bits,
spans, lengths, headers, schemes, Zstandard frames; a third of the variants have a checksum that
fits. Each is read by `export.load` and `export.inspect` in a process whose memory is limited.
  loaded_equal       the same leaves, grids and metadata as the original
  loaded_as_written  the checksum fits other numbers, which are consistent: as large as the header
                     says, and equal when they are saved and read again
  refused            ValueError that names the file
  wrong, crashed     anything else; either makes the exit status 1
`peak_extra_mb` is the most resident memory that reading one variant took. About 5 minutes of CPU
time. Result: experiments/results/fuzz_checkpoint.json.
"""

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import resource
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._mutate import mutated
from experiments._report import Options, Report, run
from jaxcompress.core.packed import mask_leaf

BATCH = 250
MAX_BYTES = 2**25  # what a file may grow to
LIMIT_BYTES = 2**29  # of address space beyond what the process has when it begins
FORMATS = {
    "int4": ("int4", {"axis": -1, "group": 5}),
    "int8": ("int8", {"axis": 0}),
    "uint3": ("uint3", {}),
    "kmeans4": ("kmeans4", {}),
    "nf4": ("nf4", {}),
    "ternary": ("ternary", {"axis": -1}),
    "float8": ("float8_e4m3", {"block": (4, 4)}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "fixed": ("q1.10", {}),
    "pot4": ("pot4", {}),
}


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    mutations: int = 10_000
    """Variants."""
    workers: int = 2
    """Processes; 0: this one, without a limit on its memory."""


class Outcome(NamedTuple):
    """What became of one variant."""

    index: int
    kind: str
    what: str
    why: str
    extra_bytes: int
    seconds: float


def original(seed: int) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """Packed params, grids and metadata."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(12, 16)), jnp.float32)
    quantized = {}
    for name, (format, how) in FORMATS.items():
        comp = jc.quantize.weights(jc.formats.parse(format), **how)
        quantized[name] = comp.pack(w, comp.init(w))
    masks = {
        "bitmask": rng.random((12, 16)) < 0.4,
        "csr": np.arange(192).reshape(12, 16) % 67 == 5,
        "groups": np.tile(np.eye(4, dtype=bool), (3, 4)),
        "none": np.zeros((12, 16), bool),
    }
    sparse = {
        f"{kind}{name}": mask_leaf(mask, jax.tree.map(lambda x: x, leaf))
        for kind, mask in masks.items()
        for name, leaf in (("", jnp.where(mask, w, 0.0)), ("_int8", quantized["int8"]))
    }
    plain = {
        "bias": jnp.arange(3, dtype=jnp.bfloat16),
        "steps": jnp.arange(3, dtype=jnp.int32),
        "wide": np.array([2**40, -1]),
        "flags": jnp.array([True, False, True]),
        "scalar": jnp.float32(0.5),
        "empty": jnp.zeros((0, 4)),
    }
    low, high = jnp.full((3, 1), -1.0), jnp.ones((3, 1))
    formats = {"a/lhs": jc.formats.integer(8, symmetric=False), "b": jc.formats.fixed_point(2, 5)}
    grids = {name: jc.core.Grid(f.qparams(low, high), f) for name, f in formats.items()}
    return {"quantized": quantized, "sparse": sparse, **plain}, grids, {"model": "fuzz"}


def equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure and bits."""
    pairs = [map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(*pairs, strict=True)
    )


class Reader:
    """Reads variants of one file, and judges what comes of it."""

    def __init__(self, folder: Path, seed: int):
        self.path, self.seed = folder / "variant", seed
        params, grids, metadata = original(seed)
        jc.export.save(self.path, params, activations=grids, metadata=metadata)
        self.raw = self.path.read_bytes()
        self.first = jc.export.load(self.path)
        assert equal(tuple(self.first), (params, grids, metadata))
        jc.export.save(self.path, params, compress="zstd")  # what reads it is imported by now
        jc.export.load(self.path)
        jc.unpack(self.first.params)

    def outcome(self, index: int) -> Outcome:
        """One variant."""
        variant = mutated(self.raw, index, self.seed)
        self.path.write_bytes(variant.data)
        before, begin_s = _forget_peak(), time.perf_counter()
        found, why = None, ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with contextlib.suppress(ValueError):
                    jc.export.inspect(self.path)
                found = jc.export.load(self.path, max_bytes=MAX_BYTES)
            what = "loaded"
        except ValueError as error:
            what = "refused" if str(self.path) in str(error) else "crashed"
            why = str(error)
        except Exception as error:  # this is what it looks for
            what, why = "crashed", f"{type(error).__name__}: {error}"
        figures = max(_peak() - before, 0), time.perf_counter() - begin_s
        if found is not None:
            what, why = self._judged(found, variant.sealed)
        return Outcome(index, variant.kind, what, why[:300], *figures)

    def _judged(self, found: Any, sealed: bool) -> tuple[str, str]:
        if equal(found, self.first):
            return "loaded_equal", ""
        if not sealed:
            return "wrong", "loads as something else"
        if jax.tree.structure(found.params) == jax.tree.structure(self.first.params):
            jax.block_until_ready(jc.unpack(found.params))  # compiled already
        size = jc.export.save(self.path, found[0], activations=found[1], metadata=found[2])
        if size.payload_bytes != jc.packed_bytes(found[:2]):
            return "wrong", "another payload"
        again = jc.export.load(self.path, max_bytes=MAX_BYTES)
        return ("loaded_as_written" if equal(again, found) else "wrong"), "saved, it is another"


def _forget_peak() -> int:
    """Resident bytes; the peak is counted from here on, where Linux lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@functools.cache
def _reader(folder: str, seed: int, limited: bool) -> Reader:
    reader = Reader(Path(folder), seed)
    if limited:
        lines = Path("/proc/self/status").read_text().splitlines()
        size = 1024 * int(next(line for line in lines if line.startswith("VmSize")).split()[1])
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
    return reader


def batch(folder: str, seed: int, indices: range, limited: bool) -> list[Outcome]:
    """Some variants, in this process."""
    with tempfile.TemporaryDirectory(dir=folder) if not limited else contextlib.nullcontext():
        own = Path(folder) / multiprocessing.current_process().name
        own.mkdir(exist_ok=True)
        reader = _reader(str(own), seed, limited)
        return [reader.outcome(index) for index in indices]


def outcomes(args: Args, report: Report) -> list[Outcome]:
    """All variants."""
    count = 300 if args.short else args.mutations
    workers = 0 if args.short else args.workers
    parts = [range(a, min(a + BATCH, count)) for a in range(0, count, BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        run_batch = functools.partial(batch, folder, args.seed, limited=workers > 0)
        if not workers:
            done = map(run_batch, parts)
            return [o for part in report.progress(done, "reading", total=len(parts)) for o in part]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:  # it dies if a process dies
            done = pool.map(run_batch, parts)
            return [o for part in report.progress(done, "reading", total=len(parts)) for o in part]


def main(args: Args, report: Report) -> dict[str, Any]:
    """Reads all variants and counts what came of them."""
    if args.mutations < 1 or args.workers < 0:
        raise ValueError(
            f"--mutations must be positive and --workers not negative, got {args.mutations}, "
            f"{args.workers}"
        )
    found = outcomes(args, report)
    counts = collections.Counter(outcome.what for outcome in found)
    kinds = sorted({outcome.kind for outcome in found})
    columns = ("loaded_equal", "loaded_as_written", "refused", "wrong", "crashed")
    by_kind = collections.Counter((outcome.kind, outcome.what) for outcome in found)
    rows = [(kind, *(by_kind[kind, what] for what in columns)) for kind in kinds]
    report.table("variants", ("kind", *columns), rows)
    bad = [o for o in found if o.what in ("wrong", "crashed")]
    for outcome in bad[:20]:
        report.console.print(outcome, markup=False)
    if bad:
        raise RuntimeError(f"{len(bad)} variants were read wrongly or crashed")
    return {
        "mutations": len(found),
        **{what: counts[what] for what in columns},
        "kinds": len(kinds),
        "peak_extra_mb": max(o.extra_bytes for o in found) / 1e6,
        "slowest_s": max(o.seconds for o in found),
        "max_bytes_mb": MAX_BYTES / 1e6,
    }


if __name__ == "__main__":
    run(main, "fuzz_checkpoint")
