"""Question: does a trained ResNet-20 run in integers alone, as the simulation says, code by code?

    python -m experiments.integer_cifar10 --json

Folds BatchNorm into the published weights, calibrates on training images, and gives every one of
the 10,000 test images to the integers (int8 products, int32 sums and requantization; the program is
checked for operations on floats) and to the simulation (float32 convolutions of codes, float64
rounding). Counts the codes of every tensor that differ, then times one batch, interleaved.
The data are read from $JAXCOMPRESS_DATA, else downloaded. About 3 minutes on two CPU cores.
Results: experiments/results/integer_cifar10.json.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.models import resnet_cifar
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.quantize.integer.integer_program import (
    IntegerProgram,
    float_operations,
    integer_only,
)

BATCH = 50


@dataclasses.dataclass(frozen=True)
class Args(Options):
    depth: int = 20
    """20, 32, 44 or 56."""
    calibration_images: int = 512
    """Training images that set the ranges."""
    weight_bits: int = 8
    """Bits of the weights, one scale per output channel."""
    symmetric: bool = False
    """int8 activations with zero point 0, instead of uint8 with one of their own."""
    repeats: int = 30
    """Rounds of timing."""


class Counts(NamedTuple):
    """Of one batch: rows that are right, rows that agree with float32, codes per tensor."""

    float32: int
    simulated: int
    integer: int
    agreeing: int
    differing: Any  # int64 [tensors]
    compared: int


def main(args: Args, report: Report) -> dict[str, Any]:
    variables = resnet_cifar.load_pretrained(args.depth)
    params = resnet_cifar.fold_batch_norm(variables)
    apply_fn = resnet_cifar.folded_apply_fn(args.depth)
    program = integer_only(
        apply_fn,
        params,
        report.progress(calibration_batches(args), "calibration"),
        weights=jc.formats.integer(args.weight_bits),
        activations=jc.formats.integer(8, symmetric=args.symmetric),
    )
    images, labels = load_cifar10("test")
    if args.short:
        images, labels = images[: 2 * BATCH], labels[: 2 * BATCH]
    codes = program.quantize_input(cifar10_normalise(images[:BATCH]))
    floats = float_operations(jax.make_jaxpr(IntegerProgram.run)(program, codes))
    float32 = jax.jit(lambda params, pixels: apply_fn(params, cifar10_normalise(pixels)))

    def count(start: int) -> Counts:
        pixels, truth = images[start : start + BATCH], labels[start : start + BATCH]
        return counted(program, np.asarray(float32(params, pixels)), pixels, truth)

    starts = range(0, len(images), BATCH)
    first = count(0)  # alone: it compiles what the threads share
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rest = report.progress(pool.map(count, starts[1:]), "images", total=len(starts) - 1)
        total = [sum(column) for column in zip(first, *rest, strict=True)]
    totals = Counts(*total)
    percent = lambda rows: 100 * rows / len(images)
    seconds = timed(
        program, float32, params, images[:BATCH], repeats=2 if args.short else args.repeats
    )
    show(report, program, totals.differing)
    weight_bytes = sum(c["weight"].nbytes for c in program.constants if "weight" in c)
    return {
        "model": f"resnet{args.depth}-cifar10",
        "weights": jc.formats.integer(args.weight_bits).name,
        "activations": jc.formats.integer(8, symmetric=args.symmetric).name,
        "images": len(images),
        "differing_codes": int(totals.differing.sum()),
        "compared_codes": totals.compared,
        "compared_tensors": len(program.grids),
        "float_operations": len(floats),
        "float32_top1_percent": percent(totals.float32),
        "simulated_top1_percent": percent(totals.simulated),
        "integer_top1_percent": percent(totals.integer),
        "float32_agreement_percent": percent(totals.agreeing),
        "integer_s_per_image": seconds["integer"] / BATCH,
        "float32_s_per_image": seconds["float32"] / BATCH,
        "speedup_over_float32": seconds["float32"] / seconds["integer"],
        "weight_bytes": weight_bytes,
        "packed_bytes": jc.packed_bytes(program),
        "float32_bytes": jc.packed_bytes(params),
    }


def calibration_batches(args: Args) -> list[jax.Array]:
    """Batches of 64 normalised training images, drawn by the seed."""
    images, _ = load_cifar10("train")
    count = 64 if args.short else args.calibration_images
    if not 1 <= count <= len(images) or count % 64:
        raise ValueError(
            f"--calibration-images must be a multiple of 64 up to {len(images)}, got {count}"
        )
    rows = np.random.default_rng(args.seed).choice(len(images), count, replace=False)
    return [cifar10_normalise(images[rows[i : i + 64]]) for i in range(0, count, 64)]


def counted(
    program: IntegerProgram, logits: np.ndarray, pixels: np.ndarray, labels: np.ndarray
) -> Counts:
    """Integers against the simulation, tensor by tensor, and both against the labels."""
    codes = program.quantize_input(cifar10_normalise(pixels))
    ran = [np.asarray(tensor) for tensor in program.run_every(codes)]
    simulated = program.simulate_every(codes)
    right = lambda scores: int(np.sum(np.argmax(scores, axis=-1) == labels))
    integers = ran[program.output]
    return Counts(
        right(logits),
        right(simulated[program.output]),
        right(integers),
        int(np.sum(np.argmax(integers, axis=-1) == np.argmax(logits, axis=-1))),
        np.array([np.count_nonzero(a != b) for a, b in zip(ran, simulated, strict=True)]),
        sum(tensor.size for tensor in ran),
    )


def timed(
    program: IntegerProgram, float32: Any, params: Any, images: np.ndarray, *, repeats: int
) -> dict[str, float]:
    """Median seconds of a batch, from pixels to logits."""

    def integer(pixels):
        return program.dequantize(program.run(program.quantize_input(cifar10_normalise(pixels))))

    pixels = jnp.asarray(images)
    calls = {"integer": lambda: integer(pixels), "float32": lambda: float32(params, pixels)}
    return interleaved(calls, repeats=repeats)


def show(report: Report, program: IntegerProgram, differing: np.ndarray) -> None:
    """The steps, their grids and how many of their codes differ."""
    rows = [
        (
            f"{node.scope or 'input'} {node.kind}",
            float(grid.qparams.scale),
            0 if grid.format.symmetric else int(grid.qparams.zero_point),
            int(count),
        )
        for node, grid, count in zip(program.nodes, program.grids[1:], differing[1:], strict=True)
    ]
    report.table("integers", ("step", "scale", "zero point", "differing codes"), rows)


if __name__ == "__main__":
    run(main, "integer_cifar10")
