"""How scales are stored: float32, a power of two in a byte, float8 under a tensor scale, twice."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.formats.bits import signed
from jaxcompress.formats.exact import exact_mean, power_of_two
from jaxcompress.formats.floating import E4M3
from jaxcompress.formats.rounding import clip_ste, over_scale


class QParams(NamedTuple):
    """What turns codes into numbers, one per block, broadcast against the blocked view."""

    scale: Array  # float32
    zero_point: Any = ()  # uint8, or () where the grid is symmetric


class ExponentScale(NamedTuple):
    """Scales 2**(exponent - 127), one byte each (OCP E8M0); 255 is NaN."""

    exponent: Array  # uint8, one per block


class TensorScale(NamedTuple):
    """Scales float8 * tensor_scale: one byte per block and one float32 per array."""

    scale_e4m3: Array  # uint8 codes of float8 E4M3, one per block
    tensor_scale: Array  # float32, of shape [1, ..., 1]


class DoubleScale(NamedTuple):
    """Scales mean + code * step: one byte per block, a step per run of blocks, one mean."""

    scale_int8: Array  # uint8 (two's complement), one per block
    step: Array  # float32 [runs]
    mean: Array  # float32 [1]


def absmax_scale(span: Array, steps: Any, *, unit: float = 1.0, dtype: Any = jnp.float32) -> Array:
    """unit * span / steps in float32: the scale whose grid of `steps` reaches span / unit.

    Never so small that numbers of `dtype` could not hold the grid. `steps` may be traced.
    """
    # XLA divides by a constant through its reciprocal; written so, jit and eager agree.
    static = isinstance(steps, int | float)
    inverse = np.float32(unit / steps) if static else unit / steps.astype(jnp.float32)
    scale = jnp.maximum(span * inverse, smallest_scale(dtype))
    # A few roundings: as many ulps more where the end of the range would fall off the grid.
    for _ in range(3):
        short = span * (unit / scale) > jnp.asarray(steps, jnp.float32)
        scale = jnp.where(short, jnp.nextafter(scale, jnp.inf), scale)
    return scale


def smallest_scale(dtype: Any) -> float:
    """Below this a grid's numbers fall into the subnormals of dtype (flushed, or too coarse)."""
    info = jnp.finfo(dtype)
    if info.bits == 16 and info.nexp == 5:  # float16 keeps its subnormals
        return 2 * float(info.smallest_subnormal)
    return float(jnp.finfo(jnp.float32).tiny)


def finite(x: Array, dtype: Any) -> Array:
    """x as `dtype`, clipped to its largest number: the end of a grid may round above it."""
    largest = float(jnp.finfo(dtype).max)
    return clip_ste(x, -largest, largest).astype(dtype)


@dataclass(frozen=True)
class FloatScale:
    """One float32 per block: span / largest."""

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return 4 * blocks

    def qparams(self, span: Array, element: Any, *, dtype: Any) -> QParams:
        """The stored scales of blocks whose largest magnitude is `span`."""
        scale = absmax_scale(span, float(element.largest), dtype=dtype)
        return QParams(jnp.where(span == 0, jnp.ones_like(scale), scale))

    def open(self, qparams: QParams) -> Array:
        """What `divide` and `multiply` take, one per block."""
        return qparams.scale

    def divide(self, x: Array, scale: Array) -> Array:
        """x / scale, float32."""
        return over_scale(x, scale)

    def multiply(self, levels: Array, scale: Array) -> Array:
        """levels * scale, float32."""
        return levels * scale


@dataclass(frozen=True)
class PowerOfTwoScale:
    """One byte per block: 2**clip(floor(log2(span)) - emax, -127, 127), OCP Microscaling v1.0, 6.3.

    emax is the exponent of the element's largest number. With `nearest` the power of two is the
    one nearest to span (floor(log2(4/3 span)), INQ, arXiv 1702.03044, eq. 3) instead of the one
    below. The exponent comes from the bits of the float: log2 is wrong near powers of two.
    """

    nearest: bool = False

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return blocks

    def qparams(self, span: Array, element: Any, *, dtype: Any) -> ExponentScale:
        """The stored scales of blocks whose largest magnitude is `span`."""
        del dtype
        bits = jax.lax.bitcast_convert_type(span.astype(jnp.float32), jnp.int32)
        known = (bits >> 23) & 255
        exponent = ((bits + (1 << 22 if self.nearest else 0)) >> 23) & 255
        emax = math.frexp(element.largest)[1] - 1
        code = jnp.clip(exponent - emax, 0, 254)
        return ExponentScale(jnp.where(known == 255, 255, code).astype(jnp.uint8))

    def open(self, qparams: ExponentScale) -> Array:
        """What `divide` and `multiply` take, one per block."""
        return qparams.exponent

    def divide(self, x: Array, exponent: Array) -> Array:
        """x / scale, float32; exact."""
        return self._times(x.astype(jnp.float32), exponent, sign=-1)

    def multiply(self, levels: Array, exponent: Array) -> Array:
        """levels * scale, float32; exact where it is not subnormal."""
        return self._times(levels, exponent, sign=1)

    def _times(self, x, exponent, *, sign):
        # In two factors: 2**-127 is subnormal, which XLA takes for zero.
        power = sign * (exponent.astype(jnp.int32) - 127)
        half = power >> 1
        scaled = x * power_of_two(half) * power_of_two(power - half)
        return jnp.where(exponent == 255, jnp.nan, scaled)


@dataclass(frozen=True)
class Float8Scale:
    """One float8 E4M3 per block under one float32 per array (NVFP4).

    tensor_scale = max|x| / (largest * 448); scale = e4m3(span / largest / tensor_scale).
    A block below 2**-10 of the largest scale is stored as zeros.
    """

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return blocks + 4

    def qparams(self, span: Array, element: Any, *, dtype: Any) -> TensorScale:
        """The stored scales of blocks whose largest magnitude is `span`."""
        whole = jnp.max(span, keepdims=True, initial=0.0)
        whole = jnp.where(jnp.all(jnp.isfinite(span)), whole, jnp.nan)
        tensor = absmax_scale(whole, float(element.largest) * E4M3.largest, dtype=dtype)
        tensor = jnp.where(whole == 0, jnp.ones_like(tensor), tensor)
        share = over_scale(span * np.float32(1 / element.largest), tensor)
        return TensorScale(E4M3.encode(share), tensor)

    def open(self, qparams: TensorScale) -> Array:
        """What `divide` and `multiply` take, one per block."""
        return E4M3.decode(qparams.scale_e4m3) * qparams.tensor_scale

    def divide(self, x: Array, scale: Array) -> Array:
        """x / scale, float32; 0 where the scale is 0."""
        return jnp.where(scale == 0, jnp.zeros((), jnp.float32), over_scale(x, scale))

    def multiply(self, levels: Array, scale: Array) -> Array:
        """levels * scale, float32."""
        return levels * scale


def shortened(x: Array) -> Array:
    """x >= 0 rounded up to 16 bits of significand.

    Its product with an integer of 8 bits is then exact, and a fused multiply-add under jit gives
    the same bits as product and sum.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0xFF) & ~0xFF, jnp.float32)


@dataclass(frozen=True)
class DoubledScale:
    """Double quantization: absmax - mean in 8 bits, one float32 step per `run` blocks, one mean.

    Source: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 (there the 8 bits are a float).
    """

    run: int = 256

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return blocks + 4 * -(-blocks // self.run) + 4

    def qparams(self, span: Array, element: Any, *, dtype: Any) -> DoubleScale:
        """The stored scales of blocks whose largest magnitude is `span`."""
        del dtype
        scale = span.astype(jnp.float32).reshape(-1) * np.float32(1 / element.largest)
        mean = exact_mean(scale, jnp.float32(scale.size), axes=(0,))
        centred = self._runs(scale - mean)
        step = shortened(absmax_scale(jnp.max(jnp.abs(centred), axis=1, initial=0.0), 127))
        code = clip_ste(jnp.round(over_scale(centred, step[:, None])), -127, 127)
        code = code.reshape(-1)[: scale.size].reshape(span.shape).astype(jnp.int32)
        return DoubleScale((code & 255).astype(jnp.uint8), step, mean)

    def _runs(self, scale: Array) -> Array:
        # [runs, run], the mean's place filled with zeros
        return jnp.pad(scale, (0, -scale.size % self.run)).reshape(-1, self.run)

    def open(self, qparams: DoubleScale) -> Array:
        """What `divide` and `multiply` take, one per block."""
        code = qparams.scale_int8
        centred = signed(code, 8).astype(jnp.float32)
        flat = self._runs(centred.reshape(-1)) * qparams.step[:, None] + qparams.mean[:, None]
        scale = flat.reshape(-1)[: code.size].reshape(code.shape)
        return jnp.maximum(scale, float(jnp.finfo(jnp.float32).tiny))

    def divide(self, x: Array, scale: Array) -> Array:
        """x / scale, float32."""
        return over_scale(x, scale)

    def multiply(self, levels: Array, scale: Array) -> Array:
        """levels * scale, float32."""
        return levels * scale
