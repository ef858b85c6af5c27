"""What ships: quantized and masked arrays as small as they claim, and the way back."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxcompress.core.mask_storage import for_any_mask, smallest_form
from jaxcompress.core.pytrees import host, packed_bytes, pytree
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.core.sparse import Bitmask, Positions
from jaxcompress.formats import (
    Format,
    Granularity,
    Rounding,
    half_even,
    lanes,
    pack_bits,
    row_bytes,
    shipped,
    unpack_bits,
)


@pytree(data=("codes", "qparams"), static=("format", "granularity", "shape", "dtype"))
@dataclass(frozen=True)
class QTensor:
    """A quantized array: packed codes, and the scales that give them a meaning.

    Attributes:
      codes: uint8. [*shape[:-1], shape[-1] * bits / 8] where the last axis fills whole bytes, else
        [ceil(size * bits / 8)], the whole array as one row; in a `Masked` the codes of the kept
        elements only, as one row.
      qparams: the format's arrays, broadcast against `granularity.split` of the array.
      format, granularity, shape, dtype: of the array that `unpack` gives.
    """

    codes: Array
    qparams: Any
    format: Format
    granularity: Granularity
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return 8 * packed_bytes(self) / max(self.size, 1)


@pytree(data=("positions", "values"), static=("shape", "dtype", "nnz"))
@dataclass(frozen=True)
class Masked:
    """A sparse array: where its kept elements lie, and their values.

    Attributes:
      positions: `Bitmask`, `Rows` (CSR) or `Groups` (N:M, constant fan-in).
      values: [nnz] in row-major order, or a `QTensor` that holds the codes of the kept elements.
      shape, dtype: of the array that `unpack` gives.
    """

    positions: Positions
    values: Any
    shape: tuple[int, ...]
    dtype: str
    nnz: int

    @property
    def bitmask(self) -> Array:
        """The mask as one bit per element, uint8 [ceil(size / 8)], however it is stored."""
        if isinstance(self.positions, Bitmask):
            return self.positions.bits
        if isinstance(jax.tree.leaves(self.positions)[0], jax.ShapeDtypeStruct):
            return jax.eval_shape(_bitmask, self.positions)
        return _bitmask(self.positions)

    @property
    def size(self) -> int:
        """Elements of the array, zeros included."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of the elements that are kept."""
        return self.nnz / max(self.size, 1)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, zeros counted as elements; positions and scales included."""
        return 8 * packed_bytes(self) / max(self.size, 1)


def _bitmask(positions: Positions) -> Array:
    return pack_bits(positions.mask().reshape(-1).astype(jnp.uint8), 1)


@pytree(data=("qparams",), static=("format",))
@dataclass(frozen=True)
class Grid:
    """Where an activation's grid lies: a format, and its arrays (one scale per tensor)."""

    qparams: Any
    format: Format

    @property
    def bits(self) -> float:
        """Bits per value."""
        return self.format.bits

    def snap(self, x: Array) -> Array:
        """x on the grid, same dtype, straight-through gradient."""
        return self.format.fake_quant(x, self.qparams)


def is_packed(x: Any) -> bool:
    """Whether x is a packed leaf; pass it as `is_leaf` to see the leaves of a packed tree."""
    return isinstance(x, QTensor | Masked)


def quantize(
    x: Array,
    qparams: Any,
    *,
    format: Format,
    granularity: Granularity,
    rounding: Rounding = half_even,
    key: Array | None = None,
    dtype: Any = None,
) -> QTensor:
    """Packs an array; `unpack` gives `format.fake_quant` of it, bit for bit. Works under `jit`."""
    how = {"format": format, "granularity": granularity, "rounding": rounding}
    packed = _packed_codes(x, qparams, key, **how)
    name = jnp.dtype(dtype or x.dtype).name
    return QTensor(packed, shipped(format, qparams), format, granularity, tuple(x.shape), name)


def codes_shape(shape: tuple[int, ...], bits: float) -> tuple[int, ...]:
    """The shape of the codes, uint8, of an array of this shape."""
    *outer, last = _rows(tuple(shape), bits)
    return (*outer, row_bytes(last, bits))


def _rows(shape: tuple[int, ...], bits: float) -> tuple[int, ...]:
    # Rows of whole bytes keep the shape (and what is sharded stays so), else nothing is wasted.
    return shape if shape and shape[-1] % lanes(bits) == 0 else (math.prod(shape),)


def unsigned_codes(leaf: QTensor) -> Array:
    """The codes of a `QTensor` one by one, below 2**bits, of its shape."""
    *_, count = _rows(leaf.shape, leaf.format.bits)
    return unpack_bits(leaf.codes, leaf.format.bits, count).reshape(leaf.shape)


def _decode(leaf: QTensor, codes: Array) -> Array:
    dtype = jnp.dtype(leaf.dtype)
    return leaf.format.decode(codes, leaf.qparams, where=leaf.granularity, dtype=dtype)


def fake_quantize(
    x: Array,
    qparams: Any,
    *,
    format: Format,
    granularity: Granularity,
    rounding: Rounding = half_even,
    key: Array | None = None,
) -> Array:
    """What `unpack` gives after `quantize`, with the format's straight-through gradient."""
    run = _compiled_fake_quant if is_static(format) else _fake_quant
    return run(x, qparams, key, format=format, granularity=granularity, rounding=rounding)


def is_static(format: Format) -> bool:
    """Whether a format holds no traced number (of bits), so that it can be a static argument."""
    try:
        hash(format)
    except TypeError:
        return False
    return True


def _fake_quant(x, qparams, key, *, format, granularity, rounding):
    return format.fake_quant(x, qparams, where=granularity, rounding=rounding, key=key)


# Compiled also where the caller is not: one program instead of one per operation.
_compiled_fake_quant = jax.jit(_fake_quant, static_argnames=("format", "granularity", "rounding"))


@functools.partial(jax.jit, static_argnames=("format", "granularity", "rounding"))
def _packed_codes(x, qparams, key, *, format, granularity, rounding):
    codes = format.encode(x, qparams, where=granularity, rounding=rounding, key=key)
    return pack_bits(codes.reshape(_rows(x.shape, format.bits)), format.bits)


def kept(leaf: Masked) -> Array:
    """The mask of a `Masked` as bool of its shape."""
    return leaf.positions.mask()


def _spread(values: Array, mask: Array) -> Array:
    # Row-major position of every kept element in the compact row; zeros elsewhere.
    if values.shape[0] == 0:
        return jnp.zeros(mask.shape, values.dtype)
    position = jnp.cumsum(mask.reshape(-1).astype(jnp.int32)) - 1
    spread = values[jnp.clip(position, 0, values.shape[0] - 1)].reshape(mask.shape)
    return jnp.where(mask, spread, jnp.zeros((), values.dtype))


@jax.jit
def _unpack_leaf(leaf: Any) -> Any:
    if isinstance(leaf, QTensor):
        return _decode(leaf, unsigned_codes(leaf))
    if isinstance(leaf, Masked):
        mask, values = kept(leaf), leaf.values
        if isinstance(values, QTensor):
            row = unpack_bits(values.codes, values.format.bits, leaf.nnz)
            values = _decode(values, _spread(row, mask))
            return jnp.where(mask, values, jnp.zeros((), values.dtype))
        return _spread(values, mask)
    return leaf


@on_any_mesh
def unpack(tree: Any) -> Any:
    """The arrays of a packed tree: what `Compressor.apply` gave, bit for bit.

    Works under `jit` and `eval_shape`; leaves that are not packed are returned as they are.
    """
    open = lambda leaf: _unpack_leaf(leaf) if is_packed(leaf) else leaf
    return jax.tree.map(open, tree, is_leaf=is_packed)


def dense(leaf: Any) -> Any:
    """The same leaf with its zeros stored: a `QTensor` with all codes, or an array."""
    if isinstance(leaf, Masked) and isinstance(leaf.values, QTensor):
        values, mask = leaf.values, kept(leaf)
        row = unpack_bits(values.codes, values.format.bits, leaf.nnz)
        zeros = jnp.zeros(leaf.shape, values.dtype)
        # Zero need not have the code 0: in an asymmetric grid it has the zero point's.
        rest = values.format.encode(zeros, values.qparams, where=values.granularity)
        return _with_codes(values, jnp.where(mask, _spread(row, mask), rest))
    return _unpack_leaf(leaf) if isinstance(leaf, Masked) else leaf


def _with_codes(leaf: QTensor, codes: Array) -> QTensor:
    rows = codes.reshape(_rows(leaf.shape, leaf.format.bits))
    return dataclasses.replace(leaf, codes=pack_bits(rows, leaf.format.bits))


def masked_bytes(kept: int | np.ndarray | Array, dense_leaf: Any) -> int:
    """Exact bytes of a `Masked` of an array or `QTensor`, or of their shapes.

    Args:
      kept: the concrete mask; or the number of kept elements, which gives the bytes for a mask
        without structure, an upper bound for all masks that keep so many.
      dense_leaf: what is to be masked.

    >>> masked_bytes(10, jax.ShapeDtypeStruct((8, 4), jnp.float32))  # 4 of mask, 40 of values
    44
    >>> masked_bytes(np.arange(32).reshape(8, 4) % 4 == 0, jax.ShapeDtypeStruct((8, 4), jnp.int8))
    10
    """
    if isinstance(kept, int | np.integer):
        positions = min(packed_bytes(form) for form in for_any_mask(dense_leaf.shape, int(kept)))
        return positions + _values_bytes(int(kept), dense_leaf)
    mask = _host_mask(kept, dense_leaf)
    return packed_bytes(smallest_form(mask)) + _values_bytes(int(mask.sum()), dense_leaf)


def _values_bytes(nnz: int, dense_leaf: Any) -> int:
    if isinstance(dense_leaf, QTensor):
        return row_bytes(nnz, dense_leaf.format.bits) + packed_bytes(dense_leaf.qparams)
    return nnz * jnp.dtype(dense_leaf.dtype).itemsize


def _host_mask(mask: Any, leaf: Any) -> np.ndarray:
    return np.broadcast_to(host(mask).astype(bool), leaf.shape)


def mask_leaf(mask: Array | np.ndarray, leaf: Any) -> Any:
    """Keeps only the elements of an array or dense `QTensor` where `mask` is True.

    Gives a `Masked` with the smallest storage of the positions, or the leaf itself where that is
    not larger. The elements left out must be zero already. How many are kept, and where, decides
    the form, so the mask must be concrete. Of arrays that span processes every process gets the
    same `Masked`, whole: all of them must call this alike.

    Raises:
      TypeError: the mask is traced (`pack` of a pruned leaf was called under `jit`).
    """
    if isinstance(mask, Tracer):
        raise TypeError(
            "pack of a pruned array needs the mask's values, which decide the size; "
            "call it outside jit and eval_shape"
        )
    # How many are kept is known on the host alone; there NumPy does not compile for each count.
    concrete = _host_mask(mask, leaf)
    flat, nnz = concrete.reshape(-1), int(concrete.sum())
    least = _values_bytes(nnz, leaf)
    if least >= packed_bytes(leaf):
        return leaf
    form = smallest_form(concrete)
    if packed_bytes(form) + least >= packed_bytes(leaf):
        return leaf
    if isinstance(leaf, QTensor):
        codes = jnp.asarray(host(unsigned_codes(leaf)).reshape(-1)[flat])
        values = dataclasses.replace(leaf, codes=pack_bits(codes, leaf.format.bits))
    else:
        values = jnp.asarray(host(leaf).reshape(-1)[flat])
    name = jnp.dtype(leaf.dtype).name
    return Masked(form.pack(concrete), values, tuple(leaf.shape), name, nnz)
