"""How products of matrices are lowered: float, with codes, in blocks, in integers as they run."""

import math
from typing import Any

import numpy as np

from jaxcompress.export.onnx_codes import Codes, expanded
from jaxcompress.export.onnx_graph import MICROSOFT
from jaxcompress.export.onnx_lower import Lowering, Tensor
from jaxcompress.export.onnx_quantized import bias_constant, dequantized
from jaxcompress.export.onnx_rules import onnx_kind, rule
from jaxcompress.export.onnx_views import flattened
from jaxcompress.graph.equations import Equation

_FLOAT_KERNEL, _INT8_KERNEL = 1, 4  # accuracy levels of MatMulNBits


@rule("dot_general")
def _dot(low: Lowering, e: Equation) -> None:
    contracted, batch = e.eqn.params["dimension_numbers"]
    known = [low.known(n) is not None for n in e.operands]
    kinds = {low.avals[n].dtype for n in (*e.operands, *e.outputs)}
    if any(known) and not batch[0] and len(kinds) == 1:
        return _linear(low, e, side=1 if known[1] else 0)
    free = [
        [a for a in range(len(low.shape(n))) if a not in (*c, *b)]
        for n, c, b in zip(e.operands, contracted, batch, strict=True)
    ]
    orders = ((*batch[0], *free[0], *contracted[0]), (*batch[1], *contracted[1], *free[1]))
    tensors = [low.tensor(n, order=o) for n, o in zip(e.operands, orders, strict=True)]
    lead, depth = len(batch[0]), len(contracted[0])
    ones = [1] * lead
    left = flattened(low, tensors[0], [*ones, len(free[0]), depth])
    right = flattened(low, tensors[1], [*ones, depth, len(free[1])])
    names = [left.name, right.name]
    if len(kinds) > 1:
        names = [low.emit("Cast", [n], to=onnx_kind(low.avals[e.outputs[0]].dtype)) for n in names]
    name = low.emit("MatMul", names)
    out = low.shape(e.outputs[0])
    shape = (*left.shape[: lead + 1], right.shape[-1])
    low.put(e.outputs[0], low.dims.reshape(name, shape, out))


def _linear(low: Lowering, e: Equation, *, side: int) -> None:
    # x [..., K] times a known matrix [K, N].
    contracted, _ = e.eqn.params["dimension_numbers"]
    w_number, x_number = e.operands[side], e.operands[1 - side]
    weight, x_shape = low.known(w_number), low.shape(x_number)
    w_axes, x_axes = contracted[side], contracted[1 - side]
    free = [a for a in range(len(low.shape(w_number))) if a not in w_axes]
    depth = math.prod(low.shape(w_number)[a] for a in w_axes)
    wide = [low.shape(w_number)[a] for a in free]
    matrix = _matrix(weight, (*w_axes, *free), (depth, math.prod(wide)))
    x_free = [a for a in range(len(x_shape)) if a not in x_axes]
    order = (*x_free, *x_axes)
    rank = len(x_free)
    grid = None if low.known(x_number) is not None else low.live(x_number).grid
    x = low.tensor(x_number, order=order)
    x = flattened(low, x, [*[1] * rank, len(x_axes)])
    # The result has the free axes of the left operand first.
    out = tuple(range(rank, rank + len(free))) if side == 0 else ()
    order = (*range(len(free), len(free) + rank), *range(len(free))) if out else None
    order = order or tuple(range(rank + len(free)))
    sizes = tuple(low.shape(e.outputs[0])[a] for a in order)

    def finish(name: str) -> Tensor:
        before = (*x.shape[:-1], math.prod(wide))
        return Tensor(low.dims.reshape(name, before, sizes), order, sizes)

    def with_bias(bias: np.ndarray) -> Tensor | None:
        if grid is None or not isinstance(matrix, Codes) or rank != 1:
            return None
        w = dequantized(low, matrix, wide=True)
        if w is None:
            return None
        c = bias_constant(low, bias, grid.scale, matrix, 1)
        return finish(low.emit("Gemm", [x.name, w, c]))

    y = finish(product(low, x, matrix, quantized=grid is not None))
    low.put(e.outputs[0], y.name, order=order, shape=sizes)
    if len(free) == 1:
        low.biased[e.outputs[0]] = order[-1], with_bias


def _matrix(weight: Any, order: tuple[int, ...], shape: tuple[int, int]) -> Any:
    if isinstance(weight, Codes):
        found = weight.transposed(order).reshaped(shape)
        if found is not None:
            return found
        weight = weight.array()
    return np.ascontiguousarray(np.asarray(weight).transpose(order).reshape(shape))


def product(low: Lowering, x: Tensor, matrix: Any, *, quantized: bool) -> str:
    """x [..., K] @ matrix [K, N], in the way that its codes allow."""
    if not isinstance(matrix, Codes):
        return low.emit("MatMul", [x.name, low.graph.constant(matrix)])
    if not quantized:
        if (size := block_size(matrix)) is not None:
            return _in_blocks(low, x, matrix, size)
        if low.settings.dynamic and matrix.symmetric and matrix.blocks(0) == 1:
            return _in_integers(low, x, matrix)
    weight = dequantized(low, matrix, wide=quantized)
    if weight is None:
        weight = low.graph.constant(matrix.array())
    return low.emit("MatMul", [x.name, weight])


def _in_integers(low: Lowering, x: Tensor, matrix: Codes) -> str:
    # y = S_x S_w sum_k (q_x - z_x) q_w, S_x and z_x of this tensor
    quantized, scale, zero = low.emit("DynamicQuantizeLinear", [x.name], outputs=3)
    codes = low.graph.constant(matrix.codes)
    zeros = low.graph.constant(np.zeros((), np.int8), of=codes)
    sums = low.emit("MatMulInteger", [quantized, codes, zero, zeros])
    shape = (-1,) if matrix.scale.size > 1 else ()
    steps = low.graph.constant(matrix.scale.reshape(shape))
    factor = low.emit("Mul", [scale, steps])
    return low.emit("Mul", [low.emit("Cast", [sums], to=1), factor])


def block_size(matrix: Codes) -> int | None:
    """The size of the blocks of `MatMulNBits` along K, None where it does not take the matrix.

    Matrices of 4 bits and fewer with one scale per column are cut into the largest blocks that fit.
    """
    depth, blocks = matrix.shape[0], matrix.blocks(0)
    if matrix.bits > 4 and not (matrix.bits == 8 and blocks > 1):
        return None
    size = depth // blocks
    if blocks == 1:
        size = min(size & -size, 256)
    return size if size >= 16 and size & (size - 1) == 0 and size <= 256 else None


def _in_blocks(low: Lowering, x: Tensor, matrix: Codes, size: int) -> str:
    (depth, width), bits = matrix.shape, 4 if matrix.bits <= 4 else 8
    blocks, half = depth // size, 2 ** (bits - 1)
    codes = (matrix.codes.astype(np.int32) + half).astype(np.uint8)
    scale, zero = (
        np.broadcast_to(expanded(a, (blocks, width)), (blocks, width)).T
        for a in (matrix.scale, matrix.zero)
    )
    rows = (
        nibbles(codes.T.reshape(width, blocks, size))
        if bits == 4
        else codes.T.reshape(width, blocks, size)
    )
    inputs = [x.name, low.graph.constant(rows), low.graph.constant(np.ascontiguousarray(scale))]
    if not matrix.symmetric:
        points = (zero + half).astype(np.uint8)
        inputs.append(low.graph.constant(nibbles(points) if bits == 4 else points))
    return low.emit(
        "MatMulNBits", inputs, domain=MICROSOFT, K=depth, N=width, bits=bits, block_size=size,
        accuracy_level=_INT8_KERNEL if low.settings.dynamic else _FLOAT_KERNEL,
    )  # fmt: skip


def nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 below 16 [..., n], two in a byte, the first in its low half; a last one alone."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << 4
