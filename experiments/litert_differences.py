"""Question: where an int8 LiteRT file names another class than the integers do, why?

    python -m experiments.litert_differences --json

ResNet-20 as in `experiments.benchmarks.deploy`, int8, 10,000 test images: the file in LiteRT beside
the integer program with every accumulator rounded once. The images on which the two disagree, and
the first --images, are then computed as the kernels of XNNPACK do: products brought to the next
grid in float32 (ties to even), additions with multipliers of 20 bits below the larger one, halves
rounded up.
  differ               images on which the largest code is another one
  explained            of these, those where XNNPACK's arithmetic names the class of the file
  codes_equal          share of equal output codes, integers rounded once
  codes_equal_xnnpack  the same, XNNPACK's arithmetic
About 3 minutes on two CPU cores. Result: experiments/results/litert_differences.json.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.benchmarks.deploy import Args as DeployArgs
from experiments.benchmarks.deploy import Networks, rounded_once
from experiments.data import cifar10_normalise, load_cifar10
from jaxcompress.export.benchmarks import outputs
from jaxcompress.export.sessions import session
from jaxcompress.quantize.integer.simulated_steps import simulate_node

ADD_BITS = 20  # of an addition's multipliers, below the leading one of the larger


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    images: int = 400
    """Test images, beside those that differ, whose codes are counted."""


def in_float32(acc: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """acc * multiplier * 2**(shift - 31): factors and product in float32, to the nearest even."""
    factor = np.float32(multiplier * 2.0 ** (shift.astype(np.float64) - 31))
    return np.rint(np.float32(acc) * factor).astype(np.float64)


def added(steps: list[np.ndarray], ratios: list[np.ndarray]) -> np.ndarray:
    """sum of step * ratio in fixed point, halves rounded up."""
    shift = ADD_BITS - np.floor(np.log2(max(ratios)))
    total = sum(x * np.rint(ratio * 2.0**shift) for x, ratio in zip(steps, ratios, strict=True))
    return np.floor((total + 2.0 ** (shift - 1)) / 2.0**shift)


def as_xnnpack(program: Any, codes: Any) -> np.ndarray:
    """The codes of the result."""
    scales = [np.float32(grid.qparams.scale) for grid in program.grids]
    tensors = [np.asarray(codes)]
    for node, constants in zip(program.nodes, program.constants, strict=True):
        c = {key: np.asarray(value) for key, value in constants.items()}
        inputs = [tensors[number] for number in node.inputs]
        if node.kind == "add":
            pairs = zip(inputs, c["zeros"], strict=True)
            steps = [x.astype(np.float64) - zero for x, zero in pairs]
            ratios = [scales[number] / scales[len(tensors)] for number in node.inputs]
            found = added(steps, ratios) + float(c["zero"])
            found = np.clip(found, float(c["low"]), float(c["high"])).astype(inputs[0].dtype)
        else:
            found = simulate_node(node, c, *inputs, product=in_float32)
        tensors.append(found)
    return tensors[program.output]


def main(args: Args, report: Report) -> dict[str, Any]:
    """All images once, and those that differ again."""
    if args.images < 1:
        raise ValueError(f"--images must be positive, got {args.images}")
    program = Networks(DeployArgs(short=args.short, seed=args.seed)).program
    images = load_cifar10("test")[0][: 100 if args.short else None]
    x = np.asarray(cifar10_normalise(images), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet20.tflite"
        jc.export.litert(program, path=path)
        given = outputs(session(path), x)
    once = rounded_once(report, program, np.split(x, range(100, len(x), 100)))
    differ = np.flatnonzero(given.argmax(-1) != once.argmax(-1))
    rows = np.union1d(differ, np.arange(min(args.images, len(x))))
    codes = as_xnnpack(program, program.quantize_input(jnp.asarray(x[rows])))
    emulated = np.asarray(program.dequantize(codes))
    step = float(program.grids[program.output].qparams.scale)

    def equal(known: np.ndarray) -> float:
        return float((np.rint((given[rows] - known) / step) == 0).mean())

    table, explained = [], 0
    for image in differ:
        row = emulated[np.searchsorted(rows, image)]
        explained += int(row.argmax() == given[image].argmax())
        for what, logits in (("LiteRT", given[image]), ("once", once[image]), ("XNNPACK", row)):
            shown = " ".join(f"{code:.0f}" for code in np.rint(logits / step))
            table.append((int(image), what, int(logits.argmax()), shown))
    report.table("Images that differ", ("image", "arithmetic", "class", "codes"), table)
    return {
        "images": len(x),
        "differ": len(differ),
        "explained": explained,
        "codes_equal": equal(once[rows]),
        "codes_equal_xnnpack": equal(emulated),
    }


if __name__ == "__main__":
    run(main, "litert_differences")
