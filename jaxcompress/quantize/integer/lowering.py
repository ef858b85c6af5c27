"""From equations to steps that integers can do: what is fused, and which tensors have grids.

A step computes one tensor of codes: a core (contraction, sum, addition, product, or nothing), then
y = factor * core + offset, then a clamp. Factors, biases and clamps that follow a core and are read
by nothing else belong to its step: convolution, bias, inference BatchNorm and ReLU are one. Views,
maxima and clamps of a tensor that is read elsewhere too keep the grid of what they take.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from jaxcompress.quantize.integer.traced_ranges import Equation, Flat

Shape = tuple[int, ...]


@dataclass
class Draft:
    """A step before its numbers are known.

    Attributes:
      kind: "conv", "dot", "sum", "window_sum", "add", "mul", "rescale"; or one that keeps the grid.
      inputs: numbers of tensors; 0 is the input, step i gives tensor i + 1.
      config: what the kind needs to know, hashable.
      scope: where its first equation stands.
      value: number of the value whose range sets the grid; None: the grid of the first input.
      weight: float64 weights of a contraction; of a convolution [*space, in, out].
      steps: of the weights' elements, where a packed leaf has them; of the weights' shape.
      channels: (axis of the weight, axis of the result) pairs; scales run along them.
      factor, offset: float64, broadcast against the result.
      clamp: smallest and largest result, None without.
      fill: the number that padding has.
    """

    kind: str
    inputs: tuple[int, ...]
    config: tuple[tuple[str, Any], ...]
    scope: str
    value: int | None = None
    weight: np.ndarray | None = None
    steps: np.ndarray | None = None
    channels: tuple[tuple[int, int], ...] = ()
    factor: np.ndarray = field(default_factory=lambda: np.ones(()))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(()))
    clamp: tuple[float, float] | None = None
    fill: float | None = None


class Plan(NamedTuple):
    """The steps of a program, the tensor that is its result, whether other batch sizes do, and the
    packed leaves whose grids are found anew."""

    drafts: tuple[Draft, ...]
    output: int
    batched: bool
    requantized: tuple[str, ...]


def lower(flat: Flat, rule_of: Callable[[str], Callable[..., None] | None]) -> Plan:
    """The steps of a flat program; `rule_of` says how a primitive is lowered.

    Raises:
      ValueError: an operation that integers cannot do, with its name and scope.
    """
    lowerer = Lowerer(flat)
    for equation in flat.equations:
        rule = rule_of(equation.primitive)
        if rule is None:
            raise refusal(equation, "it has no integer form here")
        rule(lowerer, equation)
    output = lowerer.tensor(flat.output)
    return Plan(tuple(lowerer.drafts), output, lowerer.batched, tuple(lowerer.requantized))


def refusal(equation: Equation, why: str) -> ValueError:
    """The error of an operation that integers cannot do."""
    shape = tuple(equation.eqn.outvars[0].aval.shape)
    return ValueError(f"integer_only cannot run {equation.where} (result {shape}): {why}")


class Lowerer:
    """Which tensor or unfinished step each value is."""

    def __init__(self, flat: Flat):
        self.flat = flat
        self.tensors = {flat.input: 0}
        self.pending: dict[int, Draft] = {}
        self.settled: dict[int, Draft] = {}
        self.requantized: dict[str, None] = {}  # packed leaves whose grids no step could keep
        self.drafts: list[Draft] = []
        self.batched = True

    def shape(self, number: int) -> Shape:
        return tuple(self.flat.avals[number].shape)

    def known(self, number: int) -> Array | np.ndarray | None:
        return self.flat.known.get(number)

    def tensor(self, number: int) -> int:
        """The tensor of a value, its step finished if need be."""
        if number in self.pending:
            self.tensors[number] = self.finish(self.pending.pop(number))
        return self.tensors[number]

    def finish(self, draft: Draft) -> int:
        """Adds a step; the number of its tensor."""
        self.drafts.append(draft)
        return len(self.drafts)

    def on_grid_of(self, number: int, value: int) -> int:
        """The tensor of a value on the grid of another."""
        if number in self.pending:
            draft = self.pending.pop(number)
            draft.value = value
            return self.finish(draft)
        scope = self.drafts[-1].scope if self.drafts else ""
        return self.finish(Draft("rescale", (self.tensor(number),), (), scope, value=value))

    def settle(self, draft: Draft, number: int, *, batched: bool = True) -> None:
        """A step with a grid of its own gives a value; it may grow while one equation reads it."""
        draft.value = number
        self.batched &= batched
        if self.flat.uses.get(number, 0) == 1:
            self.pending[number] = draft
        else:
            self.settled[number] = draft
            self.tensors[number] = self.finish(draft)

    def place(self, e: Equation) -> None:
        """A tensor on the grid that is given for what an equation gives, numbers as they are."""
        source, result = e.operands[0], e.outputs[0]
        if self._is_on(self.tensor(source), self.flat.fixed[result]):
            self.tensors[result] = self.tensor(source)
            return
        if source in self.settled:  # again from its accumulator: rounded once
            draft = replace(self.settled[source])
        else:
            draft = Draft("rescale", (self.tensor(source),), (), e.scope)
        draft.value = result
        self.tensors[result] = self.finish(draft)

    def _is_on(self, tensor: int, grid: Any) -> bool:
        # whether the step that a tensor has its grid from has this one
        while tensor and self.drafts[tensor - 1].value is None:
            tensor = self.drafts[tensor - 1].inputs[0]
        value = self.drafts[tensor - 1].value if tensor else self.flat.input
        return self.flat.fixed.get(value) is grid  # type: ignore[arg-type]

    def steps(self, number: int) -> np.ndarray | None:
        """The steps of a packed weight; without them its leaves will be told."""
        steps = self.flat.steps.get(number)
        if steps is None:
            self.requantized.update(dict.fromkeys(sorted(self.flat.behind.get(number, ()))))
        return steps

    def move(self, e: Equation, kind: str, *, batched: bool, fill: float | None = None, **config):
        """A step that keeps the grid of its input."""
        self.batched &= batched
        source = self.tensor(e.operands[0])
        draft = Draft(kind, (source,), tuple(config.items()), e.scope, fill=fill)
        self.tensors[e.outputs[0]] = self.finish(draft)

    def open(self, number: int, scope: str) -> Draft:
        """An unfinished step that gives a value and that a factor or an offset may still join."""
        if number in self.pending and self.pending[number].clamp is None:
            return self.pending.pop(number)
        return Draft("rescale", (self.tensor(number),), (), scope)

    def affine(self, e: Equation, number: int, *, factor: Any = 1.0, offset: Any = 0.0) -> None:
        """result = factor * value + offset."""
        if self.shape(number) != self.shape(e.outputs[0]):
            raise refusal(e, f"it broadcasts an activation of shape {self.shape(number)}")
        factor, offset = (_compressed(x) for x in (factor, offset))
        if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
            raise refusal(e, "a constant in it is NaN or Inf")
        draft = self.open(number, e.scope)
        draft.factor = _compressed(draft.factor * factor)
        draft.offset = _compressed(draft.offset * factor + offset)
        rank = len(self.shape(number))
        per_example = [x for x in (factor, offset) if x.ndim == rank > 0 and x.shape[0] > 1]
        self.settle(draft, e.outputs[0], batched=not per_example)

    def clamp(self, e: Equation, number: int, low: float, high: float) -> None:
        """result = min(max(value, low), high)."""
        draft = self.pending.pop(number, None)
        if draft is None:
            draft = Draft("clamp", (self.tensor(number),), (), e.scope, clamp=(low, high))
            self.tensors[e.outputs[0]] = self.finish(draft)
            return
        before = draft.clamp or (-np.inf, np.inf)
        bounds = np.clip(before, low, high)
        draft.clamp = (float(bounds[0]), float(bounds[1]))
        self.settle(draft, e.outputs[0])


def _compressed(x: Any) -> np.ndarray:
    # float64, size 1 along every axis in which nothing changes.
    x = np.asarray(x, np.float64)
    for axis in range(x.ndim):
        first = x.take([0], axis)
        if x.shape[axis] > 1 and (x == first).all():
            x = first
    return x.reshape(()) if x.size == 1 else x


def scalar(x: Any) -> float | None:
    """The one number that an array holds everywhere, None if it holds several."""
    x = np.asarray(x, np.float64)
    return float(x.flat[0]) if x.size and (x == x.flat[0]).all() else None
