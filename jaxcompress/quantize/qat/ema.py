"""Weights on a grid whose range follows them slowly."""

from typing import Any, NamedTuple

from jaxcompress.core.compressor import Compressor, CompressState, per_leaf
from jaxcompress.core.packed import fake_quantize, quantize
from jaxcompress.formats import Format, check_format, granularity_for
from jaxcompress.quantize.fake_quantized_weights import made_for
from jaxcompress.quantize.ranges.min_max import MovingAverage, moving_average, refuse_non_finite


class Followed(NamedTuple):
    """The buffers of a leaf."""

    average: MovingAverage  # of the range
    qparams: Any  # of the format, for that range


def ema_ranges(
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    block: int | tuple[int, ...] | None = None,
    decay: float = 0.99,
) -> Compressor:
    """`quantize.weights` with the moving average of the weights' range instead of the range.

    range <- decay range + (1 - decay) (min(w, 0), max(w, 0)) at every `update`; it starts from the
    weights of `init`. The derivative is 1 inside the range, 0 outside. For activations take
    `activations(..., calibrate=moving_average(decay))`.

    Args:
      format, axis, group, block: as of `quantize.weights`.
      decay: at least 0 (the range itself) and below 1.

    Raises:
      ValueError: decay outside [0, 1); (at init, eager) NaN or Inf in a leaf, with the path.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.
    """
    check_format(format)
    average = moving_average(decay)
    where = granularity_for(format, axis, group, block)

    def followed(w, old):
        refuse_non_finite("an array to quantize", w)
        axes, valid = where.reduce_axes(w.shape), where.valid(w.shape)
        new = average.update(old, where.split(w), axes=axes, where=valid)
        found = format.qparams(*average.range(new, format), dtype=w.dtype)
        return CompressState(buffers=Followed(new, found))

    def init(w):
        return followed(w, average.init(where.scale_shape(w.shape)))

    def apply(w, state):
        return fake_quantize(w, state.buffers.qparams, format=format, granularity=where)

    def update(w, state, *, grads=None, **extra):
        del grads, extra
        return followed(w, state.buffers.average)

    def pack(w, state):
        refuse_non_finite("an array to pack", w)
        return quantize(w, state.buffers.qparams, format=format, granularity=where)

    maker = made_for(format, where)
    return per_leaf(init, apply, update=update, pack=pack, maker=maker)
