"""Which parameter elements are added to the outputs of a layer."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.graph.flat_list import Op, inline
from jaxcompress.graph.layers.matrices import Layer, columns
from jaxcompress.graph.layers.views import Reader, parts_of, readers
from jaxcompress.graph.tracing import Program, trace_program


class Bias(NamedTuple):
    """Elements of a leaf, one for each output of a layer.

    Attributes:
      path: of the leaf.
      index: int [S, G, N], positions in the flattened leaf; S, G, N as in `matrices.Layer.index`.
    """

    path: str
    index: np.ndarray


def biases(
    fn: Callable[..., Any], params: Any, *inputs: Any, layers: Iterable[Layer]
) -> dict[str, Bias]:
    """The biases of the layers that have one, by the names of their taps.

    A bias is a leaf, or a part of one, that is broadcast and added to the result of the contraction
    before anything else than views and casts.

    >>> import jax.numpy as jnp
    >>> from jaxcompress.graph.layers.matrices import layers
    >>> fn, x = lambda p, x: x @ p["w"] + p["b"][None], jnp.ones((3, 4))
    >>> params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    >>> found = biases(fn, params, x, layers=layers(fn, params, x).layers)
    >>> found["w"].path, found["w"].index.tolist()
    ('b', [[[0, 1]]])
    """
    return biases_of(trace_program(fn, params, *inputs), layers=layers)


def biases_of(program: Program, *, layers: Iterable[Layer]) -> dict[str, Bias]:
    """As `biases`, of a traced program."""
    return biases_and_readers(program, layers=layers)[0]


def biases_and_readers(
    program: Program, *, layers: Iterable[Layer]
) -> tuple[dict[str, Bias], list[Reader]]:
    """As `biases`, and what reads leaves otherwise than these layers: as weights, in other sums."""
    flat = inline(program, weigh=None)
    parts = parts_of(program, flat, written=True)
    wanted = {layer.site.name: layer for layer in layers}
    users: dict[int, list[tuple[int, Op]]] = {}
    for k, op in enumerate(flat.ops):
        for n in set(op.inputs):
            users.setdefault(n, []).append((k, op))
    found, taken = {}, set()
    for op in flat.ops:
        site = program.contractions.get(op.place)
        if site is None or site.name not in wanted:
            continue
        layer, number = wanted[site.name], op.outputs[0]
        reading = users.get(number, [])
        if len(reading) != 1 or reading[0][1].primitive != "add":
            continue
        k, add = reading[0]
        others = [port for port, n in enumerate(add.operands) if n is not None and n != number]
        value = add.operands[others[0]] if len(others) == 1 else None
        if value is None or value not in parts:
            continue
        part, depth = parts[value].inside(len(op.region)), len(op.region)
        lead, shape = part.index.shape[:depth], part.index.shape[depth:]
        if len(shape) != len(site.out.shape):  # a scalar
            continue
        repeated = np.broadcast_to(part.index, (*lead, *site.out.shape))
        index = _per_output(layer, repeated, depth)
        if index is not None:
            found[layer.tap.name] = Bias(part.path, index)
            taken.add((k, others[0]))
    return found, readers(flat, parts, taken)


def _per_output(layer: Layer, index: np.ndarray, depth: int) -> np.ndarray | None:
    # [*trips, *out] -> [S, G, N], if all rows have the same elements.
    trips = index.reshape(-1, *index.shape[depth:])
    arranged = np.stack([np.asarray(columns(layer.tap, one)) for one in trips])
    if not np.array_equal(arranged, np.broadcast_to(arranged[:, :, :1], arranged.shape)):
        return None
    return arranged[:, :, 0]
