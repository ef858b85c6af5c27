"""The numerical core of GPTQ, `column_sweep`, and the scales that are found on the way."""

from typing import Any, NamedTuple

from jax import Array

from jaxcompress.core.numerics.column_sweep import Solved, solve, with_damping
from jaxcompress.core.numerics.hessian import inverse_factor, loss_of
from jaxcompress.formats import Granularity
from jaxcompress.quantize.fake_quantized_weights import qparams_of

__all__ = ["Finder", "Rounded", "inverse_factor", "loss_of", "solve", "with_damping"]

Rounded = Solved

_COLUMNS = Granularity(axis=(1,))


class Finder(NamedTuple):
    """How the scales of a block of inputs are found when it is reached."""

    format: Any
    calibrate: Any
    dtype: str  # of the leaf

    def __call__(self, rows: Array) -> Any:
        """The format's arrays, [1, N] each, for weights [block, N]."""
        rows = rows.astype(self.dtype)
        return qparams_of(rows, self.format, _COLUMNS, calibrate=self.calibrate)
