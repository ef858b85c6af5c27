"""Grids in ONNX: marks become QuantizeLinear, codes of weights DequantizeLinear."""

from typing import Any

import numpy as np

from jaxcompress.export.onnx_format.constants.codes import Codes
from jaxcompress.export.onnx_format.onnx_elementwise import rule
from jaxcompress.export.onnx_format.onnx_lowering import LiveGrid, Lowering
from jaxcompress.graph import compat
from jaxcompress.graph.equations import Equation

_BLOCKED_OPSET = 21  # DequantizeLinear in blocks, and int4


@rule("composite")
def _mark(low: Lowering, e: Equation) -> None:
    _, attributes = compat.composite(e.eqn)
    x_number = e.operands[-1]  # before it what the mark closes over
    scale = np.asarray(attributes["scale"], np.float32)
    if scale.size == 0:
        return _while_it_runs(low, e)
    if scale.size > 1:
        raise low.refuse(e, "activations must have one scale")
    if attributes["dtype"] != "i8":
        raise low.refuse(e, "activations are stored in 8 bits")
    dtype = low.settings.activations
    offset = 128 if dtype == "uint8" else 0
    zero = int(np.asarray(attributes["zero_point"]).reshape(())) + offset
    grid = LiveGrid(np.float32(scale.item()), zero, dtype)
    if low.live(x_number).grid == grid:  # a view of what lies on this grid
        return low.alias(e.outputs[0], x_number)
    x_number, low_code, high_code = _unclamped(low, x_number, grid)
    low_code = max(low_code, -128 + offset + attributes["narrow_range"])
    order = low.live(x_number).order
    x = low.tensor(x_number, order=order, loose=True)
    name = low.emit("QuantizeLinear", [x.name, *low.grid_constants(grid)])
    name = _clipped(low, name, low_code, high_code, dtype)
    low.put(e.outputs[0], name, order=order, shape=x.shape, grid=grid)


def _unclamped(low: Lowering, number: int, grid: LiveGrid) -> tuple[int, int, int]:
    # What a value was before it was clamped, and the codes of the bounds. Rounding keeps order, so
    # that codes may be clamped instead: then nothing stands between a product and its grid.
    bounds = (-np.inf, np.inf)
    while number in low.clamped and low.uses[number] == 1:
        if low.known(low.clamped[number][0]) is not None:
            break
        number, *inner = low.clamped[number]
        low_end, high_end = bounds
        bounds = tuple(min(max(end, low_end), high_end) for end in inner)
    ends = np.iinfo(grid.dtype)
    codes = np.rint(np.asarray(bounds, np.float32) / grid.scale) + grid.zero
    first, last = (int(code) for code in np.clip(codes, ends.min, ends.max))
    return number, first, last


def _clipped(low: Lowering, name: str, first: int, last: int, dtype: str) -> str:
    ends = np.iinfo(dtype)
    if first <= ends.min and last >= ends.max:
        return name
    bounds = [low.graph.constant(np.asarray(code, dtype)) for code in (first, last)]
    return low.emit("Clip", [name, *bounds])


def _while_it_runs(low: Lowering, e: Equation) -> None:
    x_number = e.operands[-1]
    order = low.live(x_number).order
    x = low.tensor(x_number, order=order, loose=True)
    quantized = low.emit("DynamicQuantizeLinear", [x.name], outputs=3)
    name = low.emit("DequantizeLinear", list(quantized))
    low.put(e.outputs[0], name, order=order, shape=x.shape)


def stored(low: Lowering, codes: Codes, *, wide: bool = False) -> tuple[str, str]:
    """Codes as a constant, and how the zero points beside them must be stored.

    Four bits and fewer lie two in a byte, unless `wide`.
    """
    packed = codes.bits <= 4 and not wide
    if packed:
        low.graph.opset = max(low.graph.opset, _BLOCKED_OPSET)
    kind = "int4" if packed else ""
    return low.graph.constant(codes.codes, stored=kind, leaves=codes.leaves), kind


def dequantized(low: Lowering, codes: Codes, *, wide: bool = False) -> str:
    """The numbers of codes as a tensor: by one operator if there is one that has such blocks."""
    split = [a for a, n in enumerate(codes.scale.shape) if n > 1]
    blocked = [a for a in split if codes.blocks(a) < codes.shape[a]]
    if len(blocked) > 1 or (len(split) > 1 and not blocked) or any(map(codes.ragged, blocked)):
        return codes.emit(low.graph)
    scale, zero = codes.scale, codes.zero
    attributes: dict[str, Any] = {}
    if blocked:
        axis = blocked[0]
        low.graph.opset = max(low.graph.opset, _BLOCKED_OPSET)
        attributes = {"axis": axis, "block_size": codes.block[axis]}
        full = tuple(codes.blocks(a) if a == axis else n for a, n in enumerate(codes.shape))
        scale, zero = (np.broadcast_to(a, full) for a in (scale, zero))
    elif split:
        attributes = {"axis": split[0]}
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    name, kind = stored(low, codes, wide=wide)
    scales = low.graph.constant(scale, leaves=codes.leaves)
    zeros = low.graph.constant(np.asarray(zero, np.int8), stored=kind, of=name)
    return low.emit("DequantizeLinear", [name, scales, zeros], **attributes)


def bias_constant(low: Lowering, bias: np.ndarray, x_scale: Any, weight: Any, axis: int) -> str:
    """A bias [channels], in steps of S_x S_w where input and weight are integers."""
    plain = np.asarray(bias, np.float32)
    if x_scale is None or not isinstance(weight, Codes) or not weight.symmetric:
        return low.graph.constant(plain)
    if any(n > 1 for a, n in enumerate(weight.scale.shape) if a != axis):
        return low.graph.constant(plain)
    # As the runtime computes it, in float32.
    step = np.float32(x_scale) * weight.scale.reshape(-1)
    codes = np.rint(np.asarray(bias, np.float64) / step)
    if np.abs(codes).max(initial=0) >= 2**31:
        return low.graph.constant(plain)
    attributes = {"axis": 0} if step.size > 1 else {}
    scale = step if step.size > 1 else step.reshape(())
    name, scales = (low.graph.constant(a) for a in (codes.astype(np.int32), scale))
    return low.emit("DequantizeLinear", [name, scales], **attributes)
