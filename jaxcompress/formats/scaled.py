"""A format from two parts: a grid of small numbers, and a scale per block."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.formats.granularities import Granularity
from jaxcompress.formats.rounding import Rounding, half_even, scaled_ste, straight_through
from jaxcompress.formats.scales import FloatScale, finite

_WHOLE = Granularity()


class Element(Protocol):
    """A grid of numbers without a scale: `FloatElement`, `IntElement`, `Levels`, or yours.

    `snap(u)` must equal `decode(encode(u))` bit for bit.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def largest(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def symmetric(self) -> bool: ...
    def snap(self, u: Array, *, rounding: Rounding = ..., key: Any = ...) -> Array: ...
    def encode(self, u: Array, *, rounding: Rounding = ..., key: Any = ...) -> Array: ...
    def decode(self, codes: Array) -> Array: ...


@dataclass(frozen=True)
class Scaled:
    """x = scale * element: floats, codebooks and block formats.

    Attributes:
      element: the grid.
      scale: how the scales are found and stored.
      group: elements per scale unless the caller says otherwise (32 in MX); None: the whole
        channel or tensor.
      label: the name; default that of the element.
    """

    element: Any
    scale: Any = FloatScale()
    group: int | None = None
    label: str = ""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    @property
    def name(self) -> str:
        """The name; `formats.parse` reads those of the library's own formats."""
        return self.label or self.element.name

    @property
    def symmetric(self) -> bool:
        """Whether Q(-x) = -Q(x)."""
        return self.element.symmetric

    def metadata_bytes(self, blocks: int) -> int:
        """Bytes of the scales of an array of so many blocks."""
        return self.scale.metadata_bytes(blocks)

    def qparams(self, low: Array, high: Array, *, dtype: Any = jnp.float32) -> Any:
        """The stored scales of blocks whose numbers lie in [low, high], which contains 0."""
        low, high = (jnp.asarray(end, jnp.float32) for end in (low, high))
        return self.scale.qparams(jnp.maximum(-low, high), self.element, dtype=dtype)

    def _open(self, qparams, where, shape):
        return where.expand(self.scale.open(qparams), shape)

    def fake_quant(
        self,
        x: Array,
        qparams: Any,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """The nearest number of the grid, in x's dtype; straight-through inside the range."""
        opened = self._open(qparams, where, x.shape)
        fixed = jax.lax.stop_gradient(opened)
        u = self.scale.divide(jax.lax.stop_gradient(x), fixed)
        levels = self.element.snap(u, rounding=rounding, key=key)
        low, high = jnp.float32(self.element.low), jnp.float32(self.element.high)
        if isinstance(self.scale, FloatScale):
            return finite(scaled_ste(x, opened, levels, low, high), x.dtype)
        value = self.scale.multiply(levels, fixed)
        inside = (u >= low) & (u <= high)
        return straight_through(x, finite(value, x.dtype), inside)

    def encode(
        self,
        x: Array,
        qparams: Any,
        *,
        where: Granularity = _WHOLE,
        rounding: Rounding = half_even,
        key: Array | None = None,
    ) -> Array:
        """Unsigned codes below 2**bits, uint8."""
        u = self.scale.divide(x, self._open(qparams, where, x.shape))
        return self.element.encode(u, rounding=rounding, key=key)

    def decode(
        self, codes: Array, qparams: Any, *, where: Granularity = _WHOLE, dtype: Any = jnp.float32
    ) -> Array:
        """The numbers of the codes: exactly what `fake_quant` gave."""
        levels = self.element.decode(codes)
        value = finite(self.scale.multiply(levels, self._open(qparams, where, codes.shape)), dtype)
        # Only a foreign code can be infinite: it stays so.
        return jnp.where(jnp.isinf(levels), levels.astype(dtype), value)
