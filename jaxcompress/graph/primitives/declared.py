"""What a primitive or a kernel of one's own means, said once for all passes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from jaxcompress.core.kernels import DECLARED
from jaxcompress.graph.primitives.table import KINDS, Kind, Row, add, row

_ALONE: tuple[Kind, ...] = ("identity", "elementwise", "compare", "random", "collective", "opaque")
Axes = Sequence[int]
Work = Literal["", "one", "two", "transcendental"]


def declare(
    name: str,
    *,
    kind: Kind | None = None,
    like: str | None = None,
    contracts: tuple[Axes, Axes] | None = None,
    batch: tuple[Axes, Axes] = ((), ()),
    degree: float | None = None,
    work: Work | None = None,
) -> Row:
    """Says what a primitive, or a Pallas kernel, means: every pass knows it from then on.

    A kernel is known by the name that `pallas_call` was given, else by that of its function. Its
    equation is evaluated as it was written; what is declared is what passes may conclude from it.
    Say it before the network is traced. Saying the same again changes nothing.

    Args:
      name: of the primitive or the kernel.
      kind: what it does with its operands: "identity" gives them on, "elementwise" and "compare"
        work index by index on operands of one shape (or scalars), "opaque" is anything else.
      like: a primitive of JAX that means the same: "tanh", "add". Instead of `kind`.
      contracts: of a sum of products of its two operands, the axes of each that are summed over;
        the result has the batch axes, then the other axes of the first, then those of the second.
        Passes see a `dot_general`: a layer, where one operand is a parameter.
      batch: with `contracts`, the axes of each operand that are matched.
      degree: with `kind`, d where f(c x) = c^d f(x) for all c > 0; 1 lets scales pass through.
      work: with `kind`, what costs count per element of the result: "one" operation,
        "transcendental", "" for nothing.

    Returns:
      Its row.

    Raises:
      ValueError: not exactly one of `kind`, `like` and `contracts`; a kind that needs parameters
        which only JAX's own primitives have; no such primitive; a primitive that has a row already
        and means something else.

    >>> declare("my_tanh", like="tanh").kind
    'elementwise'
    >>> declare("my_matmul", contracts=((1,), (0,))).kind
    'contract'
    """
    given = [key for key, x in (("kind", kind), ("like", like), ("contracts", contracts)) if x]
    if len(given) != 1:
        raise ValueError(
            f"declare({name!r}): give one of kind, like and contracts, got {given or 'none'}"
        )
    if contracts is not None:
        new = row("dot_general")
    elif like is not None:
        new = row(like)
        if new.work == "?" or (new.kind not in _ALONE and name != like):
            raise ValueError(
                f"declare({name!r}): like={like!r} is no primitive that works without parameters "
                f"of its own: one of the kinds {', '.join(_ALONE)}"
            )
    else:
        if kind not in _ALONE:
            known = "needs parameters that only JAX's have" if kind in KINDS else "is none"
            raise ValueError(
                f"declare({name!r}): kind={kind!r} {known}: {', '.join(_ALONE)}, or contracts"
            )
        if work is not None and work not in get_args(Work):
            raise ValueError(f"declare({name!r}): work={work!r} is none of {get_args(Work)}")
        same = kind == "identity"
        new = Row(
            name, kind, degree=1 if same else degree, linear=same, order=same, exact=same,
            stays="any" if same else "undefined", work=work if work is not None else "",
        )  # fmt: skip
        if not same and work is None:
            new = dataclasses.replace(new, work="?" if kind == "opaque" else "one")
    new = dataclasses.replace(new, name=name)
    old = row(name)
    if name not in DECLARED and old.work != "?" and old != new:
        raise ValueError(f"declare({name!r}): JAX has a primitive of this name, {old.kind}")
    product = new.kind if contracts is None else _dot_general(contracts, batch)
    if name in DECLARED and (DECLARED[name] != product or old != new):
        raise ValueError(f"declare({name!r}): it was declared as something else, {old.kind}")
    add(name, new)
    DECLARED[name] = product
    return new


def _dot_general(contracts: tuple[Axes, Axes], batch: tuple[Axes, Axes]) -> dict[str, Any]:
    axes = tuple(tuple(tuple(side) for side in pair) for pair in (contracts, batch))
    for pair, what in zip(axes, ("contracts", "batch"), strict=True):
        if len(pair) != 2 or len(pair[0]) != len(pair[1]):
            raise ValueError(f"declare({what}): as many axes of each operand, got {pair}")
    return {"dimension_numbers": axes, "precision": None, "out_sharding": None}
