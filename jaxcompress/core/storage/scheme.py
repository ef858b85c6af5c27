"""What a file says of its leaves: a short table, each scheme once, names as a tree.

    ;int8|-1;int8|-1||bfloat16|csr:3>Conv_0{bias 64,kernel 3x3x16x64 1},Dense_0{kernel 64x10 2 230}

Schemes stand first, `;` between, the most frequent one in front: a dtype for arrays that are not
packed (nothing for float32), or `format|axes|group|dtype|positions` for packed ones, the ends left
out that are as usual (float32, no group, not sparse); tiles are a group `x128x128`. Behind `>` are
the leaves, sorted, each with its shape, the number of its scheme (left out where it is the first),
and the number of kept elements where it is sparse. Signs that have a meaning here are `%XX` inside
of names.

Files of version 2 and 3 have `format|axes|group|shape|dtype|nnz|positions` for each leaf.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxcompress.formats import Granularity

FLOATS = ("float16", "bfloat16", "float32", "float64")
_MAX_AXES = 32  # as in safetensors headers, see container.py
_SIGNS = re.compile(r'[\x00-\x20\x7f"\\%,;|=&{}>]')
_TOKEN = re.compile(r"([^{},]*)([{},]|$)")


class Scheme(NamedTuple):
    """How a leaf is stored."""

    format: str  # "" where the values are plain numbers
    where: Granularity
    shape: tuple[int, ...]
    dtype: str  # of the array that `unpack` gives
    nnz: int | None  # of a sparse leaf
    positions: str  # the form of its positions

    @property
    def packed(self) -> bool:
        """Whether the leaf is more than one array of numbers."""
        return bool(self.format) or self.nnz is not None


def plain_scheme(shape: tuple[int, ...], dtype: str) -> Scheme:
    """The scheme of an array that is not packed."""
    return Scheme("", Granularity(), tuple(shape), dtype, None, "")


def parse_scheme(text: str) -> Scheme:
    """The parts of a scheme of version 2 or 3; those of files are not to be trusted.

    Raises:
      ValueError: too few or too many parts, numbers that are none, an unknown dtype.

    >>> parse_scheme("int4|-1||3x16|float32|7")[2:]
    ((3, 16), 'float32', 7, 'bitmask')
    """
    format, axes, group, shape, dtype, *rest = text.split("|")
    if len(rest) > 2:
        raise ValueError("it has too many parts")
    _check_dtype(dtype)
    nnz = _natural(rest[0]) if rest else None
    form = rest[1] if len(rest) == 2 else "bitmask"
    return Scheme(format, _where(axes, group), parse_sizes(shape), dtype, nnz, form)


def table_text(schemes: Mapping[str, Scheme]) -> str:
    """The table of leaves by name."""
    counts = Counter(_kind(scheme) for scheme in schemes.values())
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    tree: dict[str, object] = {}
    for name in sorted(schemes, key=lambda name: name.split("/")):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})  # type: ignore[assignment]
            if not isinstance(node, dict):
                raise ValueError(f"leaf {name!r} lies below another leaf")
        node[last] = _record(schemes[name], kinds.index(_kind(schemes[name])))  # type: ignore
    return f"{';'.join(kinds)}>{_written(tree)}"


def _written(tree: Mapping[str, object]) -> str:
    return ",".join(
        f"{quoted(name)} {node}" if isinstance(node, str) else f"{quoted(name)}{{{_written(node)}}}"  # type: ignore
        for name, node in tree.items()
    )


def _record(scheme: Scheme, number: int) -> str:
    fields = [sizes_text(scheme.shape)]
    if number or scheme.nnz is not None:
        fields.append(f"{number}" if number else "")
    return " ".join([*fields, *([] if scheme.nnz is None else [f"{scheme.nnz}"])])


def _kind(scheme: Scheme) -> str:
    """What leaves may share."""
    if not scheme.packed:
        return "" if scheme.dtype == "float32" else scheme.dtype
    axes = ",".join(map(str, scheme.where.axis))
    group = "" if scheme.where.group is None else str(scheme.where.group)
    if scheme.where.block is not None:
        group = "x" + sizes_text(scheme.where.block)
    dtype = "" if scheme.dtype == "float32" else scheme.dtype
    text = "|".join((quoted(scheme.format), axes, group, dtype, scheme.positions))
    return text.rstrip("|") + ("" if text.rstrip("|").count("|") else "|")


def parse_table(text: str) -> dict[str, Scheme]:
    """The schemes of leaves by name; those of files are not to be trusted.

    Raises:
      ValueError: it is not what `table_text` writes.

    >>> parse_table("int4|-1>dense{kernel 3x16}")["dense/kernel"][:3:2]
    ('int4', (3, 16))
    """
    head, sign, leaves = text.partition(">")
    kinds = head.split(";")
    found: dict[str, Scheme] = {}
    for name, fields in _leaves(leaves):
        shape, number, *nnz = (*fields, "") if len(fields) == 1 else fields
        if len(fields) > 3 or name in found:
            raise ValueError(f"the leaf {name[:80]!r} stands twice, or has too many parts")
        kind = kinds[_natural(number) if number else 0]
        found[name] = _parsed(kind, shape, _natural(nnz[0]) if nnz else None)
    if not sign or table_text(found) != text:
        raise ValueError("the table of leaves is not as it is written")
    return found


def _leaves(text: str) -> Iterator[tuple[str, list[str]]]:
    parents: list[str] = []
    closed = False
    for token in _TOKEN.finditer(text):
        inside, sign = token.groups()
        if sign == "{":
            parents.append(unquoted(inside))
        elif inside:
            name, *fields = inside.split(" ")
            yield "/".join([*parents, unquoted(name)]), fields
        elif not closed:
            raise ValueError("a leaf without a name")
        if sign == "}":
            parents.pop()
        closed = sign == "}"
        if not sign:
            return


def _parsed(kind: str, shape: str, nnz: int | None) -> Scheme:
    if "|" not in kind:
        if nnz is not None:
            raise ValueError(f"{kind!r} is not sparse")
        return plain_scheme(parse_sizes(shape), kind or "float32")
    format, axes, group, dtype, form = [*kind.split("|"), "", "", "", ""][:5]
    if kind.count("|") > 4 or bool(form) != (nnz is not None):
        raise ValueError(f"{kind!r} has too many parts, or too few numbers")
    dtype = dtype or "float32"
    _check_dtype(dtype)
    where = _where(axes, group)
    return Scheme(unquoted(format), where, parse_sizes(shape), dtype, nnz, form)


def _check_dtype(dtype: str) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"unknown dtype {dtype!r}")


def _where(axes: str, group: str) -> Granularity:
    if group.startswith("x"):
        return Granularity(_integers(axes), block=parse_sizes(group[1:]))
    return Granularity(_integers(axes), _natural(group) if group else None)


def quoted(name: str) -> str:
    """A name without the signs that have a meaning in a file.

    >>> quoted("a b{c}"), unquoted(quoted("a b{c}"))
    ('a%20b%7Bc%7D', 'a b{c}')
    """
    return _SIGNS.sub(lambda sign: f"%{ord(sign[0]):02X}", name)


def unquoted(name: str) -> str:
    """The name that `quoted` was given."""
    return re.sub("%([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), name)


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
