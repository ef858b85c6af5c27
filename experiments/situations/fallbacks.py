"""Codes stay codes in ONNX files: formats and granularities x what takes the weight.

Each cell exports one packed weight in one network, runs the file in ONNX Runtime's default
session, and compares with the same network on the unpacked weight in float64. It shows bytes of the
file over packed bytes. About five minutes.
"""

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcompress as jc
from experiments.situations import Cell, Table

OVERHEAD_BYTES = 3000  # nodes, tables, shapes
TOLERANCE = 2e-5  # of the largest output


def _conv(x, w, groups=1):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def _up(x, w):
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _ids(rows):
    return jnp.asarray([[0, rows - 1], [3, 3]], jnp.int32)


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


def packed(w: Any, method: str) -> Any:
    """A weight as a method packs it."""
    form, where = METHODS[method]
    if form in ("bfloat16", "float16"):
        return w.astype(form)
    if form in ("masked", "sparse"):
        recipe = jc.prune.magnitude(0.5)
        if form == "masked":
            recipe = jc.chain(recipe, jc.quantize.weights(_integer(8), **where))
    else:
        recipe = jc.quantize.weights(form, **where)
    return recipe.pack(w, recipe.init(w))


def cell(method: str, situation: str, seed: int, folder: Path) -> Cell:
    """One weight, packed and exported; what the file weighs and computes."""
    import onnxruntime

    shape, fn, x_shape = CONSUMERS[situation]
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if x_shape is None:
        x: Any = _ids(shape[0])
    else:
        x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    leaf = packed(w, method)
    network = lambda p, x: fn(p["w"].astype(jnp.float32), x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = jc.export.onnx(
            network, {"w": leaf}, x, path=folder / "f.onnx", shapes=None, verify=False
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(str(report.path), options)
    (found,) = run.run(None, {run.get_inputs()[0].name: np.asarray(x)})
    want = _reference(situation, jc.unpack(leaf), x)
    error = float(np.abs(found - want).max() / max(np.abs(want).max(), 1e-30))
    least = jc.packed_bytes(leaf)
    ratio = report.file_bytes / least
    small = report.file_bytes <= 1.02 * least + OVERHEAD_BYTES
    named = [row for row in report.larger if row.leaf == "w"]
    lost = f", {named[0].lost_bytes} more" if named else ""
    warned = any("float32 though packed" in str(w.message) for w in said)
    honest = small or bool(named)
    honest &= warned == any(row.why for row in named)
    text = f"{ratio:.2f}{lost}" + (" in float32" if warned else "")
    right = error <= TOLERANCE
    return Cell(text if right else f"{text}, error {error:.1e}", honest and right)


@functools.cache
def _wide(situation: str) -> Callable[..., Any]:
    return jax.jit(CONSUMERS[situation][1])


def _reference(situation: str, w: Any, x: Any) -> np.ndarray:
    # In float64.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = np.asarray(w, np.float32).astype(np.float64)
        x = np.asarray(x)
        x = x.astype(np.float64) if x.dtype == np.float32 else x
        return np.asarray(_wide(situation)(wide, x))


def table(seed: int, progress: Callable[[Any], Any]) -> Table:
    """All formats and granularities x all consumers."""
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in progress(list(METHODS)):
            cells[method] = tuple(cell(method, s, seed, Path(folder)) for s in CONSUMERS)
    return Table(
        "ONNX: bytes of the file over packed bytes; codes stay codes (up to 2 % and "
        f"{OVERHEAD_BYTES} bytes), or the report says how many bytes more; numbers as float64",
        tuple(CONSUMERS),
        cells,
    )
