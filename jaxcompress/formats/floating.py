"""Small floating point numbers: float8, float6, float4 and powers of two.

Sources: OCP 8-bit Floating Point Specification (OFP8) v1.0; OCP Microscaling Formats v1.0;
Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.bits import signed
from jaxcompress.formats.rounding import Rounding, clip_ste, half_even


@dataclass(frozen=True)
class FloatElement:
    """Numbers (-1)**s * 2**(e - bias) * 1.m, subnormals included, without a scale.

    Codes are the bit patterns: sign, `exponent_bits`, `mantissa_bits`. Numbers beyond the largest
    saturate; infinities and NaN are never produced, but decoded.

    Attributes:
      name: without the scale, e.g. `float8_e4m3`.
      exponent_bits, mantissa_bits: 1 to 8 and 0 to 7, at most 8 with the sign.
      specials: "none": all codes are numbers; "nan": the largest magnitude is NaN (E4M3);
        "ieee": the largest exponent holds infinity and NaN (E5M2).
      bias: of the exponent; default 2**(exponent_bits - 1) - 1.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: str = "none"
    bias: int | None = None

    symmetric = True

    def __post_init__(self):
        if not (1 <= self.exponent_bits and 0 <= self.mantissa_bits and self.bits <= 8):
            raise ValueError(
                f"{self.name}: need exponent_bits >= 1, mantissa_bits >= 0 and at most 8 bits "
                f"with the sign, got {self.exponent_bits} and {self.mantissa_bits}"
            )
        if self.specials not in ("none", "nan", "ieee"):
            raise ValueError(f"specials must be 'none', 'nan' or 'ieee', got {self.specials!r}")

    @property
    def bits(self) -> int:
        """Bits per value, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1 if self.bias is None else self.bias

    @property
    def _top_code(self) -> int:
        # the largest magnitude that is a number
        taken = {"none": 0, "nan": 1, "ieee": 2**self.mantissa_bits}[self.specials]
        return 2 ** (self.bits - 1) - 1 - taken

    @property
    def largest(self) -> float:
        """The largest number."""
        exponent, fraction = divmod(self._top_code, 2**self.mantissa_bits)
        significand = fraction / 2**self.mantissa_bits + (1.0 if exponent else 0.0)
        return significand * 2.0 ** (max(exponent, 1) - self._bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with a leading one."""
        return 2.0 ** (1 - self._bias)

    @property
    def low(self) -> float:
        """The lowest number."""
        return -self.largest

    @property
    def high(self) -> float:
        """The highest number."""
        return self.largest

    def snap(self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None) -> Array:
        """The nearest number, saturating, float32; the sign of a zero is that of u."""
        u = u.astype(jnp.float32)
        size = clip_ste(jnp.abs(u), 0.0, self.largest)
        # 2**floor(log2(size)) from the bits; below the normal numbers the step stays the same
        power = jax.lax.bitcast_convert_type(_bits(size) & 0x7F800000, jnp.float32)
        power = jnp.maximum(power, self.smallest_normal)
        inverse = jax.lax.bitcast_convert_type((254 << 23) - _bits(power), jnp.float32)
        scale = 2.0**self.mantissa_bits
        value = rounding(size * inverse * scale, key) * (power * (1 / scale))
        # Some roundings may step over the end.
        return jnp.copysign(jnp.minimum(value, self.largest), u)

    def encode(
        self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None
    ) -> Array:
        """uint8 codes of the nearest numbers."""
        value = self.snap(u, rounding=rounding, key=key)
        size, shift = jnp.abs(value), 23 - self.mantissa_bits
        normal = (_bits(size) >> shift) - ((127 - self._bias) << self.mantissa_bits)
        small = size * (2.0**self.mantissa_bits / self.smallest_normal)
        code = jnp.where(size < self.smallest_normal, small.astype(jnp.int32), normal)
        sign = (_bits(value) >> 31) & 1
        return (code | (sign << (self.bits - 1))).astype(jnp.uint8)

    def decode(self, codes: Array) -> Array:
        """The numbers of the codes, float32, specials included."""
        codes = codes.astype(jnp.int32)
        code = codes & (2 ** (self.bits - 1) - 1)
        exponent, shift = code >> self.mantissa_bits, 23 - self.mantissa_bits
        normal = (code << shift) + ((127 - self._bias) << 23)
        normal = jax.lax.bitcast_convert_type(normal, jnp.float32)
        small = code.astype(jnp.float32) * (self.smallest_normal / 2.0**self.mantissa_bits)
        value = jnp.where(exponent == 0, small, normal)
        if self.specials != "none":
            above = jnp.nan
            if self.specials == "ieee":
                above = jnp.where(code == self._top_code + 1, jnp.inf, jnp.nan)
            value = jnp.where(code > self._top_code, above, value)
        return jnp.where(codes >> (self.bits - 1) == 1, -value, value)


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


E4M3 = FloatElement("float8_e4m3", 4, 3, "nan")
E5M2 = FloatElement("float8_e5m2", 5, 2, "ieee")
E3M2 = FloatElement("float6_e3m2", 3, 2)
E2M3 = FloatElement("float6_e2m3", 2, 3)
E2M1 = FloatElement("float4_e2m1", 2, 1)


@dataclass(frozen=True)
class IntElement:
    """Two's complement fractions code * 2**-fraction_bits, |code| <= 2**(bits - 1) - 1 (MXINT8)."""

    name: str
    bits: int
    fraction_bits: int

    symmetric = True

    @property
    def largest(self) -> float:
        """The largest number."""
        return (2 ** (self.bits - 1) - 1) * 2.0**-self.fraction_bits

    @property
    def low(self) -> float:
        """The lowest number."""
        return -self.largest

    @property
    def high(self) -> float:
        """The highest number."""
        return self.largest

    def _codes(self, u, rounding, key):
        top = 2.0 ** (self.bits - 1) - 1
        codes = rounding(clip_ste(u * 2.0**self.fraction_bits, -top, top), key)
        return jnp.where(codes == 0, 0.0, codes)  # two's complement has no -0

    def snap(self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None) -> Array:
        """The nearest number, saturating, float32."""
        return self._codes(u, rounding, key) * 2.0**-self.fraction_bits

    def encode(
        self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None
    ) -> Array:
        """uint8 codes of the nearest numbers."""
        codes = self._codes(u, rounding, key).astype(jnp.int32)
        return (codes & (2**self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: Array) -> Array:
        """The numbers of the codes, float32."""
        return signed(codes, self.bits).astype(jnp.float32) * 2.0**-self.fraction_bits
