"""Question: how far do post-training methods take a CIFAR-10 ResNet below 8 bits?

    python -m experiments.ptq_cifar10 --json

ResNet-20 and -32 with BatchNorm folded, 10,000 test images, weights per output channel at the given
bits, every activation that enters a layer on one asymmetric grid per tensor; all layers alike, the
first and the last one too. 512 training images, drawn by the seed, calibrate; three seeds. Methods:
rtn (ranges from min to max), mse (least squares ranges), gptq (on least squares ranges, inputs of
the float network, two sweeps of coordinate descent), adaround, and gptq_bias (gptq, then bias
correction with the quantized inputs). Activations: min-max ranges at 8 bits, least squares at 4.
About an hour on two CPU cores.
Result: experiments/results/ptq_cifar10.json.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from jaxcompress.quantize import Spec

SETTINGS = ((8, 8), (4, 8), (3, 8), (4, 4))
METHODS = ("rtn", "mse", "gptq", "gptq_bias", "adaround")


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    depths: tuple[int, ...] = (20, 32)
    """Which ResNets."""
    seeds: int = 3
    """Draws of calibration images."""
    calibration_images: int = 512
    """Training images that calibrate."""
    methods: tuple[str, ...] = METHODS
    """Which methods."""
    adaround_steps: int = 2000
    """Steps of Adam for each layer."""


def specs(bits: int, *, clip: bool) -> dict[str, Spec]:
    """All kernels, one scale per output channel."""
    ranges = jc.quantize.mse() if clip else None
    return {".*kernel": Spec(jc.formats.integer(bits), calibrate=ranges)}


class Case:
    """A network with its calibration images; methods by name."""

    def __init__(
        self, fn: Callable, params: Any, data: list[tuple[jax.Array]], *, adaround_steps: int
    ):
        self.fn, self.params, self.data = fn, params, data
        self.adaround_steps = adaround_steps
        self.found: dict[tuple[str, int], Any] = {}

    def grids(self, bits: int, view: Any) -> Any:
        """The grids of the activations."""
        ranges = jc.quantize.mse() if bits < 8 else None
        format = jc.formats.integer(bits, symmetric=False)
        quantizer = jc.quantize.activations(self.fn, format, calibrate=ranges)
        return jc.quantize.calibrate_activations(quantizer, view, self.data)

    def weights(self, method: str, bits: int, grids: Any) -> Any:
        """(params, state) of a method; those without activations are kept."""
        if method == "gptq_bias":
            spec = specs(bits, clip=True)
            quantized = self.weights("gptq", bits, grids)
            return jc.quantize.correct_bias(
                self.fn, self.params, self.data, spec,
                quantized=quantized, inputs="quantized", grids=grids,
            )  # fmt: skip
        if (method, bits) not in self.found:
            self.found[method, bits] = self._weights(method, bits)
        return self.found[method, bits]

    def _weights(self, method: str, bits: int) -> Any:
        args = (self.fn, self.params, self.data)
        if method == "rtn":
            return jc.quantize.round_to_nearest(*args, specs(bits, clip=False))
        spec = specs(bits, clip=True)
        if method == "mse":
            return jc.quantize.round_to_nearest(*args, spec)
        if method == "gptq":
            return jc.quantize.gptq(*args, spec, sweeps=2)
        return jc.quantize.adaround(*args, spec, steps=self.adaround_steps)

    def view(self, method: str, bits: int, grids: Any) -> Any:
        """The quantized weights."""
        recipe = jc.quantize.recipe(specs(bits, clip=method != "rtn"))
        return recipe.apply(*self.weights(method, bits, grids))


def calibration(args: Args, images: np.ndarray, seed: int) -> list[tuple[jax.Array]]:
    """Batches of 128 normalised training images."""
    count = 128 if args.short else args.calibration_images
    rows = np.random.default_rng(seed).choice(len(images), count, replace=False)
    return [(cifar10_normalise(images[rows[i : i + 128]]),) for i in range(0, count, 128)]


def _predict(fn: Callable, params: Any, grids: Any, images: jax.Array) -> jax.Array:
    return fn(grids, params, cifar10_normalise(images))


def network(args: Args, report: Report, depth: int) -> dict[str, list[float]]:
    """Top-1 of one network by variant, a figure for each seed."""
    fn = resnet_cifar.folded_apply_fn(depth)
    variables = resnet_cifar.load_pretrained(depth)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    images, labels = load_cifar10("test")
    if args.short:
        images, labels = images[:200], labels[:200]
    train, _ = load_cifar10("train")
    walked = jax.tree_util.Partial(jc.quantize.with_activations(fn))
    predict = lambda params, grids: jax.tree_util.Partial(_predict, walked, params, grids)
    accuracy = lambda params, grids: top1(predict(params, grids), images, labels)
    found: dict[str, list[float]] = {"float32": [accuracy(params, {})]}
    settings = SETTINGS[-1:] if args.short else SETTINGS
    for seed in range(args.seed, args.seed + (1 if args.short else args.seeds)):
        steps = 20 if args.short else args.adaround_steps
        case = Case(fn, params, calibration(args, train, seed), adaround_steps=steps)
        for weight_bits, activation_bits in settings:
            grids = case.grids(activation_bits, params)
            for method in report.progress(args.methods, f"w{weight_bits}a{activation_bits}"):
                view = case.view(method, weight_bits, grids)
                name = f"{method}_w{weight_bits}a{activation_bits}"
                found.setdefault(name, []).append(accuracy(view, grids))
                report.console.print(f"ResNet-{depth}, seed {seed}, {name}: {found[name][-1]:.2f}")
    return found


def main(args: Args, report: Report) -> dict[str, Any]:
    """All networks, settings and methods."""
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        raise ValueError(f"unknown --methods {sorted(unknown)}; known: {', '.join(METHODS)}")
    figures: dict[str, Any] = {}
    results = {depth: network(args, report, depth) for depth in args.depths}
    for depth, found in results.items():
        prefix = "" if depth == 20 else f"resnet{depth}_"
        for name, values in found.items():
            figures[f"{prefix}{name}_top1_percent"] = float(np.mean(values))
            if len(values) > 1:
                figures[f"{prefix}{name}_std_percent"] = float(np.std(values, ddof=1))
        for w, a in SETTINGS:
            chosen = [np.mean(v) for name, v in found.items() if name.endswith(f"_w{w}a{a}")]
            if chosen:
                figures[f"{prefix}w{w}a{a}_top1_percent"] = float(max(chosen))
        rows = [
            (name, float(np.mean(v)), float(np.min(v)), float(np.max(v)))
            for name, v in found.items()
        ]
        columns = ("variant", "top-1 %, mean", "least", "most")
        report.table(f"ResNet-{depth}, CIFAR-10", columns, rows)
    if args.out is not None:
        draw(args.out / "ptq_cifar10.png", args, results)
    return figures


def draw(path: Any, args: Args, results: dict[int, dict[str, list[float]]]) -> None:
    """Top-1 by setting, a line for each method."""
    with plot(path, columns=len(results), size=(5 * len(results), 4)) as axes:
        for ax, (depth, found) in zip(np.atleast_1d(axes), results.items(), strict=True):
            names = [f"w{w}a{a}" for w, a in SETTINGS]
            for method in args.methods:
                shown = [(n, found[f"{method}_{n}"]) for n in names if f"{method}_{n}" in found]
                means = [float(np.mean(values)) for _, values in shown]
                ax.plot([n for n, _ in shown], means, "o-", label=method)
            ax.axhline(found["float32"][0], color="k", lw=0.8, ls="--", label="float32")
            ax.set(ylim=(60, 95), ylabel="top-1 %", title=f"ResNet-{depth}")
            ax.legend()


if __name__ == "__main__":
    run(main, "ptq_cifar10")
