"""Where the kept elements of a sparse array lie: storages of positions, and which fit a mask.

Every storage is a pytree. `like` gives its form, with shapes and dtypes for arrays, so that the
bytes are known before anything is packed; `pack` fills it with a concrete mask on the host; `mask`
gives the mask back, under `jit` too. Bits for the positions of nnz kept elements of n:

  Bitmask  n
  Rows     index * nnz + pointer * (rows + 1), each of 8, 16 or 32 bits, the fewest that suffice
  Groups   ceil(log2 M) * nnz: N:M, and constant fan-in, where M is the number of inputs
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.pytrees import pytree
from jaxcompress.formats import row_bytes, unpack_bits

WIDEST = 2**16  # group whose places `unpack_bits` can count
_COUNTED = 2**31  # places of a line that `mask` can count


def _packed_shape(count: int, bits: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((row_bytes(count, bits),), jnp.uint8)


def _need_fit(positions: Any, mask: np.ndarray) -> None:
    if not positions.fits(mask):
        raise ValueError(f"a mask of shape {mask.shape} does not have the form {positions.name!r}")


@pytree(data=("bits",), static=("shape",))
@dataclass(frozen=True)
class Bitmask:
    """One bit per element: fits every mask.

    Attributes:
      bits: uint8 [ceil(size / 8)], row-major, lowest bit first.
    """

    bits: Any
    shape: tuple[int, ...]

    name = "bitmask"

    @classmethod
    def like(cls, shape: tuple[int, ...]) -> "Bitmask":
        """The form for an array of this shape."""
        return cls(_packed_shape(math.prod(shape), 1), tuple(shape))

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a concrete mask has this form."""
        return mask.shape == self.shape

    def pack(self, mask: np.ndarray) -> "Bitmask":
        """This form with the positions of a concrete mask."""
        _need_fit(self, mask)
        return replace(self, bits=jnp.asarray(np.packbits(mask.reshape(-1), bitorder="little")))

    def in_order(self, nnz: int) -> bool:
        """Whether the array is what `pack` of a mask with `nnz` kept elements gives.

        On the host, in the time of the array, not of the shape.
        """
        bits = np.asarray(self.bits)
        beyond = -math.prod(self.shape) % 8  # of the last byte
        clean = not bits.size or int(bits[-1]) >> (8 - beyond) == 0
        return clean and int(np.bitwise_count(bits).sum(dtype=np.int64)) == nnz

    def mask(self) -> Array:
        """bool of `shape`: True where an element is kept."""
        bits = unpack_bits(self.bits, 1, math.prod(self.shape))
        return bits.reshape(self.shape).astype(bool)


@pytree(data=("pointers", "indices"), static=("shape", "split"))
@dataclass(frozen=True)
class Rows:
    """Compressed sparse rows (CSR): fits every mask.

    The first `split` axes number the rows, the others the columns; `split` 0 is one row.

    Attributes:
      pointers: [rows + 1], kept elements before each row; the smallest unsigned type.
      indices: [nnz], column of each kept element, row by row; the smallest unsigned type.
    """

    pointers: Any
    indices: Any
    shape: tuple[int, ...]
    split: int

    @classmethod
    def like(cls, shape: tuple[int, ...], nnz: int, *, split: int | None = None) -> "Rows":
        """The form for `nnz` kept elements; by default all axes but the last number the rows."""
        last = max(len(shape) - 1, 0)
        split = last if split is None else split
        if not 0 <= split <= last:
            raise ValueError(f"split must be in [0, {last}] for the shape {shape}, got {split}")
        rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
        pointers = jax.ShapeDtypeStruct((rows + 1,), _unsigned(nnz))
        indices = jax.ShapeDtypeStruct((nnz,), _unsigned(columns - 1))
        return cls(pointers, indices, tuple(shape), split)

    @property
    def name(self) -> str:
        """`csr:split`."""
        return f"csr:{self.split}"

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a concrete mask has this form."""
        return mask.shape == self.shape and int(mask.sum()) == self.indices.shape[0]

    def pack(self, mask: np.ndarray) -> "Rows":
        """This form with the positions of a concrete mask."""
        _need_fit(self, mask)
        view = mask.reshape(self._view)
        pointers = np.concatenate([[0], np.cumsum(view.sum(axis=1))]).astype(self.pointers.dtype)
        indices = np.nonzero(view)[1].astype(self.indices.dtype)
        return replace(self, pointers=jnp.asarray(pointers), indices=jnp.asarray(indices))

    def in_order(self, nnz: int) -> bool:
        """As `Bitmask.in_order`."""
        pointers, indices = (np.asarray(a) for a in (self.pointers, self.indices))
        if int(pointers[0]) or not len(indices) == int(pointers[-1]) == nnz:
            return False
        if (pointers[1:] < pointers[:-1]).any() or self._view[1] >= _COUNTED:
            return False
        if nnz and int(indices.max()) >= self._view[1]:
            return False
        ascending = indices[1:] > indices[:-1]
        begins = pointers[(pointers > 0) & (pointers < nnz)].astype(np.int64)
        ascending[begins - 1] = True  # from one row to the next
        return bool(ascending.all())

    def mask(self) -> Array:
        """bool of `shape`: True where an element is kept."""
        counts = jnp.diff(self.pointers.astype(jnp.int32))
        row = jnp.arange(self._view[0], dtype=jnp.int32)
        row = jnp.repeat(row, counts, total_repeat_length=self.indices.shape[0])
        return _scattered(self._view, row, self.indices.astype(jnp.int32)).reshape(self.shape)

    @property
    def _view(self) -> tuple[int, int]:
        return math.prod(self.shape[: self.split]), math.prod(self.shape[self.split :])


def _unsigned(largest: int) -> Any:
    # NumPy's name for the smallest type that holds the number.
    return np.min_scalar_type(max(largest, 0))


def _scattered(shape: tuple[int, int], row: Array, column: Array) -> Array:
    # Two indices: one flat index of 32 bits ends at 2**31 elements.
    return jnp.zeros(shape, bool).at[row, column].set(True, mode="drop")


@pytree(data=("offsets",), static=("shape", "along", "kept", "group"))
@dataclass(frozen=True)
class Groups:
    """N:M and constant fan-in: of every group of M elements exactly N are kept.

    Groups lie along the axes `along`, taken as one; a last group of r < M keeps ceil(N * r / M).
    Constant fan-in is one group of all inputs: every index of the other axes keeps N of them.

    Attributes:
      offsets: uint8 [ceil(nnz * ceil(log2 M) / 8)], the place in its group of each kept element;
        one line along the axes after the other, lowest bit first.
      kept, group: N and M.
    """

    offsets: Any
    shape: tuple[int, ...]
    along: tuple[int, ...]
    kept: int
    group: int

    @classmethod
    def like(cls, shape: tuple[int, ...], kept: int, group: int, *, along: Any = -1) -> "Groups":
        """The form N:M = `kept`:`group` along one axis or several.

        Raises:
          ValueError: an axis is out of range, or N and M are not 0 <= N <= M, 2 <= M <= 65536.
        """
        axes, last = (along,) if isinstance(along, int) else along, len(shape)
        if not axes or not all(-last <= axis < last for axis in axes):
            raise ValueError(f"axes {axes} are not all of the shape {tuple(shape)}")
        if not (0 <= kept <= group and 2 <= group <= WIDEST):
            raise ValueError(f"N:M needs 0 <= N <= M, 2 <= M <= {WIDEST}, got {kept}:{group}")
        where = tuple(sorted({axis % last for axis in axes}))
        empty = cls(None, tuple(shape), where, kept, group)
        return replace(empty, offsets=_packed_shape(empty._nnz, empty._bits))

    @property
    def name(self) -> str:
        """`groups:N:M:axes`."""
        return f"groups:{self.kept}:{self.group}:{','.join(map(str, self.along))}"

    def fits(self, mask: np.ndarray) -> bool:
        """Whether a concrete mask has this form."""
        if mask.shape != self.shape:
            return False
        lines = mask.transpose(self._order).reshape(self._view)
        full, rest = divmod(self._view[1], self.group)
        whole = lines[:, : full * self.group].reshape(-1, self.group).sum(axis=1)
        ragged = lines[:, full * self.group :].sum(axis=1)
        last = -(-self.kept * rest // self.group)
        return bool((whole == self.kept).all() and (ragged == last).all())

    def pack(self, mask: np.ndarray) -> "Groups":
        """This form with the positions of a concrete mask."""
        _need_fit(self, mask)
        lines = mask.transpose(self._order).reshape(self._view)
        offsets = np.nonzero(lines)[1] % self.group
        # The layout of formats.pack_bits; NumPy compiles nothing for each number of codes.
        octets = offsets.astype("<u2")[:, None].view(np.uint8)
        planes = np.unpackbits(octets, axis=1, count=self._bits, bitorder="little")
        return replace(self, offsets=jnp.asarray(np.packbits(planes, bitorder="little")))

    def in_order(self, nnz: int) -> bool:
        """As `Bitmask.in_order`."""
        if nnz != self._nnz or self._view[1] >= _COUNTED:
            return False
        planes = np.unpackbits(np.asarray(self.offsets), bitorder="little")
        if planes[nnz * self._bits :].any():
            return False
        planes = planes[: nnz * self._bits].reshape(nnz, self._bits)
        offsets = planes @ (np.int32(1) << np.arange(self._bits, dtype=np.int32))
        columns = offsets.reshape(-1, max(len(self._starts), 1)) + self._starts
        ascending = (columns[:, 1:] > columns[:, :-1]).all()
        inside = int(offsets.max(initial=0)) < self.group
        return bool(inside and ascending and int(columns.max(initial=-1)) < self._view[1])

    def columns(self) -> Array:
        """int32 [lines, kept in a line]: the places of the kept elements along `along`."""
        starts = self._starts
        offsets = unpack_bits(self.offsets, self._bits, self._nnz).astype(jnp.int32)
        return offsets.reshape(self._view[0], len(starts)) + starts[None]

    def mask(self) -> Array:
        """bool of `shape`: True where an element is kept."""
        line = jnp.arange(self._view[0], dtype=jnp.int32)[:, None]
        lines = _scattered(self._view, line, self.columns())
        moved = lines.reshape([self.shape[axis] for axis in self._order])
        return moved.transpose(np.argsort(self._order).tolist())

    @property
    def _order(self) -> tuple[int, ...]:
        return *(a for a in range(len(self.shape)) if a not in self.along), *self.along

    @property
    def _view(self) -> tuple[int, int]:
        # Lines, and elements of a line.
        sizes = [self.shape[axis] for axis in self._order]
        lines = len(sizes) - len(self.along)
        return math.prod(sizes[:lines]), math.prod(sizes[lines:])

    @property
    def _bits(self) -> int:
        return (self.group - 1).bit_length()

    @property
    def _nnz(self) -> int:
        return self._view[0] * kept_in_line(self._view[1], self.kept, self.group)

    @property
    def _starts(self) -> np.ndarray:
        # Where the group of each kept element of a line starts; a file may say any length.
        if not self._nnz:
            return np.zeros(0, np.int32)
        full, rest = divmod(self._view[1], self.group)
        counts = [self.kept] * full + [-(-self.kept * rest // self.group)]
        return np.repeat(np.arange(full + 1, dtype=np.int32) * np.int32(self.group), counts)


def kept_in_line(length: int, kept: int, group: int) -> int:
    """Kept elements of a line of N:M groups, the last one ragged: ceil(N * length / M).

    >>> kept_in_line(10, 2, 4)  # 4 + 4 + 2 elements
    5
    """
    return -(-kept * length // group)


Positions = Bitmask | Rows | Groups


def positions_like(name: str, shape: tuple[int, ...], nnz: int) -> Positions:
    """The form with this `name` for an array with `nnz` kept elements.

    Raises:
      ValueError: no such name, or it does not go with the shape.

    >>> positions_like("groups:1:4:0", (8, 3), 6).offsets
    ShapeDtypeStruct(shape=(2,), dtype=uint8)
    """
    match name.split(":"):
        case ["bitmask"]:
            return Bitmask.like(shape)
        case ["csr", split]:
            return Rows.like(shape, nnz, split=int(split))
        case ["groups", kept, group, axes]:
            along = tuple(int(axis) for axis in axes.split(","))
            return Groups.like(shape, int(kept), int(group), along=along)
    raise ValueError(f"unknown storage of positions {name!r}")
