"""Uniform integer grids: x = scale * (code - zero_point).

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, CVPR 2018, arXiv 1712.05877, eq. 1 and section 3.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats.bits import signed
from jaxcompress.formats.granularities import Granularity
from jaxcompress.formats.rounding import Rounding, half_even, uniform_codes, uniform_ste
from jaxcompress.formats.scales import QParams, absmax_scale, finite

_WHOLE = Granularity()


@dataclass(frozen=True)
class Integer:
    """Integer codes of `bits` bits; build it with `integer`.

    Symmetric codes are two's complement in [-qmax, qmax] (narrow) or [-qmax - 1, qmax], with
    qmax = 2**(bits - 1) - 1; asymmetric codes are unsigned in [0, 2**bits - 1].
    `bits` may be a traced number as long as nothing is packed.
    """

    bits: int
    symmetric: bool = True
    narrow: bool = True

    group = None

    @property
    def name(self) -> str:
        """`int4`, `int4_full` (full range), `uint4` (asymmetric); `formats.parse` reads it."""
        if not self.symmetric:
            return f"uint{self.bits}"
        return f"int{self.bits}" if self.narrow else f"int{self.bits}_full"

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of so many blocks: float32 each, and a uint8 zero point."""
        return (4 if self.symmetric else 5) * blocks

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Lowest and highest code, zero point not taken off."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        qmax = 2 ** (self.bits - 1) - 1
        if not isinstance(self.bits, int):
            return (-jnp.maximum(qmax, 1) if self.narrow else -qmax - 1), qmax
        # One bit has no narrow range besides zero: it is two's complement, {-1, 0}.
        return (-qmax if self.narrow and self.bits > 1 else -qmax - 1), qmax

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> QParams:
        """Scale and zero point that cover [low, high], which contains 0.

        S = max(-low, high) / qmax, or S = (high - low) / (q+ - q-), Z = round(-low / S).
        A block of zeros gets scale 1. Scales are float32 and never so small that numbers of
        `dtype` could not hold the grid.
        """
        qmin, qmax = self.bounds
        if self.symmetric:
            steps = max(qmax, 1) if isinstance(qmax, int) else jnp.maximum(qmax, 1)
            span, unit = jnp.maximum(-low, high), 1.0
        else:
            # In halves, which are exact: high - low may overflow.
            steps = qmax - qmin
            span, unit = high * 0.5 - low * 0.5, 2.0
        scale = absmax_scale(span, steps, unit=unit, dtype=dtype)
        # NaN is not equal to itself: it goes into the scale, not for a block of zeros.
        scale = jnp.where(low == high, jnp.ones_like(scale), scale)
        if self.symmetric:
            return QParams(scale)
        zero = jnp.clip(jnp.round(-low / scale), 0.0, jnp.asarray(qmax, jnp.float32))
        return QParams(scale, zero.astype(jnp.uint8))

    def _ends(self, qparams: QParams) -> tuple[Array, Array]:
        # Lowest and highest code with the zero point taken off, float32.
        low, high = (jnp.asarray(bound, jnp.float32) for bound in self.bounds)
        if self.symmetric:
            return low, high
        zero = qparams.zero_point.astype(jnp.float32)
        return low - zero, high - zero

    def fake_quant(
        self,
        x: Array,
        qparams: QParams,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """The nearest number of the grid, in x's dtype; straight-through inside the range."""
        p = _expanded(qparams, where, x.shape)
        ends = self._ends(p)
        return finite(uniform_ste(x, p.scale, *ends, rounding=rounding, key=key), x.dtype)

    def encode(
        self,
        x: Array,
        qparams: QParams,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """Unsigned codes below 2**bits, uint8."""
        # q = clip(round(x / S), q- - Z, q+ - Z)
        p = _expanded(qparams, where, x.shape)
        q = uniform_codes(x, p.scale, *self._ends(p), rounding=rounding, key=key)
        q = q.astype(jnp.int32)
        if not self.symmetric:
            return (q + p.zero_point.astype(jnp.int32)).astype(jnp.uint8)
        return (q & (2**self.bits - 1)).astype(jnp.uint8)

    def decode(
        self,
        codes: Array,
        qparams: QParams,
        *,
        where: Granularity = _WHOLE,
        dtype: Any = jnp.float32,
    ) -> Array:
        """The numbers of the codes: exactly what `fake_quant` gave."""
        p = _expanded(qparams, where, codes.shape)
        if self.symmetric:
            q = signed(codes, self.bits)
        else:
            q = codes.astype(jnp.int32) - p.zero_point.astype(jnp.int32)
        return finite(q.astype(jnp.float32) * p.scale, dtype)


def _expanded(qparams: QParams, where: Granularity, shape: tuple[int, ...]) -> QParams:
    return jax.tree.map(lambda p: where.expand(p, shape), qparams)


def integer(bits: int, *, symmetric: bool = True, narrow: bool = True) -> Integer:
    """Integers of 1 to 8 bits, one scale (and zero point, if not symmetric) per block.

    Args:
      bits: 1 to 8; a traced number where only the fake-quantized view is needed.
      symmetric: zero point 0 and a range around zero; else [low, high] is covered as it is.
      narrow: leave out the lowest code of a symmetric grid, so that Q(-x) = -Q(x). At 1 bit it
        does not apply: the codes are {-1, 0}.

    Raises:
      ValueError: bits outside 1 to 8.
      TypeError: bits is not an integer.

    >>> integer(4).bounds, integer(4, symmetric=False).bounds, integer(8).name
    ((-7, 7), (0, 15), 'int8')
    """
    if isinstance(bits, bool) or not (isinstance(bits, int) or hasattr(bits, "dtype")):
        raise TypeError(f"integer(bits): bits must be an integer from 1 to 8, got {bits!r}")
    if isinstance(bits, np.integer):
        bits = int(bits)
    if isinstance(bits, int) and not 1 <= bits <= 8:
        raise ValueError(f"integer(bits): bits must be 1 to 8, got {bits}")
    return Integer(bits, symmetric, narrow if symmetric else True)
