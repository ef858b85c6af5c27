"""Codes stay codes in files: formats and granularities x what takes the weight, per exporter.

A method packs one weight for each consumer; all of them are one network and one ONNX file, which
ONNX Runtime's default session runs, beside the same network on the unpacked weights in float64. A
cell shows bytes of the weight in the file over packed bytes, as the report says; the size of the
file, which is measured, must be that of its cells (column "file"). LiteRT and StableHLO have no
report of each leaf: there every cell is a file, and shows its size. About two minutes.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcompress as jc
from experiments.situations import Cell, Table

OVERHEAD_BYTES = 3000  # nodes, tables, shapes of a consumer
TOLERANCE = 2e-5  # of the largest output


def _conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def _up(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CONSUMERS: dict[str, tuple[tuple[int, ...], Callable[..., Any], tuple[int, ...] | None]] = {
    # name: shape of the weight, function of weight and input, shape of the input (None: indices)
    "dense": ((80, 96), lambda w, x: x @ w, (3, 80)),
    "ragged": ((40, 96), lambda w, x: x @ w, (3, 40)),
    "heads": ((48, 4, 24), lambda w, x: jnp.einsum("td,dhk->thk", x, w), (3, 48)),
    "heads_out": ((4, 24, 48), lambda w, x: jnp.einsum("thk,hkd->td", x, w), (3, 4, 24)),
    "conv": ((3, 3, 16, 32), lambda w, x: _conv(x, w), (2, 6, 6, 16)),
    "depthwise": ((3, 3, 1, 64), lambda w, x: _conv(x, w, 64), (2, 6, 6, 64)),
    "transposed_conv": ((3, 3, 16, 32), lambda w, x: _up(x, w), (2, 5, 5, 16)),
    "lookup": ((60, 80), lambda w, ids: w[ids], None),
    "tied": ((60, 80), lambda w, ids: w[ids] @ w.T, None),
    "split": ((80, 96), lambda w, x: sum(x @ v for v in jnp.split(w, 3, 1)), (3, 80)),
    "cut_across": ((80, 96), lambda w, x: x[:, :50] @ w[:50] + x[:, :30] @ w[50:], (3, 80)),
    "scan": (
        (3, 48, 48),
        lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, w)[0],
        (3, 48),
    ),
    "vmap": ((3, 48, 32), lambda w, x: jax.vmap(lambda v: x @ v)(w), (4, 48)),
    "gain": ((80, 96), lambda w, x: x @ (w * 0.5), (3, 80)),
}

_integer = jc.formats.integer
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "int8 tensor": (_integer(8), {}),
    "int8 channel": (_integer(8), {"axis": -1}),
    "int8 input channel": (_integer(8), {"axis": -2}),
    "int8 group 16": (_integer(8), {"axis": -1, "group": 16}),
    "uint8 channel": (_integer(8, symmetric=False), {"axis": -1}),
    "int4 tensor": (_integer(4), {}),
    "int4 channel": (_integer(4), {"axis": -1}),
    "int4 group 16": (_integer(4), {"axis": -1, "group": 16}),
    "int4 group 32": (_integer(4), {"axis": -1, "group": 32}),
    "int4 group 24": (_integer(4), {"axis": -1, "group": 24}),
    "int4 along outputs": (_integer(4), {"axis": -2, "group": 16}),
    "uint4 group 32": (_integer(4, symmetric=False), {"axis": -1, "group": 32}),
    "int4 tiles": (_integer(4), {"block": (16, 16)}),
    "int2 channel": (_integer(2), {"axis": -1}),
    "int3 channel": (_integer(3), {"axis": -1}),
    "nf4": (jc.formats.nf4(), {"axis": -1}),
    "codebook": (jc.formats.codebook("five", [-1, -0.3, 0, 0.4, 1]), {"axis": -1}),
    "k-means": (jc.formats.k_means(4), {}),
    "float8": (jc.formats.float8_e4m3(), {"axis": -1}),
    "mxfp4": (jc.formats.mxfp4(), {"axis": -1}),
    "mxint8": (jc.formats.mxint8(), {"axis": -1}),
    "nvfp4": (jc.formats.nvfp4(), {"axis": -1}),
    "ternary": (jc.formats.ternary(), {"axis": -1}),
    "binary": (jc.formats.binary(), {"axis": -1}),
    "fixed point": (jc.formats.fixed_point(2, 5), {}),
    "bfloat16": ("bfloat16", {}),
    "float16": ("float16", {}),
    "half zero, int8": ("masked", {"axis": -1}),
    "half zero, float32": ("sparse", {}),
}


def recipe(method: str) -> Any:
    """The compressor of a method; of bfloat16 and float16 the dtype."""
    form, where = METHODS[method]
    if form in ("bfloat16", "float16"):
        return form
    if form in ("masked", "sparse"):
        pruned = jc.prune.magnitude(0.5)
        weights = jc.quantize.weights(_integer(8), **where)
        return jc.chain(pruned, weights) if form == "masked" else pruned
    return jc.quantize.weights(form, **where)


def packed(weights: Any, method: str) -> Any:
    """A tree of weights as a method packs it."""
    made = recipe(method)
    if isinstance(made, str):
        return jax.tree.map(lambda w: w.astype(made), weights)
    return made.pack(weights, made.init(weights))


def drawn(situations: Sequence[str], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A weight and an input of each."""
    rng = np.random.default_rng(seed)
    weights, inputs = {}, {}
    for name in situations:
        shape, _, x_shape = CONSUMERS[name]
        weights[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
        inputs[name] = (
            jnp.asarray([[0, shape[0] - 1], [3, 3]], jnp.int32)
            if x_shape is None
            else jnp.asarray(rng.normal(size=x_shape), jnp.float32)
        )
    return weights, inputs


def network(params: Any, inputs: Any) -> Any:
    """All consumers beside each other: {name: result}."""
    return {k: CONSUMERS[k][1](w.astype(jnp.float32), inputs[k]) for k, w in params.items()}


def errors(found: Sequence[Any], leaves: Any, inputs: Any) -> dict[str, float]:
    """Of each result, over its largest number, as float64 gives it."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
        weights = {k: np.asarray(w, np.float32) for k, w in jc.unpack(leaves).items()}
        given = {k: wide(np.asarray(x)) for k, x in inputs.items()}
        want = {k: np.asarray(_wide(k)(wide(w), given[k])) for k, w in weights.items()}
    pairs = zip(sorted(leaves), found, strict=True)
    return {k: float(np.abs(y - want[k]).max() / np.abs(want[k]).max()) for k, y in pairs}


@functools.cache
def _wide(situation: str) -> Callable[..., Any]:
    return jax.jit(CONSUMERS[situation][1])


def onnx_cells(
    method: str, situations: Sequence[str], seed: int, folder: Path
) -> tuple[dict[str, Cell], Cell]:
    """One file of these consumers; the cells, and whether they explain the size of the file."""
    weights, inputs = drawn(situations, seed)
    leaves = packed(weights, method)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = jc.export.onnx(
            network, leaves, inputs, path=folder / "f.onnx", shapes=None, verify=False
        )
    apart = errors(_run_plain(report.path, inputs), leaves, inputs)
    least = {k: jc.packed_bytes(leaf) for k, leaf in leaves.items()}
    larger = {row.leaf: row for row in report.larger}
    warned = any("float32 though packed" in str(w.message) for w in said)
    cells = {}
    for name in situations:
        row = larger.get(name)
        text = f"{row.file_bytes / least[name]:.2f}" if row else "1.00"
        text += " in float32" if row and row.why else ""
        right = apart[name] <= TOLERANCE and (warned or not (row and row.why))
        cells[name] = Cell(text if right else f"{text}, error {apart[name]:.1e}", right)
    known = sum(larger[k].file_bytes if k in larger else 1.02 * least[k] for k in least)
    over = report.file_bytes - known - OVERHEAD_BYTES * len(least)
    return cells, Cell(f"{report.file_bytes / sum(least.values()):.2f}", over <= 0)


def _run_plain(path: Path, inputs: Any) -> list[np.ndarray]:
    # In a session as users open it.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    found = onnxruntime.InferenceSession(str(path), options)
    names = [port.name for port in found.get_inputs()]
    given = dict(zip(names, map(np.asarray, jax.tree.leaves(inputs)), strict=True))
    return [np.asarray(y) for y in found.run(None, given)]


OTHERS = {  # name: exporter, method
    "LiteRT, int8 tensor": ("litert", "int8 tensor"),
    "LiteRT, int4 channel": ("litert", "int4 channel"),
    "LiteRT, nf4": ("litert", "nf4"),
    "StableHLO, int4 group 32": ("stablehlo", "int4 group 32"),
    "StableHLO, k-means": ("stablehlo", "k-means"),
    "StableHLO, half zero, int8": ("stablehlo", "half zero, int8"),
}
_OVERHEAD = {"litert": 6000, "stablehlo": 14_000}  # a program has its decoder


def other_cell(name: str, situation: str, seed: int, folder: Path) -> Cell:
    """One consumer in a file of LiteRT or StableHLO."""
    exporter, method = OTHERS[name]
    weights, inputs = drawn([situation], seed)
    leaves = packed(weights, method)
    path = folder / {"litert": "f.tflite", "stablehlo": "f.stablehlo"}[exporter]
    try:
        report = getattr(jc.export, exporter)(
            lambda params, x: network(params, {situation: x}), leaves, inputs[situation],
            path=path, verify=False,
        )  # fmt: skip
    except ValueError as error:  # an error with the leaf's name is no silence
        return Cell("refused", situation in str(error))
    found = jc.export.session(path).run(np.asarray(inputs[situation]))
    apart = errors(found, leaves, inputs)[situation]
    least = jc.packed_bytes(leaves)
    named = getattr(report, "widened", {}).get(situation, "")
    small = report.file_bytes <= 1.02 * least + _OVERHEAD[exporter]
    text = f"{report.file_bytes / least:.2f}" + (f", {named.split(':')[0]}" if named else "")
    right = apart <= TOLERANCE
    return Cell(text if right else f"{text}, error {apart:.1e}", right and (small or bool(named)))


def table(seed: int, progress: Callable[[Any], Any]) -> Table:
    """All formats and granularities x all consumers."""
    cells: dict[str, tuple[Cell, ...]] = {}
    names = tuple(CONSUMERS)
    with tempfile.TemporaryDirectory() as folder:
        for method in progress([*METHODS, *OTHERS]):
            if method in OTHERS:
                row = {k: other_cell(method, k, seed, Path(folder)) for k in names}
                file = Cell("a cell each", True)
            else:
                row, file = onnx_cells(method, names, seed, Path(folder))
            cells[method] = (*(row[k] for k in names), file)
    return Table(
        "Bytes of a weight in a file over packed bytes: codes stay codes, or the report says how "
        "many bytes more they take, and a warning what is float32; numbers as float64",
        (*names, "file"),
        cells,
    )
