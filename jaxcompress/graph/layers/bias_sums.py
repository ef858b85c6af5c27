"""What parameters add to a value one after the other, as one sum in one leaf."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import END, LOOP, Op, inline
from jaxcompress.graph.layers.views import Part, parts_of
from jaxcompress.graph.scaling.normalizations import data_port, spread_of, unrepeated


class Sum(NamedTuple):
    """Operations in a row of which each adds something made of parameters.

    Attributes:
      ops: positions in `Flat.ops`, in order.
      steps: besides them what multiplies by 1.
    """

    ops: tuple[int, ...]
    steps: frozenset[int]


def merged(flat: Flat, params: Any, ones: set[int]) -> tuple[Any, set[int]]:
    """Puts what is added around multiplications by 1 into one leaf each.

    Args:
      flat: the program.
      params: of it.
      ones: operations that multiply by 1.

    Returns:
      (params, operations that need not add anything any more).
    """
    parts = parts_of(flat.program, inline(flat.program, weigh=len), written=True)
    done: set[int] = set()
    seen: set[int] = set()
    for at in sorted(ones):
        if at in seen:
            continue
        found = _around(flat, at, ones)
        seen |= found.steps
        carrier = _carrier(flat, found.ops, params, parts) if len(found.ops) > 1 else None
        if carrier is not None:
            params, kept = carrier
            done |= set(found.ops) - {kept}
    return params, done


def _around(flat: Flat, at: int, ones: set[int]) -> Sum:
    row, casts = [at], {"convert_element_type"}

    def fits(k: int) -> bool:
        op = flat.ops[k]
        return op.region == flat.ops[at].region and (
            k in ones or op.primitive in casts or _sign(flat, op) != 0
        )

    def source(k: int) -> int | None:
        op = flat.ops[k]
        return op.operands[0] if op.primitive in casts else op.operands[data_port(flat, op) or 0]

    while (number := source(row[0])) in flat.definition:
        before = flat.definition[number]
        if not _single(flat, number) or not fits(before):
            break
        row.insert(0, before)
    while _single(flat, number := flat.ops[row[-1]].outputs[0]):
        after = flat.readers[number][0]
        if not fits(after) or source(after) != number:
            break
        row.append(after)
    adding = tuple(k for k in row if k not in ones and flat.ops[k].primitive not in casts)
    return Sum(adding, frozenset(k for k in row if k in ones))


def _single(flat: Flat, number: int | None) -> bool:
    return number not in flat.outputs and len(flat.readers.get(number or 0, ())) == 1


def _sign(flat: Flat, op: Op) -> int:
    # 1 if parameters are added, -1 if they are subtracted, 0 for anything else.
    if op.primitive not in ("add", "add_any", "sub"):
        return 0
    port = data_port(flat, op)
    if port is None or (op.primitive == "sub" and port == 1):
        return 0
    return -1 if op.primitive == "sub" else 1


def _carrier(
    flat: Flat, ops: Sequence[int], params: Any, parts: dict[int, Part]
) -> tuple[Any, int] | None:
    # The parameters with the whole sum in a leaf of its own, and which operation adds it.
    leaves, paths = jax.tree.leaves(params), [path for path, _ in leaves_with_paths(params)]
    try:
        each = [_sign(flat, flat.ops[k]) * _added(flat, k, leaves) for k in ops]
    except ValueError:
        return None
    whole = np.asarray(sum(each[1:], start=each[0]))
    for k in reversed(ops):
        op = flat.ops[k]
        port = 1 - (data_port(flat, op) or 0)
        index = _elements(flat, op, port, parts)
        if index is None or not _own(flat, index.path, k):
            continue
        where = index.index
        fits = where.ndim == whole.ndim and all(
            m in (1, n) for n, m in zip(where.shape, whole.shape, strict=True)
        )
        if not fits or len(np.unique(where)) != where.size:
            continue
        at = paths.index(index.path)
        leaf = jnp.asarray(leaves[at])
        value = np.broadcast_to(_sign(flat, op) * whole, where.shape)
        new = leaf.reshape(-1).at[where].set(jnp.asarray(value, leaf.dtype))
        leaves[at] = new.reshape(leaf.shape)
        return jax.tree.structure(params).unflatten(leaves), k
    return None


def _added(flat: Flat, at: int, leaves: Sequence[Any]) -> np.ndarray:
    op = flat.ops[at]
    value = spread_of(flat, op, 1 - (data_port(flat, op) or 0), leaves)
    return value if value.dtype == np.float64 else value.astype(np.float32)


def _elements(flat: Flat, op: Op, port: int, parts: dict[int, Part]) -> Part | None:
    # The leaf's elements of an operand, [trips, *shape] as `spread_of` gives their values.
    number = op.operands[port]
    assert number is not None
    source, axes = unrepeated(flat, number)
    if source not in parts:
        return None
    part = parts[source]
    sizes = [1] * len(flat.values[op.outputs[0]].aval.shape)
    shape = part.index.shape[part.depth :]
    for axis, n in zip(axes, shape, strict=True):
        sizes[axis] = n
    return Part(part.path, part.index.reshape(-1, *sizes), 1)


def _own(flat: Flat, path: str, at: int) -> bool:
    # Whether a leaf meets activations in one place.
    number = flat.paths.index(path)
    if number in flat.outputs:
        return False
    for k, op in enumerate(flat.ops):
        if k == at or op.primitive in (LOOP, END):
            continue
        if any(flat.is_data(n) or n in flat.outputs for n in op.outputs):
            for n in op.inputs:
                if not flat.is_data(n) and path in flat.values[n].origin.params:
                    return False
    return True
