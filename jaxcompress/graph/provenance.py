"""Provenance: which parameter leaves a value is made of, and whether inputs reach it.

Sizes may be free: names that stand for any number ("batch"). Then a bound counts as kept only where
it is kept for all their values.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxcompress.graph.compat import at_most
from jaxcompress.graph.primitives import row
from jaxcompress.graph.sites import size


class Origin(NamedTuple):
    """Where a value comes from.

    A value is *data* if inputs reach it (other than by setting the scale of parameters); otherwise
    it is made of parameters and constants, or of constants alone (`params` empty).

    Attributes:
      params: paths of the leaves it is made of; empty for data.
      data: whether inputs reach it.
      mixed: made of parameters, but smaller inputs (a scale, a bit width, an index) had a part.
      extent: an upper bound on the number of distinct elements: what it was before broadcasting.
    """

    params: frozenset[str] = frozenset()
    data: bool = False
    mixed: bool = False
    extent: int = 1

    @property
    def moves(self) -> bool:
        """Whether it may differ between inputs."""
        return self.data or self.mixed

    def within(self, aval: Any) -> "Origin":
        """The same in a variable of this shape, which may be a slice."""
        return self._replace(extent=_least(self.extent, size(aval)))


def _least(extent: Any, whole: Any) -> Any:
    # The smaller of two bounds; the number of all elements where it depends on a free size.
    return extent if at_most(extent, whole) else whole


def constant(aval: Any) -> Origin:
    """A literal, or an array the function closes over."""
    return Origin(extent=size(aval))


def data(aval: Any) -> Origin:
    """An input, or what was computed from it."""
    return Origin(data=True, extent=size(aval))


def leaf(path: str, aval: Any) -> Origin:
    """A parameter leaf."""
    return Origin(frozenset({path}), extent=size(aval))


def made_of(origins: Iterable[Origin], aval: Any) -> Origin:
    """Any function of values that are not data."""
    origins = tuple(origins)
    params = frozenset().union(*(o.params for o in origins))
    return Origin(params, mixed=any(o.mixed for o in origins), extent=size(aval))


def join(a: Origin, b: Origin, aval: Any) -> Origin:
    """Either of two values: the results of two branches, or of two trips of a loop."""
    if a.data or b.data:
        return data(aval)
    larger = b.extent if at_most(a.extent, b.extent) else a.extent
    known = at_most(b.extent, larger)
    extent = _least(larger, size(aval)) if known else size(aval)
    return Origin(a.params | b.params, mixed=a.mixed or b.mixed, extent=extent)


def chosen(value: Origin, by: Origin, aval: Any) -> Origin:
    """A value that was selected by a scalar: a branch, or a loop that ended."""
    if value.data or not by.moves:
        return value
    return value._replace(mixed=True) if value.params else data(aval)


def through(primitive: str, origins: list[Origin], aval: Any) -> Origin:
    """The origin of a result of an equation that is not a contraction.

    Without data operands it is made of the parameters of all operands, whatever the primitive.
    With data operands it is data, save where the data only scales or selects: an elementwise
    operation in which a parameter spans the whole result and the data is smaller (a broadcast
    scale), or a slice of a parameter at a position that is data.
    """
    if not any(o.data for o in origins):
        result = made_of(origins, aval)
    elif _kept(primitive, origins, size(aval)):
        result = made_of((o for o in origins if not o.data), aval)._replace(mixed=True)
    else:
        result = data(aval)
    meaning = row(primitive)
    spread = primitive == "bitcast_convert_type"  # to several narrower elements
    if (meaning.elementwise and not spread) or (meaning.kind == "move" and len(origins) == 1):
        extent = 1
        for origin in origins:
            extent = _least(extent * origin.extent, size(aval))
        return result._replace(extent=extent)
    return result


def _kept(primitive: str, origins: list[Origin], out_size: int) -> bool:
    meaning = row(primitive)
    if meaning.elementwise:
        spans = any(o.params and at_most(out_size, o.extent) for o in origins)
        return spans and all(at_most(o.extent + 1, out_size) for o in origins if o.data)
    if meaning.kind == "index" and not meaning.update:
        return bool(origins[0].params) and all(o.extent == 1 for o in origins[1:] if o.data)
    return False


def contract(a: Origin, b: Origin, aval: Any) -> tuple[tuple[bool, bool], Origin]:
    """Which operands of a contraction are activations, and the origin of the result.

    Both may be; so may a mixed operand whose partner is fixed. If neither is, it is a fold: the
    result is made of the parameters of both.
    """
    active = (a.data, b.data)
    if not any(active):
        active = (a.mixed, b.mixed)
    return active, data(aval) if any(active) else made_of((a, b), aval)
