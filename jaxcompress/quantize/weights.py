"""Weights on a grid: calibrated scales in the state, straight-through gradients, packed codes."""

from typing import Any

import jax
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    is_absent,
    is_float_array,
    per_leaf,
)
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import Format, Granularity, check_format, granularity
from jaxcompress.quantize.calibrate import Calibrator, min_max, refuse_non_finite


def qparams_of(
    x: Array, format: Format, where: Granularity, *, calibrate: Calibrator | None = None
) -> Any:
    """The format's arrays for x: its blocks' ranges, found by the calibrator.

    Raises:
      ValueError: x is concrete and holds NaN or Inf; an axis is out of range.
    """
    calibrate = calibrate or min_max()
    refuse_non_finite("an array to quantize", x)
    statistics = calibrate.update(
        calibrate.init(where.scale_shape(x.shape)),
        where.split(x),
        axes=where.reduce_axes(x.shape),
        where=where.valid(x.shape),
    )
    low, high = calibrate.range(statistics)
    return format.qparams(low, high, dtype=x.dtype)


def fake_quant(
    x: Array,
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    qparams: Any = None,
    calibrate: Calibrator | None = None,
) -> Array:
    """The array that a forward pass sees when x is stored in `format`.

    Args:
      x: floating point, any shape.
      format: e.g. `formats.integer(8)`.
      axis: channel axes, each index with its own scale; None: one scale for the tensor.
      group: elements per scale along what remains, flattened; the last group may be shorter.
      qparams: scales found before; None: from x itself, by the calibrator.
      calibrate: default `min_max()`.

    Returns:
      Same shape and dtype; the gradient is 1 inside the range and 0 outside.

    >>> import jax.numpy as jnp
    >>> from jaxcompress.formats import integer
    >>> print(fake_quant(jnp.array([0.0, 0.2, -0.7]), integer(4)))
    [ 0.   0.2 -0.7]
    """
    check_format(format)
    if not is_float_array(x):
        raise TypeError(f"x must be a floating point array, got {getattr(x, 'dtype', type(x))}")
    where = granularity(axis, group)
    if qparams is None:
        qparams = qparams_of(jax.lax.stop_gradient(x), format, where, calibrate=calibrate)
    return fake_quantize(x, qparams, format=format, granularity=where)


def weights(
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    calibrate: Calibrator | None = None,
) -> Compressor:
    """Stores every floating point leaf in `format`: absmax or affine, per tensor, channel, group.

    Scales live in the state's buffers and are refreshed by `update`, so that what is trained is
    what ships, bit for bit. Leaves of integers or bools pass unchanged; choose leaves with
    `by_path`.

    Args:
      format: e.g. `formats.integer(4)`.
      axis: channel axes, each index with its own scale; None: one scale per leaf. Flax kernels
        have their output channels last: axis=-1.
      group: elements per scale along the remaining axes, flattened.
      calibrate: how the range is found, default `min_max()` (absmax for symmetric formats).

    Raises:
      ValueError: (at init, eager) NaN or Inf in a leaf; an axis out of range; with the path.

    Source: Jacob et al. 2018, arXiv 1712.05877; straight-through: arXiv 1308.3432.

    >>> import jax.numpy as jnp
    >>> from jaxcompress import core, formats
    >>> comp = weights(formats.integer(4), axis=-1)
    >>> params = {"kernel": jnp.array([[0.7, -0.1], [0.33, 0.0]])}
    >>> packed = comp.pack(params, comp.init(params))
    >>> core.packed_bytes(packed)  # two rows of one byte, two scales
    10
    """
    check_format(format)
    where = granularity(axis, group)

    def init(w):
        return CompressState(buffers=qparams_of(w, format, where, calibrate=calibrate))

    def apply(w, state):
        if is_absent(state.buffers) and format.scale_bytes:
            raise ValueError("the state holds no scales: it was made by another compressor")
        return fake_quantize(w, state.buffers, format=format, granularity=where)

    def update(w, state, *, grads=None, **extra):
        del grads, extra
        return state._replace(buffers=qparams_of(w, format, where, calibrate=calibrate))

    def pack(w, state):
        refuse_non_finite("an array to pack", w)
        return quantize(w, state.buffers, format=format, granularity=where)

    return per_leaf(init, apply, update=update, pack=pack)
