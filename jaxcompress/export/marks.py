"""Grids that an exporter can see: fake quantization as a marked operation of the traced program.

A mark is `jax.lax.composite` under the name `quant.fake_quant`, with the attributes that LiteRT's
converter reads: `scale` float32 [channels] or [1], `zero_point` int64 of the same size, `dtype`
"i8" or "i4", `narrow_range`, and `quantization_dimension` where there are several channels. A
program with marks computes the same numbers as without; an exporter lowers a mark to the
quantization of its runtime. Codes are signed here: a uint8 code q with the zero point z is q - 128
with z - 128. An empty `scale` means that the range is found while the network runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.notices import warn
from jaxcompress.core.packed import Grid, Masked, QTensor, is_packed, unpack
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.formats.integers import Integer
from jaxcompress.graph import walk

FAKE_QUANT = "quant.fake_quant"
"""Name of a mark."""


def mark(
    x: Array, *, scale: Any, zero_point: Any, bits: int, narrow: bool, axis: int | None = None
) -> Array:
    """x on a grid of signed integers, scale * (code - zero_point), as a marked operation.

    Args:
      x: floating point, [...].
      scale: float32, one number, or one per index of `axis`.
      zero_point: integers of the same size, as for signed codes.
      bits: 4 or 8: what the runtime stores.
      narrow: codes from -(2**(bits - 1) - 1) instead of -2**(bits - 1), as weights have.
      axis: along which the scales lie, None for one scale.

    Raises:
      ValueError: bits that no runtime stores; sizes that do not fit.
    """
    if bits not in (4, 8):
        raise ValueError(f"mark(bits): runtimes store 4 or 8 bits, got {bits}")
    scales = np.atleast_1d(np.asarray(scale, np.float32))
    zeros = np.broadcast_to(np.asarray(zero_point, np.int64), scales.shape)
    channels = 1 if axis is None else x.shape[axis]
    if scales.shape != (channels,):
        raise ValueError(f"mark(scale): must have {channels} numbers, got {scales.shape}")
    attributes: dict[str, Any] = {} if axis is None else {"quantization_dimension": axis % x.ndim}
    lowest = -(2 ** (bits - 1)) + int(narrow)
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = channels
    # Of NumPy: what a composite closes over must not be traced.
    step, zero = (a.reshape(shape if channels > 1 else ()).astype(x.dtype) for a in (scales, zeros))

    @functools.partial(jax.lax.composite, name=FAKE_QUANT)
    def on_grid(x: Array, **_: Any) -> Array:
        # q = clip(round(x / s) + z, low, high)
        codes = jnp.clip(jnp.round(x / step) + zero, lowest, -lowest - 1 + int(narrow))
        return (codes - zero) * step

    return on_grid(
        x, scale=scales, zero_point=zeros.copy(), dtype=f"i{bits}", narrow_range=narrow,
        **attributes,
    )  # fmt: skip


def mark_grid(x: Array, grid: Grid, *, where: str) -> Array:
    """x on the grid of an activation: int8 or uint8, or fewer bits that 8 hold.

    Raises:
      ValueError: a grid that is no `formats.integer` of at most 8 bits with one scale.
    """
    form = grid.format
    if not isinstance(form, Integer) or not isinstance(form.bits, int) or form.bits > 8:
        raise ValueError(
            f"{where}: activations must be on a grid of formats.integer(8) or fewer bits, "
            f"got {form!r}"
        )
    if np.size(grid.qparams.scale) != 1:
        raise ValueError(f"{where}: activations must have one scale, got {grid.qparams.scale}")
    scale = np.asarray(grid.qparams.scale, np.float32).reshape(())
    low, high = form.bounds
    zero = 0 if form.symmetric else int(np.asarray(grid.qparams.zero_point).reshape(()))
    if form.bits < 8:  # what eight bits would hold besides
        step = jnp.asarray(scale, x.dtype)
        x = jnp.clip(x, (low - zero) * step, (high - zero) * step)
    offset = 0 if form.symmetric else 128
    narrow = form.symmetric and form.narrow and form.bits == 8
    return mark(x, scale=scale, zero_point=zero - offset, bits=8, narrow=narrow)


def mark_dynamic(x: Array, *, axes: tuple[int, ...]) -> Array:
    """x on grids of int8 that follow its range while the network runs, as a marked operation.

    One grid per index of the other axes: with a = min(x, 0) and b = max(x, 0) over `axes`,
    S = (b - a) / 255 and Z is -128 - a / S or 127 - b / S rounded, whichever end is nearer to its
    code. This is what LiteRT's kernels for dynamic ranges do; other runtimes may place grids else.

    Args:
      x: floating point, [...].
      axes: along which an element shares the grid: those that are contracted, in a convolution all
        but the batch.
    """

    @functools.partial(jax.lax.composite, name=FAKE_QUANT)
    def on_grids(x: Array, **_: Any) -> Array:
        low = jnp.minimum(jnp.min(x, axes, keepdims=True), 0)
        high = jnp.maximum(jnp.max(x, axes, keepdims=True), 0)
        # S^-1 = 255 / (b - a), 1 for a row of zeros
        inverse = jnp.where(high == low, jnp.ones_like(low), 255 / (high - low))
        from_low, from_high = -128 - low * inverse, 127 - high * inverse
        error = (-128 + low * inverse) + (127 + high * inverse)
        zero = jnp.round(jnp.clip(jnp.where(error > 0, from_low, from_high), -128, 127))
        codes = jnp.clip(jnp.round(x * inverse) + zero, -128, 127)
        return (codes - zero) / inverse

    empty: dict[str, Any] = {"scale": np.zeros(0, np.float32), "zero_point": np.zeros(0, np.int64)}
    return on_grids(x, **empty, dtype="i8", narrow_range=False)


def mark_activations(apply_fn: Callable[..., Any], grids: dict[str, Grid]) -> Callable[..., Any]:
    """`apply_fn` with the activations of the taps in `grids` ({tap name: Grid}) marked."""
    walked = walk(apply_fn, lambda tap, x, grid: (mark_grid(x, grid, where=tap.name), grid))
    return lambda params, *inputs: walked(grids, params, *inputs)[0]


def mark_weights(packed: Any) -> Any:
    """The arrays of a packed tree, those marked that runtimes can store as integers.

    Symmetric integers with one scale per tensor or per index of one axis are marked, 4 bits and
    fewer as "i4"; all else is as `jc.unpack` gives it, plain arrays included. One warning names
    the packed leaves among that: an exporter stores them as numbers.
    """
    flat = leaves_with_paths(packed, is_leaf=is_packed)
    plain = [
        f"{path or 'the array'!r} ({why})"
        for path, leaf in flat
        if is_packed(leaf) and (why := why_unmarked(leaf) or _several_axes(leaf))
    ]
    if plain:
        warn(
            f"export.mark_weights: unpacked, without a mark: {'; '.join(plain[:5])}"
            + (f"; and {len(plain) - 5} more leaves" if len(plain) > 5 else "")
        )
    leaves = [_marked(leaf) for _, leaf in flat]
    return jax.tree.unflatten(jax.tree.structure(packed, is_leaf=is_packed), leaves)


def why_unmarked(leaf: QTensor | Masked) -> str:
    """Why the numbers of a packed leaf are on no grid that a runtime has; "" if they are."""
    values = leaf if isinstance(leaf, QTensor) else leaf.values
    if not isinstance(values, QTensor):
        return f"it is sparse {leaf.dtype}"
    form = values.format
    if not isinstance(form, Integer) or not form.symmetric or form.bits > 8:
        return f"it is in the format {form.name}"
    if not values.granularity.plain:
        return "its scales are those of groups"
    return ""


def stored_bits(leaf: QTensor | Masked) -> int:
    """What runtimes store the codes of a leaf in that is marked: 4 or 8 bits."""
    values = leaf if isinstance(leaf, QTensor) else leaf.values
    return 4 if values.format.bits <= 4 else 8


def _several_axes(leaf: QTensor | Masked) -> str:
    # Of a leaf with a grid that runtimes have otherwise.
    values: Any = leaf if isinstance(leaf, QTensor) else leaf.values
    several = len(values.granularity.channels(leaf.shape)) > 1
    return "its scales lie along several axes" if several else ""


def _marked(leaf: Any) -> Any:
    if not is_packed(leaf):
        return leaf
    with jax.ensure_compile_time_eval():  # a constant of the program, not a decoder in it
        array = unpack(leaf)
    if why_unmarked(leaf) or _several_axes(leaf):
        return array
    values = leaf if isinstance(leaf, QTensor) else leaf.values
    form: Any = values.format
    channels = values.granularity.channels(array.shape)
    bits = stored_bits(leaf)
    narrow = form.narrow or form.bits not in (4, 8)
    scale = np.asarray(values.qparams.scale).reshape(-1)
    axis = channels[0] if channels and array.shape[channels[0]] > 1 else None
    return mark(array, scale=scale, zero_point=0, bits=bits, narrow=narrow, axis=axis)
