"""The integers of every step: codes of weights, biases, multipliers, bounds of clamps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.packed import Grid
from jaxcompress.formats import granularity_for
from jaxcompress.formats.bits import signed
from jaxcompress.formats.integers import Integer
from jaxcompress.formats.scales import QParams
from jaxcompress.quantize.fake_quantized_weights import qparams_of
from jaxcompress.quantize.integer.lowering import Draft, Plan
from jaxcompress.quantize.integer.requantize import fixed_multiplier

ADD_HEADROOM = 20
"""Bits below the point while the operands of an addition are brought to one scale."""
_HEADROOM = 24  # bits that other cores without weights fill
_ROOM = 2.0**29  # of a bias in the accumulator

_STEPS = frozenset("permute regroup spread take pick pad join".split())
MOVES = _STEPS | {"clamp", "window_max", "reduce_max", "reduce_min"}
"""Kinds of steps that keep the grid of what they take."""


@dataclass(frozen=True)
class Node:
    """A step, without its numbers: kind, tensors that it takes, settings, where it stands.

    Its constants are int32, weights int8:
      zeros [inputs]: zero points of what it takes; zero, low, high: zero point of the result, and
        its smallest and largest code.
      weight (conv [*space, in, out], dot): codes; bias: in steps of the accumulator; folded: bias
        less what a zero point at -128 adds to a product of int8.
      multiplier, shift: from the accumulator to the result; both broadcast against it.
      multipliers, shifts [2] (add): of the operands.
      fill (pad): code.
    """

    kind: str
    inputs: tuple[int, ...]
    config: tuple[tuple[str, Any], ...]
    scope: str

    def get(self, key: str) -> Any:
        """A setting."""
        return dict(self.config)[key]

    @property
    def bare(self) -> "Node":
        """The same wherever it stands: equal ones are compiled once."""
        return Node(self.kind, (), self.config, "")


class Built(NamedTuple):
    """Steps, their constants, the scales of their weights, and the grid of every tensor."""

    nodes: tuple[Node, ...]
    constants: tuple[dict[str, Any], ...]
    weight_scales: tuple[Any, ...]
    grids: tuple[Grid, ...]


class _Place(NamedTuple):
    # A grid in numbers of the host.
    scale: float
    zero: int
    low: int
    high: int

    @property
    def reach(self) -> int:
        """Largest distance of a code from the zero point."""
        return max(self.zero - self.low, self.high - self.zero)

    def code(self, x: float) -> int:
        """The code nearest to a number, infinite ones included."""
        return int(np.clip(np.rint(np.clip(x / self.scale, -1e9, 1e9)) + self.zero, *self[2:]))


def _place(grid: Grid) -> _Place:
    assert isinstance(grid.format, Integer)
    zero = 0 if grid.format.symmetric else int(grid.qparams.zero_point)
    return _Place(float(grid.qparams.scale), zero, *grid.format.bounds)


def build(plan: Plan, grids: dict[int, Grid], first: Grid, *, weights: Integer) -> Built:
    """Numbers for all steps, from the grids of values and that of the input.

    Raises:
      ValueError: an accumulator or a bias that int32 does not hold, with the scope.
    """
    tensors, nodes, constants, scales = [first], [], [], []
    for draft in plan.drafts:
        grid = tensors[draft.inputs[0]] if draft.value is None else grids[draft.value]
        sources = [_place(tensors[number]) for number in draft.inputs]
        target = _place(grid)
        config, numbers = draft.config, _bounds(draft, target)
        numbers["zeros"] = np.array([source.zero for source in sources], np.int32)
        if draft.kind == "pad":
            assert draft.fill is not None
            numbers["fill"] = np.int32(target.code(draft.fill))
        if draft.kind in ("conv", "dot"):
            numbers |= _contraction(draft, sources[0], target, weights)
        elif draft.kind not in MOVES:
            config, more = _core(draft, sources, target)
            numbers |= more
        scales.append(jnp.asarray(numbers.pop("weight_scale")) if "weight_scale" in numbers else ())
        nodes.append(Node(draft.kind, draft.inputs, config, draft.scope))
        constants.append({key: jnp.asarray(value) for key, value in numbers.items()})
        tensors.append(grid)
    return Built(tuple(nodes), tuple(constants), tuple(scales), tuple(tensors))


def _bounds(draft: Draft, target: _Place) -> dict[str, Any]:
    low, high = (target.code(x) for x in draft.clamp or (-np.inf, np.inf))
    return {"zero": np.int32(target.zero), "low": np.int32(low), "high": np.int32(high)}


def _along(x: np.ndarray, pairs: list[tuple[int, int]], rank: int) -> np.ndarray:
    # x has size 1 off the first axes of the pairs; the same numbers along the second ones.
    pairs = sorted(pairs)
    order = np.argsort([to for _, to in pairs])
    small = x.reshape([x.shape[axis] for axis, _ in pairs]).transpose(order)
    shape = [1] * rank
    for size, (_, to) in zip(small.shape, sorted(pairs, key=lambda p: p[1]), strict=True):
        shape[to] = size
    return small.reshape(shape)


def _rank(draft: Draft) -> int:
    # Of the result of a contraction.
    assert draft.weight is not None
    if draft.kind == "conv":
        return draft.weight.ndim
    return dict(draft.config)["rank"]


def _contraction(draft: Draft, x: _Place, target: _Place, format: Integer) -> dict[str, Any]:
    weight, rank = draft.weight, _rank(draft)
    assert weight is not None
    inward = [(to, axis) for axis, to in draft.channels]
    factor, offset = (a if a.ndim else a.reshape((1,) * rank) for a in (draft.factor, draft.offset))
    if all(n == 1 or axis in dict(inward) for axis, n in enumerate(factor.shape)):
        # Signs and zeros go into the codes; the size too, unless the weights have their steps.
        joined = factor if draft.steps is None else np.sign(factor)
        weight = weight * _along(joined, inward, weight.ndim)
        factor = np.ones((1,) * rank) if draft.steps is None else _size(factor)
    others = tuple(a for a in range(weight.ndim) if a not in dict(draft.channels))
    peak = np.abs(offset).max(tuple(a for a in range(rank) if a not in dict(inward)), keepdims=True)
    # A channel of next to no weights gets a larger scale where its bias would leave int32.
    least = _along(peak, inward, weight.ndim) / (_ROOM * x.scale)
    if draft.steps is None:
        codes, scale = _weight_codes(weight, format, least, others)
    else:
        codes, scale = _own_codes(draft, weight, least, others)
    acc_scale = x.scale * _along(scale, list(draft.channels), rank) * factor
    bias = np.rint(offset / _nonzero(draft, acc_scale))
    sums = np.abs(codes).sum(others, keepdims=True, dtype=np.int64)
    largest = x.reach * _along(sums, list(draft.channels), rank) + np.abs(bias)
    _check_room(draft, largest)
    total = codes.sum(others, keepdims=True, dtype=np.int64)
    lowered = x.zero - (128 if x.low == 0 else 0)  # the zero point among int8 operands
    folded = bias.astype(np.int64) - lowered * _along(total, list(draft.channels), rank)
    multiplier, shift = fixed_multiplier(acc_scale / target.scale)
    wrapped = folded.astype(np.int32)  # what wraps here wraps back when the product is added
    return {
        "weight": codes.astype(np.int8),
        "weight_scale": scale.astype(np.float32),
        "bias": bias.astype(np.int32),
        "folded": wrapped,
        "multiplier": multiplier,
        "shift": shift,
    }


def _weight_codes(
    weight: np.ndarray, format: Integer, least: np.ndarray, others: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    # int32 codes and float64 scales, one per channel, of size 1 along the other axes.
    w = jnp.asarray(weight, jnp.float32)
    axes = tuple(a for a in range(w.ndim) if a not in others)
    where = granularity_for(format, axes or None)
    found = qparams_of(w, format, where).scale
    # The largest of a bias's needs, rounded up to float32.
    raised = np.nextafter(
        np.broadcast_to(least, found.shape).astype(np.float32), np.float32(np.inf)
    )
    scale = np.where(least > np.asarray(found, np.float64), raised, np.asarray(found))
    codes = format.encode(w, QParams(jnp.asarray(scale)), where=where)
    return np.asarray(signed(codes, format.bits)), scale.astype(np.float64)


def _size(factor: np.ndarray) -> np.ndarray:
    return np.where(factor == 0, 1.0, np.abs(factor))


def _own_codes(
    draft: Draft, weight: np.ndarray, least: np.ndarray, others: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    # As `_weight_codes`, with the steps of the weights themselves.
    assert draft.steps is not None
    steps = draft.steps.astype(np.float64)
    scale = steps.max(others, keepdims=True)
    if (steps != scale).any():
        raise ValueError(
            f"integer_only cannot run {draft.kind} at {draft.scope!r} with the codes of its packed "
            "weight: the steps differ along axes that are summed over; pack it with one step for "
            "the tensor or for each output channel, or give the unpacked params"
        )
    codes = np.rint(weight / scale).astype(np.int32)
    silent = ~codes.any(others, keepdims=True)  # a channel of zeros has them on any grid
    return codes, np.where(silent, np.maximum(scale, least), scale)


def _core(draft: Draft, sources: list[_Place], target: _Place) -> tuple[Any, dict[str, Any]]:
    # Cores without weights: their sums are shifted left, so that rounding costs next to nothing.
    numbers: dict[str, Any] = {}
    config = dict(draft.config)
    if draft.kind == "add":
        # Both operands in steps of twice the larger scale, as in the TensorFlow Lite kernels.
        step, bits = 2 * max(source.scale for source in sources), ADD_HEADROOM
        signs = (1, config.pop("sign"))
        shares = [sign * s.scale / step for sign, s in zip(signs, sources, strict=True)]
        numbers["multipliers"], numbers["shifts"] = fixed_multiplier(shares)
    else:
        step = float(np.prod([source.scale for source in sources]))
        span = int(np.prod([source.high - source.low for source in sources]))
        span *= config.get("count", 1)
        bits = max(0, _HEADROOM - span.bit_length())
        while bits and np.max(np.abs(draft.offset) > _ROOM * step / 2**bits * np.abs(draft.factor)):
            bits -= 1
        _check_room(draft, np.float64(span) * 2.0**bits)
        config["headroom"] = bits
    acc_scale = step * draft.factor / 2.0**bits
    bias = np.rint(draft.offset / _nonzero(draft, acc_scale))
    _check_room(draft, 2 * np.abs(bias))
    numbers["bias"] = bias.astype(np.int32)
    multiplier, shift = fixed_multiplier(acc_scale / target.scale)
    return tuple(config.items()), numbers | {"multiplier": multiplier, "shift": shift}


def _nonzero(draft: Draft, acc_scale: np.ndarray) -> np.ndarray:
    if not np.all(acc_scale):
        raise ValueError(
            f"integer_only cannot run {draft.kind} at {draft.scope!r}: an activation is multiplied "
            "by zero there; remove it, or give the channel a factor"
        )
    return acc_scale


def _check_room(draft: Draft, largest: Any) -> None:
    worst = float(np.max(largest))
    if worst >= 2.0**31:
        raise ValueError(
            f"integer_only cannot run {draft.kind} at {draft.scope!r}: its accumulator may reach "
            f"{worst:.3g}, int32 holds {2**31 - 1:,}; fewer terms, or fewer bits, would fit"
        )
