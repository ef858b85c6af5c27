"""How convolutions are lowered; a bias joins them, in integers where input and weight are."""

from collections.abc import Sequence

import numpy as np

from jaxcompress.export.onnx_format.constants.codes import Codes
from jaxcompress.export.onnx_format.constants.stored import Stored
from jaxcompress.export.onnx_format.onnx_elementwise import rule
from jaxcompress.export.onnx_format.onnx_lowering import Lowering, Tensor
from jaxcompress.export.onnx_format.quantized import bias_constant, dequantized
from jaxcompress.export.onnx_format.symbolic_sizes import is_static
from jaxcompress.graph.equations import Equation


@rule("conv_general_dilated")
def _conv(low: Lowering, e: Equation) -> None:
    p = e.eqn.params
    numbers = p["dimension_numbers"]
    if len({low.avals[n].dtype for n in (*e.operands, *e.outputs)}) > 1:
        raise low.refuse(e, "its result has another dtype")
    if p["batch_group_count"] != 1:
        raise low.refuse(e, "groups along the batch are not lowered")
    if not is_static([n for pair in p["padding"] for n in pair]):
        raise low.refuse(e, "its padding depends on the input's shape")
    transposed = any(n != 1 for n in p["lhs_dilation"])
    build = _transposed if transposed else _direct
    op, weight, attributes = build(low, e)
    order = tuple(numbers.lhs_spec)
    grid = None if low.known(e.operands[0]) is not None else low.live(e.operands[0]).grid
    x = low.tensor(e.operands[0], order=order)
    attributes = {**attributes, "group": p["feature_group_count"]}
    _finish(low, e, op, x, weight, attributes, None if grid is None else grid.scale)


def _finish(low, e, op, x, weight, attributes, x_scale) -> None:
    # `weight` is a name, or Codes with the output channels first (of a transposed one: second).
    order = tuple(e.eqn.params["dimension_numbers"].out_spec)
    axis = 0 if op == "Conv" else 1
    name = weight
    if isinstance(weight, Codes):  # products of integers have kernels of 8 bits
        name = dequantized(low, weight, wide=x_scale is not None)

    def emit(bias: np.ndarray | None = None) -> Tensor:
        ends = []
        if bias is not None:
            ends.append(bias_constant(low, bias, x_scale, weight, axis))
        y = low.emit(op, [x.name, name, *ends], **attributes)
        return Tensor(y, order, tuple(low.shape(e.outputs[0])[a] for a in order))

    y = emit()
    low.put(e.outputs[0], y.name, order=order)
    low.biased[e.outputs[0]] = order[1], emit


def _direct(low: Lowering, e: Equation):
    p = e.eqn.params
    pads = _pads(low, e, p["padding"])
    weight = _kernel(low, e, tuple(p["dimension_numbers"].rhs_spec))
    return "Conv", weight, {
        "strides": tuple(p["window_strides"]),
        "dilations": tuple(p["rhs_dilation"]),
        "pads": pads,
    }  # fmt: skip


def _pads(low: Lowering, e: Equation, padding: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    pads = (*(p[0] for p in padding), *(p[1] for p in padding))
    if min(pads, default=0) < 0:
        raise low.refuse(e, f"negative padding {padding}")
    return pads


def _kernel(low: Lowering, e: Equation, order: tuple[int, ...]):
    known = low.known(e.operands[1])
    if isinstance(known, Codes):
        return known.transposed(order)
    return low.name(e.operands[1], order=order)


def _transposed(low: Lowering, e: Equation):
    # A convolution over a dilated input is ConvTranspose with the kernel turned around; with d the
    # kernel's dilation, the pads of the output are d (k - 1) - those of the dilated input.
    p, shape = e.eqn.params, low.shape(e.operands[1])
    spec = p["dimension_numbers"].rhs_spec
    if any(n != 1 for n in p["window_strides"]):
        raise low.refuse(e, "both sides are dilated and strided")
    sizes = [shape[axis] for axis in spec[2:]]
    reach = [d * (k - 1) for d, k in zip(p["rhs_dilation"], sizes, strict=True)]
    starts = [r - lo for r, (lo, _) in zip(reach, p["padding"], strict=True)]
    ends = [r - hi for r, (_, hi) in zip(reach, p["padding"], strict=True)]
    more = tuple(max(-n, 0) for n in ends)
    if min(starts) < 0 or any(m >= s for m, s in zip(more, p["lhs_dilation"], strict=True)):
        raise low.refuse(e, f"padding {p['padding']} beyond the kernel")
    weight = _turned(low, e, spec, p["feature_group_count"])
    return "ConvTranspose", weight, {
        "strides": tuple(p["lhs_dilation"]),
        "dilations": tuple(p["rhs_dilation"]),
        "pads": (*starts, *(max(n, 0) for n in ends)),
        "output_padding": more,
    }  # fmt: skip


def _turned(low: Lowering, e: Equation, spec: tuple[int, ...], groups: int):
    # [groups out, in / groups, *space] -> [groups in, out / groups, *space], space turned around
    known = low.known(e.operands[1])
    if known is None:
        raise low.refuse(e, "the kernel of a transposed convolution depends on the input")
    out, into, *space = spec
    if isinstance(known, Codes) and groups == 1:
        codes = known.transposed((into, out, *space))
        turned = codes.sliced((slice(None),) * 2 + (slice(None, None, -1),) * len(space))
        if turned is not None:
            return turned
    if not isinstance(known, Codes | Stored):
        array = np.flip(np.asanyarray(known).transpose(spec), tuple(range(2, len(spec))))
        parts = [np.swapaxes(part, 0, 1) for part in np.split(array, groups)]
        return low.graph.constant(np.concatenate(parts))
    w = low.tensor(e.operands[1], order=spec)
    count = len(space)
    ends = [low.ints([n] * count) for n in (-1, -(2**31))]
    axes = [low.ints(range(2, len(spec))), low.ints([-1] * count)]
    name = low.emit("Slice", [w.name, *ends, *axes])
    wide, deep, *sizes = w.shape
    name = low.emit("Reshape", [name, low.ints([groups, wide // groups, deep, *sizes])])
    name = low.emit("Transpose", [name], perm=(0, 2, 1, *range(3, 3 + count)))
    return low.emit("Reshape", [name, low.ints([groups * deep, wide // groups, *sizes])])
