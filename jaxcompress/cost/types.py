"""Number types of activations: of the operands of contractions, and of arrays in memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.paths import near_misses
from jaxcompress.cost import dtypes
from jaxcompress.graph import Graph, Site
from jaxcompress.graph.flat_list import Inlined
from jaxcompress.graph.origin_domain import Place


class ActivationTypes:
    """Number type and bits of every activation of a program.

    `activations`: None (the traced dtypes), a number of bits, a format, or a mapping from names
    of taps or sites to bits or formats. Bits below those of the traced dtype mean an integer. An
    array in memory has the widest of the types in which contractions take it or what is computed
    from it; if none takes it, the widest type of the operands it is computed from; without names
    all floating arrays have the given type.

    Raises:
      ValueError: a name that is neither a tap nor a site; bits outside 1 to 64.
    """

    def __init__(
        self, graph: Graph, activations: Any, *, program: Inlined, sites: Mapping[Place, Site]
    ):
        self.taps = {(tap.site.name, tap.operand): tap.name for tap in graph.taps}
        self.every, self.named = activations, {}
        if isinstance(activations, Mapping):
            self.every, self.named = None, dict(activations)
            known = {*self.taps.values(), *(site.name for site in graph.sites)}
            for name in self.named:
                if name not in known:
                    nearest = ", ".join(map(repr, near_misses(str(name), sorted(known))))
                    raise ValueError(f"activations: {name!r} is no tap or site; nearest: {nearest}")
        _type_of(self.every, jnp.float32)
        for given in self.named.values():
            _type_of(given, jnp.float32)
        self.values, self.program = program.values, program
        self.stored = self._stored(sites) if self.named else {}

    def _given(self, site: Site, operand: int) -> Any:
        tap = self.taps.get((site.name, operand), site.name)
        return self.named.get(tap, self.named.get(site.name, self.every))

    def operand(self, site: Site, operand: int) -> tuple[str, int]:
        """Type and bits of an operand of a contraction.

        Integers (positions, masks) are on no grid; where they meet floats they are converted.
        """
        own, other = site.operands[operand].dtype, site.operands[1 - operand].dtype
        if jnp.issubdtype(own, jnp.inexact):
            return _type_of(self._given(site, operand), own)
        with jax.numpy_dtype_promotion("standard"):
            return dtypes.of_array(jnp.promote_types(own, other))

    def value(self, number: int) -> tuple[str, int]:
        """Type and bits of an array in memory."""
        dtype = self.values[number].aval.dtype
        given = self.stored.get(number, self.every)
        floating = jnp.issubdtype(dtype, jnp.floating)
        return _type_of(given if floating else None, dtype)

    def value_bytes(self, number: int, elements: int | None = None) -> int:
        """Bytes of an array in memory, or of some of its elements."""
        size = math.prod(self.values[number].aval.shape) if elements is None else elements
        return -(-size * self.value(number)[1] // 8)

    def _stored(self, sites: Mapping[Place, Site]) -> dict[int, Any]:
        wanted: dict[int, list[Any]] = {}
        for op in reversed(self.program.ops):
            site = sites.get(op.place)
            for i, n in enumerate(op.operands):
                if n is None:
                    continue
                if site is not None:
                    wanted.setdefault(n, []).append(self._given(site, i))
                else:
                    wanted.setdefault(n, []).extend(
                        given for out in op.outputs for given in wanted.get(out, ())
                    )
        stored = {n: _widest(given) for n, given in wanted.items() if given}
        for op in self.program.ops:  # results that no contraction takes
            site = sites.get(op.place)
            if site is not None:
                given = [self._given(site, i) for i in activation_operands(site)]
            else:
                given = [stored[n] for n in op.inputs if n in stored]
            for n in op.outputs:
                if n not in stored and given:
                    stored[n] = _widest([g for g in given if g is not None] or [None])
        return stored


def _widest(given: list[Any]) -> Any:
    # None stands for the traced type, which is the widest.
    if any(g is None for g in given):
        return None
    return max(given, key=lambda g: getattr(g, "bits", g))


def _type_of(given: Any, dtype: Any) -> tuple[str, int]:
    traced = dtypes.of_array(dtype)
    if given is None:
        return traced
    if hasattr(given, "bits"):
        found = dtypes.of_format(given)
        return found if found[1] < traced[1] else traced
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= 64:
        raise ValueError(
            f"activations: must be a number of bits from 1 to 64 or a format, got {given!r}"
        )
    return (f"int{given}", given) if given < traced[1] else traced


def activation_operands(site: Site) -> tuple[int, ...]:
    """Indices of the operands that are activations."""
    return (0, 1) if site.weight is None else (1 - site.weight,)
