"""Question: how many bits does a weight take in each format, and how far off is it?

    python -m experiments.formats

Rounds the convolutions and the dense layer of the published ResNet-20 and ResNet-32 (CIFAR-10,
BatchNorm folded) to the nearest number of every format, without data and without training, and
compares the relative squared error ||Q(W) - W||^2 / ||W||^2 with the stored bits per weight, scales
included. `mse` is the same with clipping by least squares. Three minutes on two CPU cores.
Results: experiments/results/formats.json, formats.png.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments.models import resnet_cifar

DEPTHS = (20, 32)
# key of the figures: (name, group); scales per output channel, and per group of it where given
CASES = {
    "int8": ("int8", None),
    "int6": ("int6", None),
    "int5": ("int5", None),
    "int4": ("int4", None),
    "int4_g32": ("int4", 32),
    "uint4_g32": ("uint4", 32),
    "int3": ("int3", None),
    "int3_g32": ("int3", 32),
    "int2": ("int2", None),
    "q1_6": ("q1.6", None),
    "q1_4": ("q1.4", None),
    "pot4": ("pot4", None),
    "apot4": ("apot4", None),
    "ternary": ("ternary", None),
    "ternary_absmean": ("ternary_absmean", None),
    "ternary_ttq": ("ternary_ttq", None),
    "binary": ("binary", None),
    "nf4": ("nf4", None),
    "kmeans4": ("kmeans4", None),
    "kmeans3": ("kmeans3", None),
    "float8_e4m3": ("float8_e4m3", None),
    "float8_e5m2": ("float8_e5m2", None),
    "float6_e2m3": ("float6_e2m3", None),
    "float6_e3m2": ("float6_e3m2", None),
    "float4_e2m1": ("float4_e2m1", None),
    "mxfp8_e4m3": ("mxfp8_e4m3", None),
    "mxfp6_e2m3": ("mxfp6_e2m3", None),
    "mxfp4": ("mxfp4", None),
    "mxint8": ("mxint8", None),
    "nvfp4": ("nvfp4", None),
}
FAMILIES = {
    "integers": r"u?int.*|q.*",
    "floats": r"float.*|pot.*|apot.*",
    "block formats": r"mx.*|nvfp4",
    "codebooks, signs": r"nf4|kmeans.*|ternary.*|binary",
}
PER_TENSOR = ("kmeans4", "kmeans3")  # a table per channel would outweigh the codes


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Only what every experiment takes."""


def kernels(depth: int) -> dict[str, jax.Array]:
    """The weights with two axes and more, by path, BatchNorm folded in."""
    params = resnet_cifar.fold_batch_norm(resnet_cifar.load_pretrained(depth))
    flat = jc.core.leaves_with_paths(params)
    return {path: jnp.asarray(w) for path, w in flat if np.ndim(w) > 1}


def takes_range(format: jc.formats.Format) -> bool:
    """Whether clipping can help: the format has scales, and no rule of its own for them."""
    return bool(format.metadata_bytes(1)) and not hasattr(format, "fit")


def measure(weights: dict[str, jax.Array], quantizer: jc.Compressor) -> tuple[float, float]:
    """Bits per weight, and relative squared error, of all weights together."""
    packed = quantizer.pack(weights, quantizer.init(weights))
    view = jc.unpack(packed)
    square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))
    error = sum(square(view[path] - w) for path, w in weights.items())
    total = sum(square(w) for w in weights.values())
    bits = 8 * jc.packed_bytes(packed) / sum(w.size for w in weights.values())
    return bits, error / total


def main(args: Args, report: Report) -> dict[str, Any]:
    cases = dict(list(CASES.items())[::8]) if args.short else CASES
    networks = {depth: kernels(depth) for depth in (DEPTHS[:1] if args.short else DEPTHS)}
    figures: dict[str, Any] = {}
    rows = []
    for key, (name, group) in report.progress(cases.items(), "formats"):
        format = jc.formats.parse(name)
        axis = None if key in PER_TENSOR else -1
        row: list[Any] = [key]
        for depth, weights in networks.items():
            for rule, calibrate in (("", None), ("_mse", jc.quantize.mse())):
                if rule and not takes_range(format):
                    row.append("")
                    continue
                quantizer = jc.quantize.weights(format, axis=axis, group=group, calibrate=calibrate)
                bits, error = measure(weights, quantizer)
                figures[f"{key}_resnet{depth}_bits_per_weight"] = bits
                figures[f"{key}_resnet{depth}{rule}_error"] = error
                row.append(error)
        rows.append([row[0], figures[f"{key}_resnet20_bits_per_weight"], *row[1:]])
    networks_named = [f"ResNet-{depth}" for depth in networks]
    rows.sort(key=lambda row: -row[1])
    report.table(
        "relative squared error of trained weights",
        ("format", "bits/weight", *(c for name in networks_named for c in (name, "mse"))),
        rows,
    )
    if args.out is not None:
        draw(args.out / "formats.png", figures, list(cases), depths=tuple(networks))
    return figures


def draw(path: Path, figures: dict[str, Any], keys: list[str], *, depths: tuple[int, ...]) -> None:
    """Error against bits per weight of every format."""
    with plot(path, size=(10, 6)) as axes:
        for color, (family, pattern) in enumerate(FAMILIES.items()):
            members = [key for key in keys if re.fullmatch(pattern, key)]
            for depth, fill in zip(depths, ("full", "none"), strict=False):
                bits = [figures[f"{key}_resnet{depth}_bits_per_weight"] for key in members]
                errors = [figures[f"{key}_resnet{depth}_error"] for key in members]
                label = f"{family}, ResNet-{depth}"
                axes.plot(bits, errors, "o", color=f"C{color}", fillstyle=fill, label=label)
            for key in members:
                at = figures[f"{key}_resnet20_bits_per_weight"], figures[f"{key}_resnet20_error"]
                axes.annotate(key, at, xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="bits per weight, scales included", ylabel="relative squared error")
        axes.set_yscale("log")
        axes.legend(fontsize=7, ncols=2)


if __name__ == "__main__":
    run(main, "formats")
