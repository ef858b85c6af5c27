"""What the metadata say of a packed leaf: `format|axes|group|shape|dtype`, `|nnz`, `|positions`."""

import re
from typing import NamedTuple

from jaxcompress.core.packed import QTensor
from jaxcompress.formats import Granularity

FLOATS = ("float16", "bfloat16", "float32", "float64")
_MAX_AXES = 32  # as in safetensors headers, see container.py


class Scheme(NamedTuple):
    """The parts of a scheme."""

    format: str  # "" where the values are plain numbers
    where: Granularity
    shape: tuple[int, ...]
    dtype: str  # of the array that `unpack` gives
    nnz: int | None  # of a sparse leaf
    positions: str  # the form of its positions


def parse_scheme(text: str) -> Scheme:
    """The parts of a scheme; those of files are not to be trusted.

    Raises:
      ValueError: too few or too many parts, numbers that are none, an unknown dtype.

    >>> parse_scheme("int4|-1||3x16|float32|7")[2:]
    ((3, 16), 'float32', 7, 'bitmask')
    """
    format, axes, group, shape, dtype, *rest = text.split("|")
    if len(rest) > 2:
        raise ValueError("it has too many parts")
    if dtype not in FLOATS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if group.startswith("x"):
        where = Granularity(_integers(axes), block=parse_sizes(group[1:]))
    else:
        where = Granularity(_integers(axes), _natural(group) if group else None)
    nnz = _natural(rest[0]) if rest else None
    form = rest[1] if len(rest) == 2 else "bitmask"
    return Scheme(format, where, parse_sizes(shape), dtype, nnz, form)


def scheme_of(leaf: QTensor) -> str:
    """The scheme of a quantized leaf."""
    axes = ",".join(map(str, leaf.granularity.axis))
    group = "" if leaf.granularity.group is None else str(leaf.granularity.group)
    if leaf.granularity.block is not None:
        group = "x" + sizes_text(leaf.granularity.block)
    return "|".join((leaf.format.name, axes, group, sizes_text(leaf.shape), leaf.dtype))


def sizes_text(shape: tuple[int, ...]) -> str:
    """`3x4` for (3, 4)."""
    return "x".join(map(str, shape))


def parse_sizes(text: str) -> tuple[int, ...]:
    """(3, 4) for `3x4`.

    Raises:
      ValueError: not up to 32 numbers below 10**14.
    """
    sizes = tuple(map(_natural, text.split("x"))) if text else ()
    if len(sizes) > _MAX_AXES:
        raise ValueError(f"{len(sizes)} axes, at most {_MAX_AXES} are possible")
    return sizes


def _natural(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,14}", text):
        raise ValueError(f"{text[:20]!r} is no number below 10**14")
    return int(text)


def _integers(text: str) -> tuple[int, ...]:
    parts = text.split(",") if text else []
    return tuple(-_natural(part[1:]) if part.startswith("-") else _natural(part) for part in parts)
