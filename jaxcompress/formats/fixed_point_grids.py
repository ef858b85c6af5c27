"""Fixed point Qm.n: a sign, m integer bits and n fraction bits; the scale is 2**-n for all."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.bits import signed
from jaxcompress.formats.granularities import Granularity
from jaxcompress.formats.rounding import Rounding, half_even, uniform_codes, uniform_ste

_WHOLE = Granularity()


@dataclass(frozen=True)
class FixedPoint:
    """x = code * 2**-n with codes in [-2**(m+n), 2**(m+n) - 1]; build it with `fixed_point`."""

    integer_bits: int
    fraction_bits: int

    group = None
    symmetric = False  # one number more below zero

    def metadata_bytes(self, blocks: int) -> int:
        """No scales: 0."""
        del blocks
        return 0

    @property
    def bits(self) -> int:
        """Bits per value, sign included."""
        return 1 + self.integer_bits + self.fraction_bits

    @property
    def name(self) -> str:
        """`q2.5`; `formats.parse` reads it."""
        return f"q{self.integer_bits}.{self.fraction_bits}"

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest code."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> tuple[()]:
        """Nothing: the grid is fixed. Numbers outside [-2**m, 2**m - 2**-n] saturate."""
        del low, high, dtype
        return ()

    def _place(self) -> tuple[Array, Array, Array]:
        # scale, lowest and highest code, float32
        low, high = self.bounds
        return jnp.float32(2.0**-self.fraction_bits), jnp.float32(low), jnp.float32(high)

    def fake_quant(
        self,
        x: Array,
        qparams: tuple[()] = (),
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """The nearest number of the grid, in x's dtype; straight-through inside the range."""
        del qparams, where
        return uniform_ste(x, *self._place(), rounding=rounding, key=key).astype(x.dtype)

    def encode(
        self,
        x: Array,
        qparams: tuple[()] = (),
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """Unsigned (two's complement) codes below 2**bits; uint8, or uint16 above 8 bits."""
        del qparams, where
        # q = clip(round(x * 2^n), -2^(m+n), 2^(m+n) - 1); a power of two divides exactly
        q = uniform_codes(x, *self._place(), rounding=rounding, key=key)
        q = q.astype(jnp.int32) & (2**self.bits - 1)
        return q.astype(jnp.uint8 if self.bits <= 8 else jnp.uint16)

    def decode(
        self,
        codes: Array,
        qparams: tuple[()] = (),
        *,
        where: Granularity = _WHOLE,
        dtype: Any = jnp.float32,
    ) -> Array:
        """The numbers of the codes: exactly what `fake_quant` gave."""
        del qparams, where
        q = signed(codes, self.bits)
        return (q.astype(jnp.float32) * jnp.float32(2.0**-self.fraction_bits)).astype(dtype)


def fixed_point(integer_bits: int, fraction_bits: int) -> FixedPoint:
    """Signed fixed point Qm.n of 1 + m + n bits, range [-2**m, 2**m - 2**-n], step 2**-n.

    m may be negative (all bits behind the point, the first of them unused) and so may n.

    Raises:
      ValueError: 1 + m + n is not 1 to 16, or m or n beyond 100.
      TypeError: m or n is not an integer.

    >>> q = fixed_point(0, 3)
    >>> print(q.fake_quant(jnp.array([0.3, -1.2, 0.99])))
    [ 0.25  -1.     0.875]
    """
    for name, bits in (("integer_bits", integer_bits), ("fraction_bits", fraction_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise TypeError(f"fixed_point: {name} must be an integer, got {bits!r}")
        if abs(bits) > 100:
            raise ValueError(f"fixed_point: {name} must be within 100, got {bits}")
    total = 1 + integer_bits + fraction_bits
    if not 1 <= total <= 16:
        raise ValueError(
            f"fixed_point(integer_bits, fraction_bits): 1 + {integer_bits} + {fraction_bits} = "
            f"{total} bits; the sum must be 1 to 16"
        )
    return FixedPoint(integer_bits, fraction_bits)
