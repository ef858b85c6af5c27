"""Ternary and binary weights: a sign, or a sign and zero, times a mean magnitude.

Their outer levels are means of all beyond: nothing saturates, and the gradient is 1 everywhere.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats.bits import TRIT
from jaxcompress.formats.exact import exact_mean
from jaxcompress.formats.granularities import Granularity
from jaxcompress.formats.rounding import Rounding, half_even, identity_ste, over_scale
from jaxcompress.formats.scales import finite

_WHOLE = Granularity()


class TernaryScales(NamedTuple):
    """x = scale, 0 or -negative; one of each per block.

    `threshold` only encodes and does not ship; `()` means halfway, where nearest rounding cuts.
    """

    scale: Array  # float32
    negative: Any = ()  # float32, or () where it is `scale`
    threshold: Any = ()  # float32, or ()


def _mean_where(size: Array, chosen: Array, axes: tuple[int, ...]) -> Array:
    # mean of `size` where `chosen`; 0 where nothing is
    count = jnp.sum(chosen, axis=axes, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    return exact_mean(jnp.where(chosen, size, 0.0), count, axes=axes)


def _as_float(x: Array, where: Array | None) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    valid = jnp.ones((1,) * x.ndim, bool) if where is None else where
    return jnp.where(valid, x, 0.0), jnp.broadcast_to(valid, x.shape)


@dataclass(frozen=True)
class Ternary:
    """-1, 0, 1 times a scale per block, five to a byte; build it with one of the factories."""

    rule: str
    refit: bool = False

    bits = TRIT
    group = None
    symmetric = True  # TTQ: of codes, not of values

    @property
    def name(self) -> str:
        """`ternary`, `ternary_absmean`, `ternary_absmean_refit` or `ternary_ttq`."""
        names = {"twn": "ternary", "absmean": "ternary_absmean", "ttq": "ternary_ttq"}
        return names[self.rule] + ("_refit" if self.refit else "")

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return (8 if self.rule == "ttq" else 4) * blocks

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> TernaryScales:
        """Scales from a range: its ends, cut halfway; zero blocks get scale 0."""
        del dtype
        if self.rule == "ttq":
            return TernaryScales(high, -low, ())
        return TernaryScales(jnp.maximum(-low, high), (), ())

    def fit(
        self, x: Array, *, axes: tuple[int, ...], where: Array | None, dtype: Any
    ) -> TernaryScales:
        """Scales and threshold of a blocked view by the format's own rule."""
        del dtype
        x, valid = _as_float(x, where)
        size = jnp.abs(x)
        if self.rule == "ttq":
            # Delta = 0.05 max|W|
            threshold = np.float32(0.05) * jnp.max(size, axis=axes, keepdims=True, initial=0.0)
            above = (
                _mean_where(size, valid & (x > threshold), axes),
                _mean_where(size, valid & (x < -threshold), axes),
            )
            return TernaryScales(*above, threshold)
        mean = _mean_where(size, valid, axes)
        if self.rule == "absmean":
            # W~ = clip(round(W / gamma), -1, 1), gamma = mean|W|
            if not self.refit:
                return TernaryScales(mean, (), ())
            threshold = 0.5 * mean
        else:
            threshold = np.float32(0.7) * mean  # Delta = 0.7 mean|W|
        # alpha = mean(|W| : |W| > Delta)
        return TernaryScales(_mean_where(size, size > threshold, axes), (), threshold)

    def shipped(self, qparams: TernaryScales) -> TernaryScales:
        """What decoding needs: the scales without the threshold."""
        return qparams._replace(threshold=())

    def _sides(self, qparams, where, shape):
        # the scales of the positive and of the negative numbers, against an array of `shape`
        scale = where.expand(qparams.scale, shape)
        one = isinstance(qparams.negative, tuple)
        return scale, scale if one else where.expand(qparams.negative, shape)

    def _signs(self, x, qparams, where, rounding, key):
        # -1, 0 or 1, float32
        x = x.astype(jnp.float32)
        scale, negative = self._sides(qparams, where, x.shape)
        side = jnp.where(x < 0, negative, scale)
        halfway = isinstance(qparams.threshold, tuple)
        if rounding is half_even:
            cut = 0.5 * side if halfway else where.expand(qparams.threshold, x.shape)
            inside = jnp.abs(x) > cut
        elif halfway:
            u = jnp.where(side > 0, over_scale(jnp.abs(x), side), 0.0)
            inside = rounding(jnp.minimum(u, 1.0), key) > 0
        else:
            raise ValueError(f"{self.name} cuts at its own threshold: only half_even rounding")
        sign = jnp.where(inside & (side > 0), jnp.where(x < 0, -1.0, 1.0), 0.0)
        return jnp.where(jnp.isnan(x) | jnp.isnan(side), jnp.nan, sign)

    def fake_quant(
        self,
        x: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """-negative, 0 or scale, in x's dtype; the gradient is 1 everywhere."""
        sign = self._signs(jax.lax.stop_gradient(x), qparams, where, rounding, key)
        value = _of_sign(sign, *self._sides(qparams, where, x.shape))
        return identity_ste(x, finite(value, x.dtype))

    def encode(
        self,
        x: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """Codes 0 (zero), 1 (scale), 2 (-negative), uint8."""
        sign = self._signs(x, qparams, where, rounding, key)
        return jnp.where(sign > 0, jnp.uint8(1), jnp.where(sign < 0, jnp.uint8(2), jnp.uint8(0)))

    def decode(
        self,
        codes: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        dtype: Any = jnp.float32,
    ) -> Array:
        """The numbers of the codes: exactly what `fake_quant` gave."""
        sign = jnp.where(codes == 1, 1.0, jnp.where(codes == 2, -1.0, 0.0))
        return finite(_of_sign(sign, *self._sides(qparams, where, codes.shape)), dtype)


def _of_sign(sign, scale, negative):
    zero = jnp.where(jnp.isnan(sign) | jnp.isnan(scale), jnp.nan, 0.0)
    return jnp.where(sign > 0, scale, jnp.where(sign < 0, -negative, zero))


@dataclass(frozen=True)
class Binary:
    """-1 or 1 times the mean magnitude of a block, eight to a byte; build it with `binary`."""

    bits = 1
    name = "binary"
    group = None
    symmetric = False  # sign(0) = +1

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return 4 * blocks

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> TernaryScales:
        """Scales from a range: its larger end."""
        del dtype
        return TernaryScales(jnp.maximum(-low, high))

    def fit(
        self, x: Array, *, axes: tuple[int, ...], where: Array | None, dtype: Any
    ) -> TernaryScales:
        """alpha = ||W||_1 / n of the blocks of a blocked view."""
        del dtype
        x, valid = _as_float(x, where)
        return TernaryScales(_mean_where(jnp.abs(x), valid, axes))

    def fake_quant(
        self,
        x: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """scale where x >= 0, else -scale, in x's dtype; the gradient is 1 everywhere."""
        scale = where.expand(qparams.scale, x.shape)
        up = self._up(jax.lax.stop_gradient(x), scale, rounding, key)
        value = jnp.where(jnp.isnan(x), jnp.nan, jnp.where(up, scale, -scale))
        return identity_ste(x, finite(value, x.dtype))

    def _up(self, x, scale, rounding, key):
        if rounding is half_even:
            return x >= 0
        u = jnp.where(scale > 0, over_scale(x, scale), 0.0)
        return rounding(jnp.clip(0.5 * u + 0.5, 0.0, 1.0), key) > 0

    def encode(
        self,
        x: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """Codes 1 (scale) and 0 (-scale), uint8."""
        scale = where.expand(qparams.scale, x.shape)
        return self._up(x, scale, rounding, key).astype(jnp.uint8)

    def decode(
        self,
        codes: Array,
        qparams: TernaryScales,
        *,
        where: Granularity = _WHOLE,
        dtype: Any = jnp.float32,
    ) -> Array:
        """The numbers of the codes: exactly what `fake_quant` gave."""
        scale = where.expand(qparams.scale, codes.shape)
        return finite(jnp.where(codes == 1, scale, -scale), dtype)


def ternary() -> Ternary:
    """TWN: threshold 0.7 mean|W|, scale the mean magnitude above it; 1.6 bits per value.

    Source: Li et al. 2016, Ternary Weight Networks, arXiv 1605.04711, eq. 6 and section 2.2.

    >>> q = ternary()
    >>> p = q.fit(jnp.array([0.1, -1.0, 0.8, 0.0]), axes=(0,), where=None, dtype=jnp.float32)
    >>> print(q.encode(jnp.array([0.1, -1.0, 0.8, 0.0]), p), p.scale)
    [0 2 1 0] [0.9]
    """
    return Ternary("twn")


def ternary_absmean(*, refit: bool = False) -> Ternary:
    """BitNet b1.58: the scale is mean|W|, the threshold half of it.

    Args:
      refit: keep the codes but take the mean magnitude of the weights that are not zero for the
        scale, which is the best one for them (relative error of normal weights 0.213, not 0.263).

    Source: Ma et al. 2024, The Era of 1-bit LLMs, arXiv 2402.17764, eq. 1 to 3.
    """
    return Ternary("absmean", refit)


def ternary_ttq() -> Ternary:
    """TTQ: threshold 0.05 max|W|, one scale for the positive and one for the negative weights.

    Here the scales are the means that training them would start from.
    Source: Zhu et al. 2016, Trained Ternary Quantization, arXiv 1612.01064, section 3.
    """
    return Ternary("ttq")


def binary() -> Binary:
    """BWN / XNOR-Net: sign(W) times mean|W|, sign(0) = +1; 1 bit per value.

    Zero is no number of this format: Q(0) = mean|W|. Prune after it, not before.
    Source: Rastegari et al. 2016, XNOR-Net, arXiv 1603.05279, eq. 6.
    """
    return Binary()
