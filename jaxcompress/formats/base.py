"""What every number format offers, exact sizes, and formats by name."""

import math
import re
from typing import Any, Protocol, runtime_checkable

from jax import Array

from jaxcompress.formats.bits import row_bytes
from jaxcompress.formats.fixed_point import fixed_point
from jaxcompress.formats.granularity import Granularity
from jaxcompress.formats.integer import integer


@runtime_checkable
class Format(Protocol):
    """A grid of numbers and their codes. Frozen and hashable: it is static under `jit`.

    `qparams` are the arrays that place the grid, one entry per block, broadcast against the
    blocked view of the data (`formats.Granularity`). `decode(encode(x, p), p)` must have the bits
    of `fake_quant(x, p)`.
    """

    @property
    def bits(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def scale_bytes(self) -> int: ...
    def qparams(self, low: Array, high: Array, *, dtype: Any = ...) -> Any: ...
    def fake_quant(self, x: Array, qparams: Any) -> Array: ...
    def encode(self, x: Array, qparams: Any) -> Array: ...
    def decode(self, codes: Array, qparams: Any, *, dtype: Any = ...) -> Array: ...


def check_format(format: Any) -> None:
    """Raises TypeError for what is not a format, a name for instance."""
    if not hasattr(format, "fake_quant"):
        raise TypeError(
            f"format must be a format such as formats.integer(8), got {format!r}; "
            "formats.parse gives the format of a name"
        )


def predicted_bytes(
    shape: tuple[int, ...], format: Format, where: Granularity, *, nnz: int | None = None
) -> int:
    """Exact bytes of a packed array, computed, not packed: rows of codes, and the scales.

    With `nnz` of the codes not zero and a mask: one bit per element, one row of the codes kept,
    and the scales; or the dense form where that is not larger.

    >>> from jaxcompress.formats import granularity
    >>> predicted_bytes((3, 3, 16, 10), integer(4), granularity(-1))  # 144 rows of 5, 10 scales
    760
    """
    rows, last = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    scales = math.prod(where.scale_shape(shape))
    dense = rows * row_bytes(last, format.bits)
    if nnz is not None:
        dense = min(dense, row_bytes(rows * last, 1) + row_bytes(nnz, format.bits))
    return dense + scales * format.scale_bytes


def parse(name: str) -> Format:
    """The format of a name: `int4`, `int4_full`, `uint8`, `q2.5`.

    Raises:
      ValueError: no such format; the message lists the forms.

    >>> parse("uint4"), parse("q0.7").bits
    (Integer(bits=4, symmetric=False, narrow=True), 8)
    """
    if match := re.fullmatch(r"(u?)int([1-8])(_full)?", name):
        unsigned, bits, full = match.groups()
        if not (unsigned and full):
            return integer(int(bits), symmetric=not unsigned, narrow=not full)
    if match := re.fullmatch(r"q(-?\d+)\.(-?\d+)", name):
        return fixed_point(int(match[1]), int(match[2]))
    raise ValueError(
        f"unknown format {name!r}; known: int1 to int8, int1_full to int8_full (full range), "
        "uint1 to uint8 (asymmetric), qM.N (fixed point)"
    )
