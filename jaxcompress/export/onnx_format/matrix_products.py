"""How products of matrices are lowered: float, with codes, in blocks, in integers as they run."""

import math
from typing import Any

import numpy as np

from jaxcompress.export.onnx_format.constants.codes import Codes
from jaxcompress.export.onnx_format.constants.stored import Stored, blockwise
from jaxcompress.export.onnx_format.onnx_elementwise import onnx_kind, rule
from jaxcompress.export.onnx_format.onnx_graph import MICROSOFT
from jaxcompress.export.onnx_format.onnx_lowering import Lowering, Tensor
from jaxcompress.export.onnx_format.onnx_moves import flattened
from jaxcompress.export.onnx_format.quantized import bias_constant, dequantized
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
    x_shape = low.shape(x_number)
    w_axes, x_axes = contracted[side], contracted[1 - side]
    free = [a for a in range(len(low.shape(w_number))) if a not in w_axes]
    depth = math.prod(low.shape(w_number)[a] for a in w_axes)
    wide = [low.shape(w_number)[a] for a in free]
    matrix = _matrix(low, w_number, (*w_axes, *free), (depth, math.prod(wide)))
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
        c = bias_constant(low, bias, grid.scale, matrix, 1)
        return finish(low.emit("Gemm", [x.name, w, c]))

    y = finish(product(low, x, matrix, quantized=grid is not None))
    low.put(e.outputs[0], y.name, order=order, shape=sizes)
    if len(free) == 1:
        low.biased[e.outputs[0]] = order[-1], with_bias


def _matrix(low: Lowering, number: int, order: tuple[int, ...], shape: tuple[int, int]) -> Any:
    # `Codes` [K, N], an array, or the tensor of what the file makes.
    weight = low.known(number)
    if isinstance(weight, Codes):
        found = weight.transposed(order).reshaped(shape)
        if found is not None:
            return found
    if isinstance(weight, Codes | Stored):
        tensor = low.tensor(number, order=order)
        return tensor._replace(name=low.dims.reshape(tensor.name, tensor.shape, shape))
    # `copy` keeps the name of the leaf, `ascontiguousarray` would not.
    return np.asanyarray(weight).transpose(order).reshape(shape).copy()


def product(low: Lowering, x: Tensor, matrix: Any, *, quantized: bool) -> str:
    """x [..., K] @ matrix [K, N], in the way that its codes allow.

    Float products of codes are `MatMulNBits` with float activations: DequantizeLinear before MatMul
    says the same, but ONNX Runtime joins these to a kernel that rounds activations to 8 bits.
    """
    if isinstance(matrix, Tensor):
        return low.emit("MatMul", [x.name, matrix.name])
    if not isinstance(matrix, Codes):
        return low.emit("MatMul", [x.name, low.graph.constant(matrix)])
    if quantized:
        return low.emit("MatMul", [x.name, dequantized(low, matrix, wide=True)])
    if low.settings.dynamic and matrix.symmetric and matrix.blocks(0) == 1 and matrix.bits > 4:
        return _in_integers(low, x, matrix)
    if low.settings.standard:
        return low.emit("MatMul", [x.name, dequantized(low, matrix)])
    if matrix.block[0] == 1 and matrix.blocks(1) == 1 and matrix.symmetric:
        # Scales of the inputs: x (s q) = (x s) q.
        scale = low.graph.constant(matrix.scale.reshape(-1), leaves=matrix.leaves)
        x = x._replace(name=low.emit("Mul", [x.name, scale]))
        matrix = matrix._replace(
            scale=np.ones((1, 1), np.float32), zero=matrix.zero[:1], block=matrix.shape
        )
    size = block_size(matrix)
    if size is None:
        return low.emit("MatMul", [x.name, matrix.emit(low.graph)])
    return _in_blocks(low, x, matrix, size)


def _in_integers(low: Lowering, x: Tensor, matrix: Codes) -> str:
    # y = S_x S_w sum_k (q_x - z_x) q_w, S_x and z_x of this tensor
    quantized, scale, zero = low.emit("DynamicQuantizeLinear", [x.name], outputs=3)
    codes = low.graph.constant(matrix.codes, leaves=matrix.leaves)
    zeros = low.graph.constant(np.zeros((), np.int8), of=codes)
    sums = low.emit("MatMulInteger", [quantized, codes, zero, zeros])
    shape = (-1,) if matrix.scale.size > 1 else ()
    steps = low.graph.constant(matrix.scale.reshape(shape))
    factor = low.emit("Mul", [scale, steps])
    return low.emit("Mul", [low.emit("Cast", [sums], to=1), factor])


def block_size(matrix: Codes) -> int | None:
    """The size of the blocks of `MatMulNBits` along K, None where it does not take the matrix.

    The one that pads least, of those that are no coarser than the matrix's own blocks.
    """
    depth, own = matrix.shape[0], matrix.block[0]
    sizes = [s for s in (256, 128, 64, 32, 16) if matrix.blocks(0) == 1 or own % s == 0]
    return min(sizes, key=lambda s: -(-depth // s) * s, default=None)


def _bits(matrix: Codes) -> int:
    return 2 if matrix.bits <= 2 else 4 if matrix.bits <= 4 else 8


def _in_blocks(low: Lowering, x: Tensor, matrix: Codes, size: int) -> str:
    (depth, width), bits = matrix.shape, _bits(matrix)
    blocks, half = -(-depth // size), 2 ** (bits - 1)
    padded = np.full((blocks * size, width), half, np.uint8)
    padded[:depth] = matrix.codes.astype(np.int32) + half
    rows = joined_codes(padded.T.reshape(width, blocks, size), bits)
    constant = lambda a: low.graph.constant(a, leaves=matrix.leaves)
    # One scale for each of these blocks, repeated when the file is loaded.
    sizes = (matrix.block[1], -(-matrix.block[0] // size))
    scale = constant(np.ascontiguousarray(matrix.scale.T))
    scale = blockwise(low.graph, scale, matrix.scale.T.shape, sizes, (width, blocks))
    inputs = [x.name, constant(rows), scale]
    if not matrix.symmetric:
        where = np.arange(blocks) * size // matrix.block[0]
        zero = matrix.opened(1).zero[where]
        zero = np.broadcast_to(zero, (blocks, width)).T + half
        inputs.append(constant(joined_codes(zero.astype(np.uint8), bits)))
    return low.emit(
        "MatMulNBits", inputs, domain=MICROSOFT, K=depth, N=width, bits=bits, block_size=size,
        accuracy_level=_INT8_KERNEL if low.settings.dynamic else _FLOAT_KERNEL,
    )  # fmt: skip


def joined_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes below 2**bits [..., n], as many in a byte as fit, the first in its low bits."""
    each = 8 // bits
    if missing := -codes.shape[-1] % each:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    parts = [codes[..., k::each] << np.uint8(bits * k) for k in range(each)]
    return np.bitwise_or.reduce(parts) if each > 1 else codes
