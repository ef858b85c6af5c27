"""One tensor on disk to its packed arrays, a slice of rows at a time, bit for bit as in one piece.

Rows are indices of the first axis. Which slices can be packed on their own follows from who shares
a scale: slices may cut between blocks, never through one, and their codes must fill whole bytes.
Where a format's scales depend on all blocks (one scale for the tensor, NVFP4, double quantization),
the ranges of all slices are found first, then all scales from them, then the codes: the tensor is
read twice. What fits neither way is packed in one piece.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import QTensor, quantize
from jaxcompress.core.storage.leaves import disassemble
from jaxcompress.formats import Format, Granularity, lanes, shipped
from jaxcompress.quantize import kl, mse, octav, percentile
from jaxcompress.quantize.fake_quantized_weights import qparams_of
from jaxcompress.quantize.ranges.min_max import Calibrator, min_max, range_of, refuse_non_finite

SLICE_ELEMENTS = 2**24  # float32 temporaries of 64 MiB

Read = Callable[[int, int], np.ndarray]  # (first row, last row) -> these rows


@dataclass(frozen=True)
class Settings:
    """How tensors are quantized."""

    format: Format
    where: Granularity
    calibrate: Calibrator | None = None


_CALIBRATORS = {"min_max": min_max, "mse": mse, "octav": octav, "kl": kl, "percentile": percentile}


@functools.lru_cache
def calibrator(name: str) -> Calibrator:
    """A calibrator by name: `min_max`, `mse`, `octav`, `kl`, `percentile`, `percentile:99.9`.

    Raises:
      ValueError: no such name, or a percentage that is none.
    """
    kind, _, number = name.partition(":")
    if kind not in _CALIBRATORS or (number and kind != "percentile"):
        raise ValueError(
            f"unknown calibrator {name!r}; known: {', '.join(_CALIBRATORS)}, percentile:99.9"
        )
    return percentile(float(number)) if number else _CALIBRATORS[kind]()


class Slicing(NamedTuple):
    """How a tensor is cut."""

    rows: tuple[tuple[int, int], ...]  # (first, last) of each slice
    ranges_first: bool  # scales need the ranges of all slices
    shared: bool  # blocks reach across slices


@functools.cache
def packed_shape(shape: tuple[int, ...], dtype: np.dtype, settings: Settings) -> QTensor:
    """The `QTensor` of shapes and dtypes of a tensor.

    Raises:
      ValueError: an axis is out of range; float64 without `jax_enable_x64`.
    """
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{dtype} needs jax_enable_x64; or exclude the tensor")
    return jax.eval_shape(lambda x: _pack(x, settings), jax.ShapeDtypeStruct(shape, dtype))


def slicing(shape: tuple[int, ...], dtype: np.dtype, settings: Settings) -> Slicing:
    """The slices in which a tensor is packed: at most `SLICE_ELEMENTS` each, where possible.

    >>> from jaxcompress.formats import granularity, integer
    >>> int4 = Settings(integer(4), granularity(0, 32))
    >>> slicing((50_000, 1024), np.dtype(np.float32), int4).rows
    ((0, 12500), (12500, 25000), (25000, 37500), (37500, 50000))
    """
    whole = Slicing(((0, shape[0]),), False, False)
    if math.prod(shape) <= SLICE_ELEMENTS:
        return whole
    between = _rows_between_blocks(shape, settings.where)
    inner = math.prod(shape[1:])
    run = lanes(settings.format.bits)
    unit = math.lcm(between or 1, 1 if shape[-1] % run == 0 else run // math.gcd(run, inner))
    blocks = math.prod(settings.where.scale_shape((unit, *shape[1:])))
    unit *= _run(settings.format) // math.gcd(_run(settings.format), blocks)
    most = max(SLICE_ELEMENTS // inner // unit, 1) * unit
    step = -(-shape[0] // -(-shape[0] // most))
    step = -(-step // unit) * unit
    rows = tuple((a, min(a + step, shape[0])) for a in range(0, shape[0], step))
    alone = _own_scales(settings.format, blocks_end=between is not None)
    if alone or len(rows) == 1:
        return Slicing(rows, False, False)
    return Slicing(rows, True, between is None) if _by_ranges(shape, dtype, settings) else whole


def _rows_between_blocks(shape: tuple[int, ...], where: Granularity) -> int | None:
    # Rows after which a block always ends, if scales lie in the order of the rows.
    if where.block is not None:
        return where.block[-len(shape)] if len(where.block) >= len(shape) else 1
    channels = where.channels(shape)
    if 0 in channels:
        return 1
    rest = [a for a in range(len(shape)) if a not in channels]
    if where.group is None or rest != list(range(len(rest))):
        return None
    inner = math.prod(shape[a] for a in rest[1:])
    return where.group // math.gcd(where.group, inner)


def _own_scales(format: Format, *, blocks_end: bool) -> bool:
    # Whether a slice has all it needs: nothing is stored per tensor or per run of blocks.
    one, many = format.metadata_bytes(1), format.metadata_bytes(1000)
    return many == 1000 * one and (blocks_end or one == 0)


def _by_ranges(shape: tuple[int, ...], dtype: np.dtype, settings: Settings) -> bool:
    # Whether scales come from ranges, and the scales of a slice are a slice of them.
    if settings.calibrate is None and hasattr(settings.format, "fit"):
        return False
    if _rows_between_blocks(shape, settings.where) is None:
        # Blocks that reach across slices: their ranges merge, those of other calibrators do not.
        if settings.where.group is not None or settings.calibrate is not None:
            return False
    scales = settings.where.scale_shape(shape)
    fields = jax.tree.leaves(packed_shape(shape, dtype, settings).qparams)
    runs = -(-math.prod(scales) // _run(settings.format))
    return all(f.shape in (scales, (runs,)) or set(f.shape) <= {1} for f in fields)


def _run(format: Format) -> int:
    # Blocks that share a number of their own, in double quantization.
    return getattr(getattr(format, "scale", None), "run", 1)


def packed_slices(
    name: str, read: Read, shape: tuple[int, ...], dtype: np.dtype, settings: Settings
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The packed arrays of a tensor, in pieces that follow one another in the file.

    Yields:
      (rows done, {name of the array in the file: its next piece}).

    Raises:
      ValueError: NaN or Inf.
    """
    plan = slicing(shape, dtype, settings)
    scales = _all_scales(read, plan, shape, dtype, settings) if plan.ranges_first else None
    for first, last in plan.rows:
        x = jnp.asarray(read(first, last))
        if scales is None:
            packed = _pack(x, settings)
        else:
            part = scales if plan.shared else _scales_of_rows(scales, first, last, shape, settings)
            packed = quantize(x, part, format=settings.format, granularity=settings.where)
        pieces, _ = disassemble(name, packed)
        if scales is not None:  # they are written once, all of them
            pieces = {f"{name}.codes": pieces[f"{name}.codes"]}
        if scales is not None and first == 0:
            whole = QTensor(packed.codes, shipped(settings.format, scales), *_static(packed))
            pieces = {**disassemble(name, whole)[0], **pieces}
        yield last, pieces


def _static(packed: QTensor) -> tuple[Any, ...]:
    return packed.format, packed.granularity, packed.shape, packed.dtype


def _pack(x: jax.Array, settings: Settings) -> QTensor:
    format, where = settings.format, settings.where
    scales = qparams_of(x, format, where, calibrate=settings.calibrate)
    return quantize(x, scales, format=format, granularity=where)


def _all_scales(read, plan: Slicing, shape, dtype, settings: Settings) -> Any:
    lows, highs = [], []
    for first, last in plan.rows:
        x = jnp.asarray(read(first, last))
        refuse_non_finite("an array to quantize", x)
        low, high = _range(x, settings)
        lows.append(np.asarray(low))
        highs.append(np.asarray(high))
    if plan.shared:
        low, high = np.minimum.reduce(lows), np.maximum.reduce(highs)
    else:
        scale_shape = settings.where.scale_shape(shape)
        low, high = (np.concatenate(ends).reshape(scale_shape) for ends in (lows, highs))
    return _scales_from(low, high, format=settings.format, dtype=dtype)


@functools.partial(jax.jit, static_argnames="settings")
def _range(x: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    where = settings.where
    return range_of(
        settings.calibrate or min_max(),
        where.split(x),
        settings.format,
        axes=where.reduce_axes(x.shape),
        where=where.valid(x.shape),
    )


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def _scales_from(low, high, *, format: Format, dtype: np.dtype) -> Any:
    return format.qparams(low, high, dtype=dtype)


def _scales_of_rows(scales: Any, first: int, last: int, shape, settings: Settings) -> Any:
    before, upto, whole = (
        settings.where.scale_shape((rows, *shape[1:])) for rows in (first, last, shape[0])
    )
    runs = [-(-math.prod(blocks) // _run(settings.format)) for blocks in (before, upto, whole)]

    def cut(field):
        if field.shape == whole:
            return field[before[0] : upto[0]]
        return field[runs[0] : runs[1]] if field.shape == (runs[2],) else field

    return jax.tree.map(cut, scales)
