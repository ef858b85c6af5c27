"""What weights and activations weigh: stored bytes, bits and zeros of every site's operands."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.core.packed import Masked, QTensor, is_packed, packed_bytes
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.cost import dtypes
from jaxcompress.cost.device_model import Device, Quantity
from jaxcompress.cost.operations import total, unruled, work
from jaxcompress.cost.timing.fused_kernels import Kernel
from jaxcompress.cost.timing.roofline import Load, kept_fraction
from jaxcompress.cost.types import ActivationTypes
from jaxcompress.formats import row_bytes
from jaxcompress.graph import Site, compat
from jaxcompress.graph.flat_list import Op
from jaxcompress.graph.primitives import row
from jaxcompress.graph.primitives.contractions import numbers_at
from jaxcompress.graph.sites import size


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
    elements, stored_bytes = math.prod(leaf.shape), packed_bytes(leaf)
    values = leaf.values if isinstance(leaf, Masked) else leaf
    if isinstance(values, QTensor):
        dtype, bits = dtypes.of_format(values.format)
        metadata = packed_bytes(values.qparams)
    else:
        (dtype, bits), metadata = dtypes.of_array(values.dtype), 0
    if not isinstance(leaf, Masked):
        return Stored(path, stored_bytes, stored_bytes, elements, dtype, bits, 1.0, leaf)
    stored_bits = values.format.bits if isinstance(values, QTensor) else bits
    dense = row_bytes(elements, stored_bits) + metadata
    return Stored(path, stored_bytes, dense, elements, dtype, bits, leaf.density, leaf)


def op_class(site: Site) -> str:
    """One of `device.OPS`."""
    if site.primitive != compat.CONV:
        return "matmul" if site.weight is None else "dense"
    rhs_in = site.config["dimension_numbers"].rhs_spec[1]
    kernel = site.operands[1].shape
    if site.config["feature_group_count"] > 1 and kernel[rhs_in] == 1:
        return "depthwise"
    taps = math.prod(kernel[i] for i in site.config["dimension_numbers"].rhs_spec[2:])
    return "pointwise" if taps == 1 else "conv"


def _times_read(site: Site, weight: int, leaves: list[Stored], calls: int) -> float:
    # How often all calls together read the leaves: once where a scan slices a stacked leaf,
    # `calls` times where it reuses the leaf. A larger operand is a concatenation of leaves.
    elements, largest = math.prod(site.operands[weight].shape), max(leaf.size for leaf in leaves)
    whole = largest if elements <= largest else sum(leaf.size for leaf in leaves)
    return min(calls * elements / max(whole, 1), calls) * _met(site)


def _met(site: Site) -> float:
    # Share of the experts that rows can reach at most.
    if site.primitive != compat.RAGGED or (found := numbers_at(site)).group < 0:
        return 1.0
    rows = math.prod(site.operands[0].shape[axis] for axis in found.free[0])
    return min(1.0, rows / max(site.operands[1].shape[found.group], 1))


def _contracted(site: Site, weight: int) -> int:
    # The innermost contracted axis of the weight operand.
    if site.primitive != compat.CONV:
        return max(numbers_at(site).contracted[weight], default=-1)
    return site.config["dimension_numbers"].rhs_spec[1]


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


def channels(site: Site) -> tuple[int, int]:
    """Contracted and output channels of a contraction (of one group, per tap)."""
    weight = 1 if site.weight is None else site.weight
    shape = site.operands[weight].shape
    if site.primitive == compat.CONV:
        outputs, inputs = (shape[i] for i in site.config["dimension_numbers"].rhs_spec[:2])
        return inputs, outputs
    found = numbers_at(site)
    sizes = (math.prod(shape[i] for i in axes[weight]) for axes in (found.contracted, found.free))
    inputs, outputs = sizes
    return inputs, outputs


def fill(site: Site, alignment: Mapping[str, Quantity]) -> float:
    """Share of a contraction's channels that are there once they are padded to multiples."""
    share = 1.0
    if op_class(site) == "depthwise":
        return share
    for name, n in zip(("inputs", "outputs"), channels(site), strict=True):
        if name in alignment and n:
            multiple = int(alignment[name].value)
            share *= n / (-(-n // multiple) * multiple)
    return share


def load(
    kernel: Kernel,
    site: Site,
    types: ActivationTypes,
    lookup: Callable[[str], Stored],
    *,
    device: Device,
) -> Load:
    """What a kernel with a contraction asks of a device."""
    leaves = [lookup(path) for path in site.params]
    weight = site.weight if leaves else None
    operand = 1 if weight is None else weight
    # The widest of the largest leaves stands for the operand: scales and masks are small.
    leaf = max(leaves, key=lambda leaf: (leaf.size, leaf.bits), default=None)
    times = 0.0 if leaf is None else _times_read(site, operand, leaves, kernel.times)
    patterns = {rate.pattern for rate in device.throughput} - {"dense"}
    kept = "dense" if leaf is None else pattern(site, operand, leaf, patterns=patterns)
    return Load(
        name=site.name,
        op=op_class(site),
        macs=site.macs * kernel.times,
        calls=kernel.times,
        weight_dtype=_weight_dtype(site, operand, types, leaf),
        activation_dtype=types.operand(site, 1 - operand)[0],
        pattern=kept,
        density=1.0 if leaf is None else leaf.density,
        weights=round(times * sum(leaf.size for leaf in leaves)),
        weight_read_bytes=times * sum(leaf.bytes for leaf in leaves),
        dense_read_bytes=times * sum(leaf.dense_bytes for leaf in leaves),
        activation_bytes=moved_bytes(kernel, types) * kernel.times,
        fill=fill(site, device.alignment),
        patches=site.macs * kernel.times // max(_meets(site), 1),
        inputs=channels(site)[0],
    )


def _weight_dtype(site: Site, operand: int, types: ActivationTypes, leaf: Stored | None) -> str:
    # As it is stored; integers that the floats they meet do not hold are converted to them.
    computed = types.operand(site, operand)[0]
    stored = computed if leaf is None else leaf.dtype
    widened = dtypes.kind(computed).family == "float" and dtypes.kind(stored).family == "int"
    return computed if widened and not dtypes.holds(computed, stored) else stored


def _meets(site: Site) -> int:
    # How many output channels an element of a patch meets.
    return 1 if op_class(site) == "depthwise" else channels(site)[1]


def light_load(
    kernel: Kernel, name: str, types: ActivationTypes, lookup: Callable[[str], Stored]
) -> Load:
    """What a kernel without a contraction asks of a device."""
    done = total(work(op) or unruled(op) for op in kernel.ops)
    arrays = kernel.writes or kernel.reads
    dtype = max((types.value(n) for n in arrays), key=lambda t: t[1], default=("int1", 1))[0]
    read = kernel.times * sum(_parameter_bytes(op, types, lookup) for op in kernel.ops)
    return Load(
        name=name,
        op="",
        macs=0,
        calls=kernel.times,
        weight_dtype="",
        activation_dtype=dtype,
        pattern="dense",
        density=1.0,
        weights=0,
        weight_read_bytes=read,
        dense_read_bytes=read,
        activation_bytes=moved_bytes(kernel, types) * kernel.times,
        operations=kernel.times * (done.elementwise + done.transcendentals),
    )


def _looks_up(op: Op) -> bool:
    meaning = row(op.primitive)
    return meaning.kind == "index" and not meaning.update


def moved_bytes(kernel: Kernel, types: ActivationTypes) -> int:
    """Bytes of activations that one run of a kernel reads and writes.

    A lookup reads the elements it looks up, an update in place writes what it updates.
    """
    elements: dict[int, int] = {}
    for op in kernel.ops:
        if _looks_up(op) and op.operands[0] is not None:
            elements[op.operands[0]] = sum(size(v.aval) for v in op.eqn.outvars)
        if number := row(op.primitive).update:
            changed = size(op.eqn.invars[number].aval)
            elements.update(dict.fromkeys(op.outputs, changed))
            if op.operands[0] is not None:
                elements[op.operands[0]] = 0
    return sum(types.value_bytes(n, elements.get(n)) for n in (*kernel.reads, *kernel.writes))


def _parameter_bytes(op: Op, types: ActivationTypes, lookup: Callable[[str], Stored]) -> float:
    read = 0.0
    for i, n in enumerate(op.operands):
        origin = None if n is None else types.values[n].origin
        if origin is None or origin.data or not origin.params:
            continue
        leaf = max((lookup(path) for path in origin.params), key=lambda leaf: leaf.size)
        part = min(origin.extent, leaf.size)
        if _looks_up(op) and i == 0:
            part = min(part, sum(size(v.aval) for v in op.eqn.outvars))
        read += leaf.bytes * part / max(leaf.size, 1)
    return read
