"""Fixed codebooks: NF4, additive powers of two, your own."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.codebooks.lookup import static_table
from jaxcompress.formats.rounding import Rounding, half_even
from jaxcompress.formats.scaled import Scaled
from jaxcompress.formats.scales import DoubledScale, FloatScale

# Quantiles of a normal distribution, normalised to [-1, 1]; QLoRA, appendix E.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Levels:
    """The numbers of a sorted table; a code is the index in it."""

    name: str
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max((len(self.levels) - 1).bit_length(), 1)

    @property
    def largest(self) -> float:
        """The largest magnitude, which the scale brings to the largest of the block."""
        return max(-self.levels[0], self.levels[-1])

    @property
    def low(self) -> float:
        """The lowest number."""
        return self.levels[0]

    @property
    def high(self) -> float:
        """The highest number."""
        return self.levels[-1]

    @property
    def symmetric(self) -> bool:
        """Whether Q(-x) = -Q(x)."""
        return self.levels == tuple(-x for x in reversed(self.levels)) and len(self.levels) % 2 == 1

    def snap(self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None) -> Array:
        """The nearest level, float32."""
        table = static_table(self.levels)
        level = table.at(table.nearest(u, rounding=rounding, key=key))
        return jnp.where(jnp.isnan(u), u, level)

    def encode(
        self, u: Array, *, rounding: Rounding = half_even, key: Array | None = None
    ) -> Array:
        """uint8 codes of the nearest levels."""
        nearest = static_table(self.levels).nearest(u, rounding=rounding, key=key)
        return nearest.astype(jnp.uint8)

    def decode(self, codes: Array) -> Array:
        """The levels of the codes, float32."""
        return static_table(self.levels).at(codes)


def codebook(
    name: str,
    levels: Sequence[float],
    *,
    group: int | None = None,
    scale: FloatScale | DoubledScale | None = None,
) -> Scaled:
    """Your own grid: 2 to 256 numbers, scaled so that the largest magnitude meets the block's.

    Args:
      name: of the format, e.g. in a checkpoint; to load one, pass the format to `export.load`.
      levels: in any order. With 0 among them zeros stay zeros (masks and padding rely on it).
      group: elements per scale unless the caller says otherwise.
      scale: how scales are stored, default `FloatScale()`.

    Raises:
      ValueError: fewer than 2 or more than 256 levels, equal ones, NaN or Inf, or all zero.

    >>> thirds = codebook("thirds", [-1, -1 / 3, 0, 1 / 3, 1])
    >>> print(thirds.bits, thirds.fake_quant(jnp.array([0.2, -0.9]), thirds.qparams(-1.0, 1.0)))
    3 [ 0.33333334 -1.        ]
    """
    values = tuple(sorted(float(x) for x in levels))
    if not 2 <= len(values) <= 256:
        raise ValueError(f"{name}: levels must be 2 to 256 numbers, got {len(values)}")
    if not all(map(math.isfinite, values)) or len({float(jnp.float32(x)) for x in values}) < len(
        values
    ):
        raise ValueError(f"{name}: levels must be finite and distinct as float32, got {levels}")
    return Scaled(Levels(name, values), scale or FloatScale(), group=group, label=name)


def nf4(*, double_quantization: bool = True) -> Scaled:
    """NF4: 16 quantiles of a normal distribution, absmax scales in blocks of 64.

    Scales are quantized themselves (8 bits in runs of 256): 4.127 bits per value; without
    `double_quantization` they are float32: 4.5 bits.
    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E.

    >>> from jaxcompress.formats import bits_per_value
    >>> round(bits_per_value(nf4()), 3), bits_per_value(nf4(double_quantization=False))
    (4.127, 4.5)
    """
    levels = Levels("nf4", NF4_LEVELS)
    if double_quantization:
        return Scaled(levels, DoubledScale(), group=64, label="nf4")
    return Scaled(levels, FloatScale(), group=64, label="nf4_float32_scale")


def additive_power_of_two(bits: int, *, terms: int = 2) -> Scaled:
    """Sums of `terms` powers of two: few shifts and additions instead of a multiplication.

    A magnitude is p_0 + ... + p_{n-1} with p_i in {0, 2**-i, 2**-(i+n), 2**-(i+2n), ...}; its
    bits - 1 bits are shared out evenly, the first terms taking what is left over.
    Source: Li et al. 2020, Additive Powers-of-Two Quantization, arXiv 1909.13144, eq. 5.

    Raises:
      ValueError: bits outside 2 to 8, or more terms than bits - 1.

    >>> [round(x, 4) for x in additive_power_of_two(3).element.levels]
    [-1.0, -0.6667, -0.3333, 0.0, 0.3333, 0.6667, 1.0]
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"additive_power_of_two(bits): bits must be 2 to 8, got {bits}")
    if not 1 <= terms <= bits - 1:
        raise ValueError(f"terms must be 1 to bits - 1 = {bits - 1}, got {terms}")
    widths = [(bits - 1 + terms - 1 - i) // terms for i in range(terms)]
    choices = [
        [0.0] + [2.0 ** -(i + j * terms) for j in range(2**width - 1)]
        for i, width in enumerate(widths)
    ]
    sums = sorted({math.fsum(parts) for parts in itertools.product(*choices)})
    magnitudes = [x / sums[-1] for x in sums]
    levels = tuple([-x for x in reversed(magnitudes[1:])] + magnitudes)
    name = f"apot{bits}" if terms == 2 else f"apot{bits}_{terms}"
    return Scaled(Levels(name, levels), FloatScale(), label=name)
