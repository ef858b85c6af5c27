"""The static sizes in an equation after its axes were cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcompress.graph import compat
from jaxcompress.graph.coupling.scopes import Step
from jaxcompress.graph.coupling.terms import Term, Whole, count, size

# axis -> bool [old size], or [new size] if it is rebound, or a Whole
Keep = Callable[[Term], Any]


@dataclass(frozen=True)
class Cut:
    """An equation that is evaluated again.

    Attributes:
      step: the equation with the terms of its axes.
      keep: which indices of an axis stay.
      values: its operands, cut.
    """

    step: Step
    keep: Keep
    values: Sequence[Any]

    def length(self, term: Term) -> Any:
        """The new size of an axis: an integer or a symbol."""
        return count(self.keep(term))

    def shape(self, output: int = 0) -> tuple[Any, ...]:
        """The new shape of a result."""
        return tuple(self.length(term) for term in self.step.outs[output])

    def position(self, term: Term, at: int) -> Any:
        """Where a position of an axis is now.

        Raises:
          ValueError: it lies within an axis of symbolic length.
        """
        keep = self.keep(term)
        if not isinstance(keep, Whole):
            return count(keep if at == size(term) else keep[:at])
        if at not in (0, size(term)):
            raise ValueError(
                f"{self.step.eqn.primitive.name} cuts an axis of free length {keep.size} at {at}: "
                "give a length"
            )
        return keep.size if at else 0

    def sliced(self, sizes: Sequence[int]) -> tuple[Any, ...]:
        """New sizes of slices of the first operand: of whole axes they are whole again."""
        pairs = zip(self.step.ins[0], sizes, strict=True)
        return tuple(self.length(t) if size(t) == n else n for t, n in pairs)


def _slice(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    terms = cut.step.ins[0]
    starts, limits = p["start_indices"], p["limit_indices"]
    return {
        "start_indices": tuple(cut.position(t, n) for t, n in zip(terms, starts, strict=True)),
        "limit_indices": tuple(cut.position(t, n) for t, n in zip(terms, limits, strict=True)),
    }


def _split(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    return {"sizes": tuple(cut.length(out[p["axis"]]) for out in cut.step.outs)}


def _pad(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    config = []
    for term, (low, high, interior) in zip(cut.step.outs[0], p["padding_config"], strict=True):
        if not interior and low >= 0 and high >= 0:
            n = size(term)
            low = cut.position(term, low)
            high = cut.length(term) - cut.position(term, n - high) if high else 0
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _conv(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    spec = p["dimension_numbers"]
    channels, inputs = (v.shape[s[1]] for v, s in zip(cut.values, spec[:2], strict=True))
    return {"feature_group_count": channels // inputs} if inputs else {}


def _broadcast(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    del p
    return {"shape": cut.shape()}


def _tile(cut: Cut, p: dict[str, Any]) -> dict[str, Any]:
    sizes = zip(cut.shape(), cut.values[0].shape, p["reps"], strict=True)
    return {"reps": tuple(n // m if m else reps for n, m, reps in sizes)}


RESIZE: dict[str, Callable[[Cut, dict[str, Any]], dict[str, Any]]] = {
    "broadcast_in_dim": _broadcast,
    compat.CONV: _conv,
    "iota": _broadcast,
    "pad": _pad,
    "reshape": lambda cut, p: {"new_sizes": cut.shape()},
    "slice": _slice,
    "split": _split,
    "tile": _tile,
}


def resized(cut: Cut) -> dict[str, Any]:
    """The parameters of the equation with the new sizes."""
    params = dict(cut.step.eqn.params)
    if "slice_sizes" in params:  # of what is taken at some places
        return {**params, "slice_sizes": cut.sliced(params["slice_sizes"])}
    rule = RESIZE.get(cut.step.eqn.primitive.name)
    return {**params, **rule(cut, params)} if rule else params
