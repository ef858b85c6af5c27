"""Exporters x convolutions: the file in its runtime beside the definition in NumPy float64.

A convolution scatters: every number of the input, dilated and padded, adds its products with the
kernel to the outputs that it reaches. A file may differ from that by rounding alone, and by how
much is known: floats by K 2^-23 of the sum of absolute products, K its length; integers by half a
step of the input's grid times |w|, half a step of the weight's times |x|, both, and one step of
the result's (a half, and another where the runtime rounds a tie to the other side).

`random_convolution` draws others: strides, dilations, paddings (negative ones too), groups, one to
three axes; `python -m experiments.situations.converters 300` counts what becomes of them in LiteRT.
"""

import collections
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcompress as jc
from experiments.situations import Cell, Table
from jaxcompress.export.sessions import session


class Convolution(NamedTuple):
    """What `lax.conv_general_dilated` takes; inputs [N, *S, C], kernels [*K, C / groups, O]."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1
    batch_groups: int = 1


SITUATIONS = {
    "PyTorch, stride 2, padding (1, 2)": Convolution((1, 1), ((1, 2), (1, 2)), (2, 2), (1, 1)),
    "stride (1, 2), padding 1": Convolution((1, 1), ((1, 1), (1, 1)), (1, 2), (1, 1)),
    "Flax, stride 2, SAME": Convolution((1, 1), ((2, 1), (2, 1)), (2, 2), (1, 1)),
    "stride 2, VALID": Convolution((1, 1), ((2, 2), (2, 2)), (2, 2), (1, 1)),
    "stride 3, cropped": Convolution((1, 1), ((-1, 2), (1, -2)), (3, 3), (1, 1)),
    "grouped, stride 2": Convolution((1, 1), ((1, 2), (1, 2)), (2, 2), (1, 1), groups=2),
    "dilated kernel, stride 2": Convolution((1, 1), ((3, 4), (3, 4)), (2, 2), (2, 2)),
    "both strides": Convolution((2, 1), ((1, 2), (0, 3)), (3, 2), (1, 1)),
    "no dilation, SAME": Convolution((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    "depthwise, stride 2": Convolution((2, 2), ((0, 1), (0, 1)), (1, 1), (1, 1), groups=4),
}


def apply(c: Convolution, params: Any, x: Any) -> Any:
    """The convolution in JAX; params {"w": kernel}."""
    space = "DHW"[3 - len(c.strides) :]
    return lax.conv_general_dilated(
        x, params["w"], c.strides, c.padding, c.input_dilation, c.kernel_dilation,
        (f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=c.groups, batch_group_count=c.batch_groups,
    )  # fmt: skip


def scattered(c: Convolution, x: Any, w: Any) -> np.ndarray:
    """The convolution by its definition, float64; no group of sizes needs the other's code."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    inputs = np.split(x, c.batch_groups) if c.batch_groups > 1 else np.split(x, c.groups, -1)
    kernels = np.split(w, max(c.groups, c.batch_groups), -1)
    return np.concatenate([_one_group(c, *pair) for pair in zip(inputs, kernels, strict=True)], -1)


def _one_group(c: Convolution, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    sizes = [
        ((n - 1) * hole + 1 + low + high - ((k - 1) * dilation + 1)) // stride + 1
        for n, hole, (low, high), k, dilation, stride in zip(
            x.shape[1:-1], c.input_dilation, c.padding, w.shape, c.kernel_dilation, c.strides,
            strict=False,
        )
    ]  # fmt: skip
    y = np.zeros((len(x), *(max(n, 0) for n in sizes), w.shape[-1]))
    for at in np.ndindex(*x.shape[1:-1]):
        for tap in np.ndindex(*w.shape[:-2]):
            place = [
                n * hole + low - k * dilation
                for n, hole, (low, _), k, dilation in zip(
                    at, c.input_dilation, c.padding, tap, c.kernel_dilation, strict=True
                )
            ]
            found = [divmod(p, stride) for p, stride in zip(place, c.strides, strict=True)]
            if all(
                not rest and 0 <= p < n for (p, rest), n in zip(found, y.shape[1:], strict=False)
            ):
                y[(slice(None), *(p for p, _ in found))] += x[(slice(None), *at)] @ w[tap]
    return y


def random_convolution(rng: np.random.Generator) -> tuple[Convolution, np.ndarray, np.ndarray]:
    """A convolution, an input and a kernel."""
    axes = int(rng.choice([1, 2, 2, 2, 2, 3]))
    some = lambda *values: tuple(int(n) for n in rng.choice(values, axes))
    groups, batch_groups = ((1, 1), (1, 1), (1, 1), (2, 1), (0, 1), (1, 2))[rng.integers(6)]
    rows, inputs, outputs = (
        int(rng.integers(1, 3)),
        int(rng.integers(1, 5)),
        int(rng.integers(1, 5)),
    )
    inputs *= max(groups, 1)
    groups = groups or inputs  # 0: depthwise
    c = Convolution(
        some(1, 1, 2, 3), tuple(zip(some(-1, 0, 1, 2, 3), some(-1, 0, 1, 2, 3), strict=True)),
        some(1, 1, 2, 3), some(1, 1, 1, 2), groups, batch_groups,
    )  # fmt: skip
    x = rng.normal(size=(rows * batch_groups, *some(4, 5, 6, 7), inputs)).astype(np.float32)
    shape = (*some(1, 2, 3, 4), inputs // groups, outputs * groups * batch_groups)
    return c, x, rng.normal(size=shape).astype(np.float32)


class Written(NamedTuple):
    """A file, and the steps by which it may differ from the definition."""

    path: Path
    weight: np.ndarray  # its numbers
    weight_step: Any
    input_step: Any
    output_step: float


Export = Callable[[Convolution, np.ndarray, np.ndarray, Path], Written]


def _stored(kind: str, **options: Any) -> Export:
    # Float activations, weights as they are.
    def export(c: Convolution, x: np.ndarray, w: np.ndarray, folder: Path) -> Written:
        suffix = {"litert": "tflite"}.get(kind, kind)
        path = folder / f"a.{suffix}"
        fn = lambda params, x: apply(c, params, x)
        getattr(jc.export, kind)(fn, {"w": jnp.asarray(w)}, jnp.asarray(x), path=path, **options)
        return Written(path, w, 0.0, 0.0, 0.0)

    return export


def _program(kind: str) -> Export:
    def export(c: Convolution, x: np.ndarray, w: np.ndarray, folder: Path) -> Written:
        path = folder / ("a.tflite" if kind == "litert" else f"a.{kind}")
        program = jc.quantize.integer_only(
            lambda params, x: apply(c, params, x), {"w": jnp.asarray(w)}, [jnp.asarray(x)]
        )
        if kind == "litert":
            jc.export.litert(program, jnp.asarray(x), path=path)
        else:
            getattr(jc.export, kind)(program, path=path)
        step = np.max([np.max(s) for s in program.weight_scales if np.size(s)])
        grids = (float(program.grids[i].qparams.scale) for i in (0, program.output))
        return Written(path, w, step, *grids)

    return export


def _dynamic(c: Convolution, x: np.ndarray, w: np.ndarray, folder: Path) -> Written:
    recipe = jc.quantize.weights(jc.formats.integer(8), axis=-1)
    packed = recipe.pack({"w": jnp.asarray(w)}, recipe.init({"w": jnp.asarray(w)}))
    fn = lambda params, x: apply(c, params, x)
    path = folder / "a.tflite"
    jc.export.litert(fn, packed, jnp.asarray(x), path=path, activations="dynamic")
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    return Written(path, np.asarray(jc.unpack(packed)["w"]), 0.0, step, 0.0)


EXPORTERS: dict[str, Export] = {
    "ONNX float": _stored("onnx", shapes=None),
    "ONNX int8": _program("onnx"),
    "LiteRT float": _stored("litert"),
    "LiteRT int8": _program("litert"),
    "LiteRT dynamic": _dynamic,
    "StableHLO": _stored("stablehlo"),
}


def cell(export: Export, c: Convolution, x: np.ndarray, w: np.ndarray) -> Cell:
    """One file beside the definition."""
    with tempfile.TemporaryDirectory() as folder:
        written = export(c, x, w, Path(folder))
        (found,) = session(written.path).run(x)
    want = scattered(c, x, written.weight)
    if found.shape != want.shape:
        return Cell(f"{found.shape} for {want.shape}", False)
    sizes, steps = np.abs(x), np.full_like(x, written.input_step / 2)
    weights, halves = np.abs(written.weight), np.full_like(w, written.weight_step / 2)
    products = scattered(c, sizes, weights)
    bound = scattered(c, steps, weights) + scattered(c, sizes + steps, halves)
    bound += written.output_step + w[..., 0].size * 2.0**-23 * products
    apart = np.abs(found - want)
    return Cell(f"{apart.max() / max(np.abs(want).max(), 1e-30):.1e}", bool((apart <= bound).all()))


def table(seed: int, progress: Callable[[Any], Iterator[Any]]) -> Table:
    """Every exporter on every convolution of `SITUATIONS`."""
    cells = {}
    for name in progress(list(EXPORTERS)):
        rng, row = np.random.default_rng(seed), []
        for c in SITUATIONS.values():
            x = rng.normal(size=(1, 5, 6, 4)).astype(np.float32)
            w = rng.normal(size=(3, 3, 4 // c.groups, 4)).astype(np.float32)
            try:
                row.append(cell(EXPORTERS[name], c, x, w))
            except ValueError:  # an error is no silence
                row.append(Cell("refused", True))
        cells[name] = tuple(row)
    promise = "Error of the largest output: the file in its runtime beside the definition"
    return Table(promise, tuple(SITUATIONS), cells)


def sweep(count: int, seed: int = 0) -> collections.Counter[tuple[str, str]]:
    """(exporter, "right" or "wrong" or "refused") -> how many of `count` random convolutions."""
    tally: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in range(count):
        c, x, w = random_convolution(np.random.default_rng((seed, number)))
        if not scattered(c, x, w).size:
            continue
        for name in ("LiteRT float", "LiteRT int8", "LiteRT dynamic"):
            try:
                held = cell(EXPORTERS[name], c, x, w).holds
                tally[name, "right" if held else "wrong"] += 1
            except ValueError:
                tally[name, "refused"] += 1
    return tally


if __name__ == "__main__":
    for key, number in sorted(sweep(*map(int, sys.argv[1:])).items()):
        print(*key, number)
