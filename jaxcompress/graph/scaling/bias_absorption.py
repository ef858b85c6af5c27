"""Biases that can move through a ReLU into the biases behind it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import Op
from jaxcompress.graph.layers.biases import Bias, biases_of
from jaxcompress.graph.layers.matrices import Layer, layers_of
from jaxcompress.graph.primitives import Permute, Regroup, moved
from jaxcompress.graph.scaling.migration import Absorption, Elements
from jaxcompress.graph.tracing import trace_program


class Shift(NamedTuple):
    """A bias that can move through a ReLU into the biases behind it.

    Attributes:
      group: the channels.
      front: the bias in front, as elements.
      consumers: layers behind, each with its bias.
    """

    group: Absorption
    front: Elements
    consumers: tuple[tuple[Layer, Bias], ...]


def shiftable(
    fn: Callable[..., Any], params: Any, inputs: Sequence[Any], groups: Sequence[Absorption]
) -> tuple[Shift, ...]:
    """The groups whose bias in front can move through a ReLU into the biases behind it.

    Besides the ReLU only views may lie between them, and no layer behind may pad its input.

    Args:
      fn, params, inputs: as `absorb.absorbable`.
      groups: what it found.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxcompress.graph.scaling.migration import absorbable
    >>> def fn(p, x):
    ...     return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"] + p["out"][None]
    >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    >>> params |= {"down": jnp.ones((8, 2)), "out": jnp.ones(2)}
    >>> x = jnp.ones((3, 4))
    >>> (shift,) = shiftable(fn, params, (x,), absorbable(fn, params, x).groups)
    >>> shift.front.path, [bias.path for _, bias in shift.consumers]
    ('bias', ['out'])
    """
    program = trace_program(fn, params, *inputs)
    flat, known = Flat(program), layers_of(program).layers
    found = biases_of(program, layers=known)
    named = {layer.site.name: layer for layer in known}
    shifts = []
    for group in groups:
        front = [elements for elements in group.producers if not elements.weight]
        before = named.get(group.producer)
        own = found.get(before.tap.name) if before else None
        if before is None or own is None or [e.path for e in front] != [own.path]:
            continue
        chain = _chain(flat, before)
        if not chain or set(chain) != set(group.layers) or not _private(flat, own.path):
            continue
        behind = [named[name] for name in group.layers if name in named]
        after = [(layer, found.get(layer.tap.name)) for layer in behind]
        fit = [(layer, bias) for layer, bias in after if bias and _fits(flat, layer, bias)]
        if len(fit) == len(group.layers):
            shifts.append(Shift(group, front[0], tuple(fit)))
    return tuple(shifts)


def _chain(flat: Flat, layer: Layer) -> list[str]:
    # Names of the sites behind output -> bias -> ReLU, and views between; [] for anything else.
    at = next(k for k, op in enumerate(flat.ops) if flat.site_name(op) == layer.site.name)
    wanted, number = [_adds_bias, _is_relu], flat.ops[at].outputs[0]
    while number not in flat.outputs:
        readers = [flat.ops[k] for k in flat.readers.get(number, ())]
        names = [flat.site_name(op) for op in readers]
        if not wanted and readers and all(names):
            return names
        if len(readers) != 1:
            return []
        (op,) = readers
        if wanted and wanted[0](flat, op):
            wanted = wanted[1:]
        elif not _rearranges(op):
            return []
        number = op.outputs[0]
    return []


def _rearranges(op: Op) -> bool:
    # Every element stays, once.
    found = moved(op.eqn) or []
    whole = len(found) == 1 and found[0].axis is None and len(op.outputs) == 1
    return whole and all(isinstance(step, Regroup | Permute) for step in found[0].steps)


def _adds_bias(flat: Flat, op: Op) -> bool:
    return op.primitive == "add" and not all(map(flat.is_data, op.operands))


def _is_relu(flat: Flat, op: Op) -> bool:
    return op.primitive == "max" and any(_is_zero(flat, op, port) for port in (0, 1))


def _is_zero(flat: Flat, op: Op, port: int) -> bool:
    return flat.is_free(op, port) and bool(np.all(flat.literal(op, port) == 0))


def _private(flat: Flat, path: str) -> bool:
    # Whether a leaf is used in one place.
    number = flat.paths.index(path)
    while len(readers := flat.readers.get(number, ())) == 1:
        op = flat.ops[readers[0]]
        if flat.is_data(op.outputs[0]):
            return True
        number = op.outputs[0]
    return False


def _fits(flat: Flat, layer: Layer, bias: Bias) -> bool:
    # Whether what every row of a layer adds can go into its bias.
    config, site = layer.site.config, layer.site
    if site.primitive == compat.RAGGED:  # every expert adds something else
        return False
    if layer.index.shape[0] > 1 or math.prod(site.loops) > 1 or not _private(flat, bias.path):
        return False
    if site.primitive != compat.CONV:
        return True
    dilated = any(n > 1 for n in config["lhs_dilation"])
    return not dilated and all(low <= 0 and high <= 0 for low, high in config["padding"])
