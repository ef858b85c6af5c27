"""Weights on a grid: calibrated scales in the state, straight-through gradients, packed codes."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    is_absent,
    is_float_array,
    per_leaf,
)
from jaxcompress.core.packed import fake_quantize, is_static, quantize
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats import (
    Format,
    Granularity,
    Rounding,
    check_format,
    clipped_ste,
    granularity_for,
    half_even,
    stochastic,
)
from jaxcompress.quantize.ranges.min_max import (
    Calibrator,
    check_calibrator,
    min_max,
    range_of,
    refuse_non_finite,
)


class Drawn(NamedTuple):
    """The buffers of a leaf that is rounded at random."""

    qparams: Any
    key: Array  # uint32 [2], threefry; `update` draws the next


def qparams_of(
    x: Array, format: Format, where: Granularity, *, calibrate: Calibrator | None = None
) -> Any:
    """The format's arrays for x: from its blocks' ranges, found by the calibrator.

    Without a calibrator by the format's own rule, where it has one (ternary, binary, k-means),
    else min-max.

    Raises:
      ValueError: x is concrete and holds NaN or Inf; an axis is out of range.
    """
    refuse_non_finite("an array to quantize", x)
    run = _compiled_qparams if is_static(format) else _qparams
    return run(x, format=format, granularity=where, calibrate=calibrate)


def _qparams(x, *, format, granularity, calibrate):
    blocked, axes = granularity.split(x), granularity.reduce_axes(x.shape)
    valid = granularity.valid(x.shape)
    fit = getattr(format, "fit", None)
    if calibrate is None and fit is not None:
        return fit(blocked, axes=axes, where=valid, dtype=x.dtype)
    low, high = range_of(calibrate or min_max(), blocked, format, axes=axes, where=valid)
    return format.qparams(low, high, dtype=x.dtype)


def made_for(format: Format, where: Granularity) -> str | None:
    """The `maker` of states of scales: int4 and int8 have scales of the same shapes.

    None where the number of bits is traced.
    """
    if not is_static(format):
        return None
    shared = f"block {where.block}" if where.block else f"axis {where.axis}, group {where.group}"
    return f"{getattr(format, 'name', type(format).__name__)} ({shared})"


# Compiled also where the caller is not: one program instead of one per operation.
_compiled_qparams = jax.jit(_qparams, static_argnames=("format", "granularity", "calibrate"))


def fake_quant(
    x: Array,
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    qparams: Any = None,
    calibrate: Calibrator | None = None,
    rounding: Rounding = half_even,
    key: Array | None = None,
    ste: Callable[[Array, Array], Array] = clipped_ste,
) -> Array:
    """The array that a forward pass sees when x is stored in `format`.

    Args:
      x: floating point, any shape.
      format: e.g. `formats.integer(8)`.
      axis: channel axes, each index with its own scale; None: one scale for the tensor.
      group: elements per scale along what remains, flattened; the last group may be shorter.
        None: the format's own (32 for MX, 16 for NVFP4, 64 for NF4), else all.
      block: sizes of the tiles of the last axes that share a scale, instead of axis and group.
      qparams: scales found before; None: from x itself, by the calibrator.
      calibrate: default: the format's own rule (ternary, binary, k-means), else `min_max()`.
      rounding: `formats.half_even`, `half_away` or `stochastic`.
      key: of `stochastic`.
      ste: `formats.clipped_ste` (gradient 1 inside the range, 0 outside) or `identity_ste`.

    Returns:
      Same shape and dtype.

    >>> from jaxcompress.formats import integer
    >>> print(fake_quant(jnp.array([0.0, 0.2, -0.7]), integer(4)))
    [ 0.   0.2 -0.7]
    """
    check_format(format)
    check_calibrator(calibrate)
    if not is_float_array(x):
        raise TypeError(f"x must be a floating point array, got {getattr(x, 'dtype', type(x))}")
    where = granularity_for(format, axis, group, block)
    if qparams is None:
        qparams = qparams_of(jax.lax.stop_gradient(x), format, where, calibrate=calibrate)
    return ste(
        x,
        fake_quantize(x, qparams, format=format, granularity=where, rounding=rounding, key=key),
    )


def weights(
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    calibrate: Calibrator | None = None,
    rounding: Rounding = half_even,
    seed: int = 0,
    ste: Callable[[Array, Array], Array] = clipped_ste,
) -> Compressor:
    """Stores every floating point leaf in `format`, with scales per tensor, channel, group, block.

    Scales live in the state's buffers and are refreshed by `update`, so that what is trained is
    what ships, bit for bit. Leaves of integers or bools pass unchanged; choose leaves with
    `by_path`.

    Args:
      format: e.g. `formats.integer(4)`, `formats.mxfp4()`.
      axis: channel axes, each index with its own scale; None: one scale per leaf. Flax kernels
        have their output channels last: axis=-1.
      group: elements per scale along the remaining axes, flattened; None: the format's own (32 for
        MX, 16 for NVFP4, 64 for NF4), else all.
      block: sizes of the tiles of the last axes that share a scale, instead of axis and group:
        (128, 128).
      calibrate: how the range is found: `min_max()`, `percentile()`, `mse()`, `octav()`, `kl()`.
        Default: the format's own rule (ternary, binary, k-means), else `min_max()`.
      rounding: `formats.half_even`, `half_away` or `stochastic`, whose key lies in the state: one
        draw per update.
      seed: of `stochastic`; every leaf has its own key.
      ste: `formats.clipped_ste` (gradient 1 inside the range, 0 outside) or `identity_ste`.

    Raises:
      ValueError: (at init, eager) NaN or Inf in a leaf; an axis out of range; with the path.

    Source: Jacob et al. 2018, arXiv 1712.05877; straight-through: arXiv 1308.3432.

    >>> from jaxcompress import core, formats
    >>> comp = weights(formats.integer(4), axis=-1)
    >>> params = {"kernel": jnp.array([[0.7, -0.1], [0.33, 0.0]])}
    >>> packed = comp.pack(params, comp.init(params))
    >>> core.packed_bytes(packed)  # four codes of half a byte, two scales
    10
    """
    check_format(format)
    check_calibrator(calibrate)
    where = granularity_for(format, axis, group, block)
    draws = rounding is stochastic

    def qparams(w):
        return qparams_of(w, format, where, calibrate=calibrate)

    def parts(state):
        if is_absent(state.buffers) and (draws or format.metadata_bytes(1)):
            raise ValueError("the state holds no scales: it was made by another compressor")
        found, key = state.buffers if draws else (state.buffers, None)
        if key is not None:
            key = jax.random.wrap_key_data(key, impl="threefry2x32")
        how = {"format": format, "granularity": where, "rounding": rounding, "key": key}
        return found, how

    def init(w):
        found = qparams(w)
        return CompressState(buffers=Drawn(found, jnp.zeros(2, jnp.uint32)) if draws else found)

    def apply(w, state):
        found, how = parts(state)
        return ste(w, fake_quantize(w, found, **how))

    def update(w, state, *, grads=None, **extra):
        del grads, extra
        if not draws:
            return state._replace(buffers=qparams(w))
        _, how = parts(state)
        return state._replace(buffers=Drawn(qparams(w), _key_data(how["key"], 1)))

    def pack(w, state):
        refuse_non_finite("an array to pack", w)
        found, how = parts(state)
        return quantize(w, found, **how)

    maker = made_for(format, where)
    comp = per_leaf(init, apply, update=update, pack=pack, maker=maker)
    if not draws:
        return comp
    with_keys = lambda params: _with_keys(comp.init(params), params, seed)
    return comp._replace(init=on_any_mesh(with_keys))


def _key_data(key: Array, number: int) -> Array:
    return jax.random.key_data(jax.random.fold_in(key, number))


def _with_keys(state: CompressState, params: Any, seed: int) -> CompressState:
    """The state with a key of its own for each leaf, from the seed and the leaf's path."""
    root = jax.random.key(seed, impl="threefry2x32")
    treedef = jax.tree.structure(params)
    paths = [path for path, _ in leaves_with_paths(params)]
    leaves = [] if is_absent(state.buffers) else treedef.flatten_up_to(state.buffers)
    drawn = [
        leaf._replace(key=_key_data(root, zlib.crc32(path.encode())))
        if isinstance(leaf, Drawn)
        else leaf
        for path, leaf in zip(paths, leaves, strict=bool(leaves))
    ]
    return state._replace(buffers=treedef.unflatten(drawn)) if leaves else state
