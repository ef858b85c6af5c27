"""What weights and activations weigh: stored bytes, bits and zeros of every site's operands."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.core.packed import Masked, QTensor, is_packed, packed_bytes
from jaxcompress.core.paths import leaves_with_paths, near_misses
from jaxcompress.cost import dtypes
from jaxcompress.cost.latency import Load, kept_fraction
from jaxcompress.formats import row_bytes
from jaxcompress.graph import Graph, Site


class Stored(NamedTuple):
    """A parameter as it ships."""

    path: str
    bytes: int  # exact, scales and bitmask included
    dense_bytes: int  # the same with all zeros stored
    size: int
    dtype: str  # number type, see `dtypes`
    bits: int  # per stored weight, without metadata
    density: float
    leaf: Any


def stored(packed: Any) -> dict[str, Stored]:
    """Every leaf of a packed tree by path; arrays, `QTensor`, `Masked` or their shapes.

    Raises:
      ValueError: a leaf is none of these.
    """
    leaves = leaves_with_paths(packed, is_packed)
    for path, leaf in leaves:
        if not hasattr(leaf, "shape"):
            raise ValueError(f"params: leaf {path!r} must be an array, got {type(leaf).__name__}")
    return {path: _stored(path, leaf) for path, leaf in leaves}


def _stored(path: str, leaf: Any) -> Stored:
    size, total = math.prod(leaf.shape), packed_bytes(leaf)
    values = leaf.values if isinstance(leaf, Masked) else leaf
    if isinstance(values, QTensor):
        dtype, bits = dtypes.of_format(values.format)
        metadata = packed_bytes(values.qparams)
    else:
        (dtype, bits), metadata = dtypes.of_array(values.dtype), 0
    if not isinstance(leaf, Masked):
        return Stored(path, total, total, size, dtype, bits, 1.0, leaf)
    stored_bits = values.format.bits if isinstance(values, QTensor) else bits
    dense = row_bytes(size, stored_bits) + metadata
    return Stored(path, total, dense, size, dtype, bits, leaf.density, leaf)


def op_class(site: Site) -> str:
    """One of `device.OPS`."""
    if site.primitive == "dot_general":
        return "matmul" if site.weight is None else "dense"
    rhs_in = site.config["dimension_numbers"].rhs_spec[1]
    one_each = site.operands[1].shape[rhs_in] == 1
    return "depthwise" if site.config["feature_group_count"] > 1 and one_each else "conv"


class ActivationTypes:
    """Number type and bits of the activation operands and outputs of a graph's sites.

    `activations`: None (the traced dtypes), a number of bits, a format, or a mapping from names
    of taps or sites to bits or formats. Bits below those of the traced dtype mean an integer. An
    output has the type of its site's operands if that was given, the wider of two, else the
    traced one.

    Raises:
      ValueError: a name that is neither a tap nor a site; bits outside 1 to 64.
    """

    def __init__(self, graph: Graph, activations: Any):
        self.taps = {(tap.site.name, tap.operand): tap.name for tap in graph.taps}
        self.every, self.named = activations, {}
        if isinstance(activations, Mapping):
            self.every, self.named = None, dict(activations)
            known = {*self.taps.values(), *(site.name for site in graph.sites)}
            for name in self.named:
                if name not in known:
                    nearest = ", ".join(map(repr, near_misses(str(name), sorted(known))))
                    raise ValueError(f"activations: {name!r} is no tap or site; nearest: {nearest}")

    def _given(self, site: Site, operand: int) -> Any:
        tap = self.taps.get((site.name, operand), site.name)
        return self.named.get(tap, self.named.get(site.name, self.every))

    def operand(self, site: Site, operand: int) -> tuple[str, int]:
        """Type and bits of an operand."""
        return _type_of(self._given(site, operand), site.operands[operand].dtype)

    def output(self, site: Site) -> tuple[str, int]:
        """Type and bits of the output."""
        given = [g for i in activation_operands(site) if (g := self._given(site, i)) is not None]
        types = [_type_of(g, site.out.dtype) for g in given or [None]]
        return max(types, key=lambda t: t[1])


def _type_of(given: Any, dtype: Any) -> tuple[str, int]:
    traced = dtypes.of_array(dtype)
    if given is None:
        return traced
    if hasattr(given, "bits"):
        return dtypes.of_format(given)
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= 64:
        raise ValueError(
            f"activations: must be a number of bits from 1 to 64 or a format, got {given!r}"
        )
    return (f"int{given}", given) if given < traced[1] else traced


def activation_operands(site: Site) -> tuple[int, ...]:
    """Indices of the operands that are activations."""
    return (0, 1) if site.weight is None else (1 - site.weight,)


def tensor_bytes(aval: jax.ShapeDtypeStruct, bits: int) -> int:
    """Bytes of an array whose elements have `bits` bits, packed."""
    return -(-math.prod(aval.shape) * bits // 8)


def activation_bytes(site: Site, types: ActivationTypes) -> int:
    """Bytes of the activation operands and the output of one call."""
    operands = [tensor_bytes(site.operands[i], types.operand(site, i)[1]) for i in (0, 1)]
    return sum(operands[i] for i in activation_operands(site)) + tensor_bytes(
        site.out, types.output(site)[1]
    )


def _times_read(site: Site, weight: int, leaves: list[Stored]) -> float:
    # How often all calls together read the leaves: once where a scan slices a stacked leaf,
    # `calls` times where it reuses the leaf. A larger operand is a concatenation of leaves.
    size, largest = math.prod(site.operands[weight].shape), max(leaf.size for leaf in leaves)
    whole = largest if size <= largest else sum(leaf.size for leaf in leaves)
    return min(site.calls * size / max(whole, 1), site.calls)


def _contracted(site: Site, weight: int) -> int:
    # The innermost contracted axis of the weight operand.
    numbers = site.config["dimension_numbers"]
    if site.primitive == "dot_general":
        return max(numbers[0][weight], default=-1)
    return numbers.rhs_spec[1]


def pattern(site: Site, weight: int, leaf: Stored, *, patterns: Iterable[str]) -> str:
    """ "dense", "unstructured", or the sparsest of the N:M `patterns` that the zeros satisfy.

    The groups run along the contracted axis of the operand, of which the leaf is a reshape, the
    transpose (unless it is square) or a stack. Zeros of an abstract mask are "unstructured".
    """
    if not isinstance(leaf.leaf, Masked):
        return "dense"
    bitmask, axis = leaf.leaf.bitmask, _contracted(site, weight)
    structured = sorted((p for p in patterns if ":" in p), key=lambda p: kept_fraction(p, 1.0))
    shape = site.operands[weight].shape
    if axis < 0 or not structured or leaf.size % max(math.prod(shape), 1):
        return "unstructured"
    if isinstance(bitmask, jax.ShapeDtypeStruct | Tracer):
        return "unstructured"
    mask = np.unpackbits(np.asarray(bitmask), count=leaf.size, bitorder="little")
    if leaf.leaf.shape == shape[::-1] != shape:
        mask = mask.reshape(leaf.leaf.shape).T
    mask = np.moveaxis(mask.reshape(-1, *shape), axis + 1, -1)
    return next((p for p in structured if _satisfies(mask, p)), "unstructured")


def _satisfies(mask: np.ndarray, pattern: str) -> bool:
    kept, of = map(int, pattern.split(":"))
    ragged = -mask.shape[-1] % of
    groups = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, ragged)])
    return bool((groups.reshape(-1, of).sum(axis=1) <= kept).all())


def load(
    site: Site,
    types: ActivationTypes,
    lookup: Callable[[str], Stored],
    *,
    patterns: Iterable[str],
) -> Load:
    """What a site asks of a device whose rates know the zero `patterns`."""
    leaves = [lookup(path) for path in site.params]
    weight = site.weight if leaves else None
    operand = 1 if weight is None else weight
    # The widest of the largest leaves stands for the operand: scales and masks are small.
    leaf = max(leaves, key=lambda leaf: (leaf.size, leaf.bits), default=None)
    times = 0.0 if leaf is None else _times_read(site, operand, leaves)
    kept = "dense" if leaf is None else pattern(site, operand, leaf, patterns=patterns)
    return Load(
        name=site.name,
        op=op_class(site),
        macs=site.macs * site.calls,
        calls=site.calls,
        weight_dtype=types.operand(site, operand)[0] if leaf is None else leaf.dtype,
        activation_dtype=types.operand(site, 1 - operand)[0],
        pattern=kept,
        density=1.0 if leaf is None else leaf.density,
        weights=round(times * sum(leaf.size for leaf in leaves)),
        weight_read_bytes=times * sum(leaf.bytes for leaf in leaves),
        dense_read_bytes=times * sum(leaf.dense_bytes for leaf in leaves),
        activation_bytes=activation_bytes(site, types) * site.calls,
    )
