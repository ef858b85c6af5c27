"""Quantized matrices as `fast_matmul` takes them."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxcompress.core.packed import QTensor, unsigned_codes
from jaxcompress.core.pytrees import packed_bytes, pytree
from jaxcompress.formats import integer
from jaxcompress.formats.bits import signed
from jaxcompress.formats.integers import Integer
from jaxcompress.quantize.fake_quantized_weights import weights

_BLOCK_BYTES = 2**21  # of opened nibbles: what two cores keep in their second level of cache
_LONGEST = (2**31 - 1) // (127 * 128)  # products of int8 that int32 holds


@pytree(data=("codes", "scale"), static=("bits", "shape"))
@dataclass(frozen=True)
class FastMatrix:
    """A quantized matrix [in, out] in the layout of `fast_matmul`; make it with `fast_matrix`.

    Attributes:
      codes: bits 8: int8 [out, in]. bits 4: uint8 [blocks, groups, rows, group / 2]; the channels
        in blocks of `rows`, the last padded with zeros; a byte holds in its low half a code of the
        first half of the group, in its high half one of the second. Without groups all of `in` is
        one, padded to an even size.
      scale: float32. bits 8: [out]. bits 4: [blocks, groups, rows].
      bits: 8 or 4.
      shape: (in, out).
    """

    codes: Array
    scale: Array
    bits: int
    shape: tuple[int, int]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales and padding included."""
        return 8 * packed_bytes(self) / math.prod(self.shape)

    def dequantize(self) -> Array:
        """The matrix as float32 [in, out]: codes times scales."""
        if self.bits == 8:
            return (self.codes.astype(jnp.float32) * self.scale[:, None]).T
        blocks, groups, rows, half = self.codes.shape
        codes = jnp.moveaxis(halves(self.codes), 0, -2).reshape(blocks, groups, rows, 2 * half)
        wide = codes.astype(jnp.float32) * self.scale[..., None]
        columns = jnp.moveaxis(wide, 1, 2).reshape(blocks * rows, groups * 2 * half)
        return columns[: self.shape[1], : self.shape[0]].T


def fast_matrix(leaf: Any, *, bits: int | None = None, group: int | None = None) -> FastMatrix:
    """The matrix as `fast_matmul` takes it. Works under `jit`.

    Args:
      leaf: a `QTensor` [in, out] of `formats.integer(8)` or `integer(4)`, symmetric, one scale per
        output channel (axis -1), at 4 bits also per group along `in`; codes and scales stay as
        they are. Or a float array [in, out], rounded to nearest here.
      bits: 8 or 4, of a float array.
      group: elements per scale along `in`, of a float array at 4 bits; even, divides `in`. A
        product per group: of 512 they cost little; below 128, and for a hundred rows at 128 too,
        they are slower than float32.

    Raises:
      TypeError: another kind of leaf, or bits beside a QTensor.
      ValueError: another format, granularity, shape or number of bits; `in` above 132,104, where
        int32 may overflow; a float array that holds NaN or Inf.

    >>> matrix = fast_matrix(jnp.array([[1.0, -2.0], [0.5, 0.25]]), bits=8)
    >>> print(matrix.codes)
    [[ 127   64]
     [-127   16]]
    """
    if isinstance(leaf, QTensor):
        if bits is not None or group is not None:
            raise TypeError("bits and group are for float arrays: a QTensor has its own")
    else:
        leaf = _rounded(leaf, bits, group)
    _check(leaf)
    width, out = leaf.shape
    where, stored_bits = leaf.granularity, 8 if leaf.format.bits == 8 else 4
    codes = signed(unsigned_codes(leaf), stored_bits).astype(jnp.int8).T
    if stored_bits == 8:
        return FastMatrix(codes, leaf.qparams.scale.reshape(out), 8, (width, out))
    scale = leaf.qparams.scale.reshape(width // (where.group or width), out)
    return FastMatrix(*_in_blocks(codes, scale), 4, (width, out))


def _rounded(w: Any, bits: int | None, group: int | None) -> QTensor:
    if not hasattr(w, "ndim") or not jnp.issubdtype(w.dtype, jnp.floating):
        kind = f"{type(w).__name__} of {w.dtype}" if hasattr(w, "dtype") else type(w).__name__
        raise TypeError(
            f"fast_matrix(leaf): need a QTensor or a float array, got {kind}; "
            "of a Masked, give core.packed.dense of it"
        )
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"fast_matrix(bits): a float array needs bits 8 or 4, got {bits!r}")
    if w.ndim != 2 or w.size == 0:
        raise ValueError(f"fast_matrix(leaf): need a matrix [in, out], got shape {w.shape}")
    quantizer = weights(integer(bits), axis=-1, group=group)
    w = jnp.asarray(w)
    return quantizer.pack(w, quantizer.init(w))


def _check(leaf: QTensor) -> None:
    format, where, shape = leaf.format, leaf.granularity, leaf.shape
    if not isinstance(format, Integer) or not format.symmetric or format.bits not in (4, 8):
        name = getattr(format, "name", format)
        raise ValueError(f"fast_matrix(leaf): need the format int8 or int4, got {name}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"fast_matrix(leaf): need a matrix [in, out], got shape {shape}")
    if where.block is not None or where.channels(shape) != (1,):
        raise ValueError(
            "fast_matrix(leaf): need one scale per output channel (axis=-1 of [in, out]), got "
            f"{where}"
        )
    group = where.group
    if group is not None and (format.bits == 8 or group % 2 or shape[0] % group):
        raise ValueError(
            "fast_matrix(leaf): groups must be of an even size that divides `in`, and of 4 bits; "
            f"got group {group}, shape {shape}, {format.bits} bits"
        )
    if shape[0] > _LONGEST:
        raise ValueError(
            f"fast_matrix(leaf): int32 may overflow with more than {_LONGEST} inputs, got {shape}"
        )


def _in_blocks(codes: Array, scale: Array) -> tuple[Array, Array]:
    # int8 [out, in] and float32 [groups, out] in the layout of 4 bits; see `FastMatrix`.
    groups, (out, width) = scale.shape[0], codes.shape
    group = -(-width // (2 * groups)) * 2
    blocks = -(-out * groups * group // _BLOCK_BYTES)
    rows = -(-out // blocks)
    codes = jnp.pad(codes, ((0, blocks * rows - out), (0, groups * group - width)))
    halves = codes.reshape(blocks, rows, groups, 2, group // 2)
    low, high = (jnp.moveaxis(halves[..., k, :], 1, 2) for k in (0, 1))
    packed = lax.bitcast_convert_type((high << jnp.int8(4)) | (low & jnp.int8(15)), jnp.uint8)
    scale = jnp.pad(scale, ((0, 0), (0, blocks * rows - out)))
    return packed, jnp.moveaxis(scale.reshape(groups, blocks, rows), 0, 1)


def halves(packed: Array) -> Array:
    # uint8 [...] -> int8 [2, ...]: the codes in the low halves of the bytes, and in the high ones
    wide = lax.bitcast_convert_type(packed, jnp.int8)
    up = jnp.array([4, 0], jnp.int8).reshape(2, *(1,) * wide.ndim)
    shape = (2, *wide.shape)
    # Two shifts bring the sign along; XLA computes both halves in one vectorized pass.
    return (jnp.broadcast_to(wide, shape) << jnp.broadcast_to(up, shape)) >> jnp.int8(4)
