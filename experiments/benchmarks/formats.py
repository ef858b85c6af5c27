"""How fast are weights quantized and packed, and what does fake quantization add to training?

Command   python -m experiments.benchmarks.formats --json
Device    CPU, 2 cores of an AMD EPYC (5th generation); a minute
Result    experiments/results/formats_benchmark.json

A matrix of 64 MiB goes from float32 to packed codes and scales (ranges found, values encoded, codes
packed, in one jitted call) in every format. The yardstick is a plain copy of the matrix in the same
rounds. The physical limit is one read of the matrix and one write of the codes at the bandwidth of
that copy, which moves each byte twice.

`fake_quant_overhead` is the time that weights on an int8 grid with a scale per output channel add
to the jitted loss gradient (by weights and inputs) of a dense layer, all else equal.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._report import Options, Report, run
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.formats import Format, Granularity, granularity_for, parse

# key of the figures: (name of the format, axis, group)
CASES = {
    "int8_channel": ("int8", -1, None),
    "int8_g32": ("int8", -1, 32),
    "int4_channel": ("int4", -1, None),
    "int4_g32": ("int4", -1, 32),
    "int4_g32_rows": ("int4", 0, 32),  # groups along the last axis, in one row of memory
    "uint4_g32": ("uint4", -1, 32),
    "int3_g32": ("int3", -1, 32),
    "int2_g32": ("int2", -1, 32),
    "q0_7": ("q0.7", None, None),
    "pot4_channel": ("pot4", -1, None),
    "apot4_channel": ("apot4", -1, None),
    "ternary_channel": ("ternary", -1, None),
    "binary_channel": ("binary", -1, None),
    "nf4": ("nf4", -1, None),
    "kmeans4": ("kmeans4", None, None),
    "float8_e4m3_channel": ("float8_e4m3", -1, None),
    "float4_e2m1_g32": ("float4_e2m1", -1, 32),
    "mxfp4": ("mxfp4", -1, None),
    "mxfp6_e3m2": ("mxfp6_e3m2", -1, None),
    "mxfp8_e4m3": ("mxfp8_e4m3", -1, None),
    "mxint8": ("mxint8", -1, None),
    "nvfp4": ("nvfp4", -1, None),
}


@dataclasses.dataclass(frozen=True)
class Args(Options):
    size: int = 4096
    """Rows and columns of the matrix."""
    batch: int = 256
    """Rows of the input of the layer."""
    repeats: int = 7
    """Rounds of timing; the median counts."""


def packer(format: Format, where: Granularity) -> Callable[[jax.Array], Any]:
    """A jitted x -> packed array: ranges, codes, packing."""
    quantizer = jc.quantize.weights(
        format, axis=where.axis or None, group=where.group, block=where.block
    )
    return jax.jit(lambda x: quantizer.pack(x, quantizer.init(x)))


def pack_figures(args: Args, report: Report, x: jax.Array) -> dict[str, float]:
    source = np.asarray(x).copy()
    target = np.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: np.copyto(target, source)}
    packed_bytes = {}
    for key, (name, axis, group) in report.progress(CASES.items(), "compiling"):
        pack = packer(parse(name), granularity_for(parse(name), axis, group))
        packed_bytes[key] = jc.packed_bytes(pack(x))
        calls[key] = lambda pack=pack: pack(x)
    seconds = interleaved(calls, repeats=2 if args.short else args.repeats)
    copy_s, figures, rows = seconds["copy"], {}, []
    for key, taken in seconds.items():
        speed = x.nbytes / taken / 1e9
        if key == "copy":
            rows.append((key, "", speed, 1.0, ""))
            continue
        limit_s = copy_s * (x.nbytes + packed_bytes[key]) / (2 * x.nbytes)
        bits = 8 * packed_bytes[key] / x.size
        rows.append((key, bits, speed, copy_s / taken, taken / limit_s))
        figures[f"{key}_pack_over_memcpy"] = copy_s / taken
        figures[f"{key}_pack_gb_per_s"] = speed
    report.table(
        f"quantize and pack a float32 matrix of {x.nbytes / 2**20:.0f} MiB",
        ("format", "bits per value", "GB/s", "of the copy's speed", "times the limit"),
        rows,
    )
    return {"memcpy_gb_per_s": x.nbytes / copy_s / 1e9, **figures}


def overhead_figures(args: Args, report: Report, w: jax.Array) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(args.seed + 1), 2)
    x, y = (jax.random.normal(key, (args.batch, w.shape[0])) for key in keys)

    def gradient(quantizer):
        def loss(w, state, x, y):
            return jnp.mean((x @ quantizer.apply(w, state) - y) ** 2)

        state = quantizer.init(w)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 2)))
        return lambda: compiled(w, state, x, y)

    int4, int8 = parse("int4"), parse("int8")
    quantizers = {
        "plain": jc.identity(),
        "int8_channel": jc.quantize.weights(int8, axis=-1),
        "int8_channel_identity_ste": jc.quantize.weights(
            int8, axis=-1, ste=jc.formats.identity_ste
        ),
        "int4_g32": jc.quantize.weights(int4, axis=-1, group=32),
    }
    calls = {name: gradient(quantizer) for name, quantizer in quantizers.items()}
    seconds = interleaved(calls, repeats=2 if args.short else 3 * args.repeats)
    added = {name: seconds[name] / seconds["plain"] - 1 for name in calls}
    report.table(
        f"gradient of a dense layer {w.shape[0]} x {w.shape[1]}, batch {args.batch}",
        ("weights", "ms", "added"),
        [(name, 1e3 * seconds[name], f"{100 * added[name]:.1f} %") for name in calls],
    )
    return {
        "fake_quant_overhead": added["int8_channel"],
        "fake_quant_identity_ste_overhead": added["int8_channel_identity_ste"],
        "fake_quant_int4_g32_overhead": added["int4_g32"],
        "dense_gradient_s": seconds["plain"],
    }


def main(args: Args, report: Report) -> dict[str, float]:
    size = min(args.size, 256) if args.short else args.size
    if size < 32:
        raise ValueError(f"--size must be at least 32, got {size}")
    w = jax.random.normal(jax.random.key(args.seed), (size, size)) / math.sqrt(size)
    return {**pack_figures(args, report, w), **overhead_figures(args, report, w)}


if __name__ == "__main__":
    run(main, "formats_benchmark")
