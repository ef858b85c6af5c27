"""Matrix products in integers that are faster than float32 on CPU, for one row as for many.

XLA on CPU has a fast product of int8 matrices, but not for every form: a single row is computed
on a converted copy of the weights, as are unsigned codes, and the layout [in, out] is read against
the grain. Here weights lie as [out, in] and come first in the product, and there are never fewer
than two rows. Nibbles are opened a block of channels at a time, so that what they become stays in
the cache. It pays where float32 weights leave the cache (4096 x 4096: about twice the speed);
1024 x 1024 and less are slower than float32. `experiments/benchmarks/matmul.py` measures it.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.formats import Granularity, integer
from jaxcompress.quantize.matmul.layout import FastMatrix, fast_matrix, halves
from jaxcompress.quantize.ranges.min_max import extremes, known

__all__ = ["FastMatrix", "fast_matmul", "fast_matrix"]

_LEAST_ROWS = 2  # XLA takes one row for a product of a vector, which it does not fuse
_INPUTS = ("float32", "bfloat16", "float16")


def fast_matmul(x: Array, matrix: FastMatrix) -> Array:
    """x @ matrix with each row of x rounded to int8 and the products in integers.

    y = s_x s_w sum(q_x q_w), s_x = max|row| / 127: the grid of `quantize.per_token`, the sum exact
    (int32; with groups, exact in each). A row that holds NaN or Inf gives NaN and leaves the
    others alone. The derivative by x is that of `x @ matrix.dequantize()` (straight-through); the
    matrix has none, and there is no forward-mode derivative.

    Under `vmap` over rows each is padded by itself; give all rows in one call instead.

    Args:
      x: float32, bfloat16 or float16 [..., in].
      matrix: of `fast_matrix`.

    Returns:
      [..., out] of x's dtype.

    Raises:
      TypeError: x or the matrix is of another kind.
      ValueError: the last axis of x does not have the size `in`.

    >>> matrix = fast_matrix(jnp.array([[1.0, -2.0], [0.5, 0.25]]), bits=8)
    >>> print(fast_matmul(jnp.array([1.0, 1.0]), matrix).round(2))
    [ 1.5  -1.75]
    """
    if not isinstance(matrix, FastMatrix):
        raise TypeError(f"fast_matmul(matrix): need a FastMatrix, got {type(matrix).__name__}")
    name = getattr(getattr(x, "dtype", None), "name", type(x).__name__)
    if name not in _INPUTS:
        raise TypeError(f"fast_matmul(x): need an array of {', '.join(_INPUTS)}, got {name}")
    if x.ndim == 0 or x.shape[-1] != matrix.shape[0]:
        raise ValueError(
            f"fast_matmul(x): need shape [..., {matrix.shape[0]}] for a matrix of shape "
            f"{matrix.shape}, got {x.shape}"
        )
    return _matmul(jnp.asarray(x), matrix)


@jax.custom_vjp
def _straight_through(x: Array, matrix: FastMatrix) -> Array:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    codes, scale = _row_codes(rows)
    count = max(rows.shape[0], _LEAST_ROWS)
    padded = jnp.pad(codes, ((0, count - rows.shape[0]), (0, 0)))
    columns = (_product8 if matrix.bits == 8 else _product4)(padded, matrix)
    y = columns[: matrix.shape[1], : rows.shape[0]].T * scale
    return y.astype(x.dtype).reshape(*x.shape[:-1], matrix.shape[1])


def _forward(x: Array, matrix: FastMatrix) -> tuple[Array, FastMatrix]:
    return _straight_through(x, matrix), matrix


def _backward(matrix: FastMatrix, dy: Array) -> tuple[Array, None]:
    numbers = (((dy.ndim - 1,), (1,)), ((), ()))
    dx = lax.dot_general(dy.astype(jnp.float32), matrix.dequantize(), numbers)
    return dx.astype(dy.dtype), None


_straight_through.defvjp(_forward, _backward)
_matmul = jax.jit(_straight_through)


def _row_codes(rows: Array) -> tuple[Array, Array]:
    # int8 [B, in] and float32 [B, 1]; NaN scales where a row is not finite
    format = integer(8)
    found = extremes(rows, axes=(1,))
    ends = (known(end, found) for end in (found.low, found.high))
    qparams = format.qparams(*ends, dtype=rows.dtype)
    codes = format.encode(rows, qparams, where=Granularity(axis=(0,)))
    return lax.bitcast_convert_type(codes, jnp.int8), qparams.scale


def _product8(x: Array, matrix: FastMatrix) -> Array:
    # int8 [B, in] -> float32 [out, B]
    numbers = (((1,), (1,)), ((), ()))
    sums = lax.dot_general(matrix.codes, x, numbers, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * matrix.scale[:, None]


def _product4(x: Array, matrix: FastMatrix) -> Array:
    # int8 [B, in] -> float32 [blocks * rows, B]
    blocks, groups, rows, half = matrix.codes.shape
    x = jnp.pad(x, ((0, 0), (0, groups * 2 * half - x.shape[1])))
    x = x.reshape(-1, groups, 2, half).transpose(2, 1, 0, 3).reshape(2 * groups, -1, half)

    def block(part: tuple[Array, Array]) -> Array:
        codes = halves(part[0]).reshape(2 * groups, rows, half)
        numbers = (((2,), (2,)), ((0,), (0,)))
        sums = lax.dot_general(codes, x, numbers, preferred_element_type=jnp.int32)
        sums = sums.reshape(2, groups, rows, -1).sum(0)
        return (sums.astype(jnp.float32) * part[1][..., None]).sum(0)

    return lax.map(block, (matrix.codes, matrix.scale)).reshape(blocks * rows, -1)
