"""What every number format offers, and exact sizes."""

import math
from typing import Any, Protocol, runtime_checkable

from jax import Array

from jaxcompress.formats.bits import row_bytes
from jaxcompress.formats.granularities import Granularity, granularity
from jaxcompress.formats.rounding import Rounding


@runtime_checkable
class Format(Protocol):
    """A grid of numbers and their codes. Frozen and hashable: it is static under `jit`.

    `qparams` are the arrays that place the grid, one entry per block of the blocked view of the
    data (`formats.Granularity`, given as `where`). `decode(encode(x, p), p)` must have the bits
    of `fake_quant(x, p)`. `metadata_bytes(blocks)` are the bytes of the qparams that ship. `group`
    is the number of elements per scale where the caller does not say.

    Two methods are optional: `fit(x, axes=, where=, dtype=)` finds the qparams of a blocked view
    where a range is not what the format needs (means, centroids); `shipped(qparams)` drops what
    only encoding needs.
    """

    @property
    def bits(self) -> float: ...
    @property
    def name(self) -> str: ...
    @property
    def group(self) -> int | None: ...
    @property
    def symmetric(self) -> bool: ...
    def metadata_bytes(self, blocks: int) -> int: ...
    def qparams(self, low: Array, high: Array, *, dtype: Any = ...) -> Any: ...
    def fake_quant(
        self,
        x: Array,
        qparams: Any,
        *,
        where: Granularity = ...,
        rounding: Rounding = ...,
        key: Any = ...,
    ) -> Array: ...
    def encode(
        self,
        x: Array,
        qparams: Any,
        *,
        where: Granularity = ...,
        rounding: Rounding = ...,
        key: Any = ...,
    ) -> Array: ...
    def decode(
        self, codes: Array, qparams: Any, *, where: Granularity = ..., dtype: Any = ...
    ) -> Array: ...


def check_format(format: Any) -> None:
    """Raises TypeError for what is not a format, a name for instance."""
    if not hasattr(format, "fake_quant"):
        raise TypeError(
            f"format must be a format such as formats.integer(8), got {format!r}; "
            "formats.parse gives the format of a name"
        )


def shipped(format: Format, qparams: Any) -> Any:
    """The part of the qparams that decoding needs, and that ships: `format.shipped`, if any."""
    drop = getattr(format, "shipped", None)
    return qparams if drop is None else drop(qparams)


def granularity_for(
    format: Format,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
) -> Granularity:
    """The granularity of the usual arguments; the format's own group where none is given.

    >>> from jaxcompress.formats import mxfp4
    >>> granularity_for(mxfp4(), axis=-1).group
    32
    """
    if group is None and block is None:
        group = format.group
    return granularity(axis, group, block)


def predicted_bytes(
    shape: tuple[int, ...], format: Format, where: Granularity, *, nnz: int | None = None
) -> int:
    """Exact bytes of a packed array, computed, not packed: the codes, and the scales.

    With `nnz` of the codes not zero and a mask: one bit per element, one row of the codes kept,
    and the scales; or the dense form where that is not larger.

    >>> from jaxcompress.formats import granularity, integer
    >>> predicted_bytes((3, 3, 16, 10), integer(4), granularity(-1))  # 720 of codes, 10 scales
    760
    """
    size = math.prod(shape)
    codes = row_bytes(size, format.bits)
    if nnz is not None:
        codes = min(codes, row_bytes(size, 1) + row_bytes(nnz, format.bits))
    return codes + format.metadata_bytes(math.prod(where.scale_shape(shape)))


def bits_per_value(
    format: Format, *, group: int | None = None, shape: tuple[int, ...] | None = None
) -> float:
    """Bits per value, scales and all other metadata included.

    Args:
      group: elements per scale; default the format's own. Without any, one scale is shared by so
        many that it counts nothing.
      shape: of an array, for its exact bits; default: the limit of large arrays, where what is
        stored once per array counts nothing.

    >>> from jaxcompress.formats import integer, mxfp4, nvfp4
    >>> bits_per_value(mxfp4()), bits_per_value(nvfp4()), bits_per_value(integer(4), group=32)
    (4.25, 4.5, 5.0)
    """
    group = group or format.group
    if shape is not None:
        return 8 * predicted_bytes(shape, format, granularity(None, group)) / math.prod(shape)
    if group is None:
        return float(format.bits)
    many = 2**16
    per_block = (format.metadata_bytes(2 * many) - format.metadata_bytes(many)) / many
    return format.bits + 8 * per_block / group
