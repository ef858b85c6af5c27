"""How a scale per channel passes where elements only move: step by step, in both directions."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress.graph.primitives import Pad, Permute, Regroup, Spread, Take, moved, whole_axes
from jaxcompress.graph.scaling.labelled_operation import Step, join, link
from jaxcompress.graph.scaling.labels import Labels, cut, depends, embedded, reshaped

Map = Callable[[Labels], Labels]
Shape = tuple[int, ...]


def moving(step: Step) -> None:
    """Every result has the labels of the operands where their elements are, and they its."""
    for k, result in enumerate(moved(step.op.eqn) or []):
        start = 0
        for port in result.operands:
            shape, maps = step.shape(port), []
            for move in result.steps:
                pair = _STEPS[type(move)](step, move, shape)
                if pair is None:
                    return step.fix_all()
                maps.append(pair)
                shape = move.shape(shape)
            if result.axis is not None:
                end = start + shape[result.axis]
                parts = [slice(None)] * result.axis + [slice(start, end)]
                maps.append(_window(parts, shape, step.shape(-1 - k)))
                start = end
            forwards, backwards = ([pair[side] for pair in maps] for side in (0, 1))
            link(step, port, -1 - k, to=_chain(forwards), back=_chain(backwards[::-1]))


def _chain(maps: Sequence[Map]) -> Map:
    return lambda labels: functools.reduce(lambda found, each: each(found), maps, labels)


def _permute(step: Step, move: Permute, shape: Shape) -> tuple[Map, Map]:
    del step, shape
    order = [axis + 1 for axis in move.order]
    inverse = np.argsort(order) + 1
    return (lambda x: x.transpose(0, *order)), (lambda x: x.transpose(0, *inverse))


def _regroup(step: Step, move: Regroup, shape: Shape) -> tuple[Map, Map] | None:
    del step
    if 0 in shape:
        return None
    sizes = tuple(move.sizes)
    return (lambda x: reshaped(x, shape, sizes)), (lambda x: reshaped(x, sizes, shape))


def _spread(step: Step, move: Spread, shape: Shape) -> tuple[Map, Map]:
    source = [axis for axis, n in enumerate(shape) if n == move.sizes[move.axes[axis]]]
    target, across = [move.axes[axis] for axis in source], step.classes.move
    return (
        lambda x: across(x, source, target, len(move.sizes)),
        lambda x: across(x, target, source, len(shape)),
    )


def _take(step: Step, move: Take, shape: Shape) -> tuple[Map, Map]:
    del step
    back = tuple(axis + 1 for axis, (_, _, stride) in enumerate(move.bounds) if stride < 0)
    if back:
        flip = lambda x: np.flip(x, back)
        return flip, flip
    embed, narrow = _window(move.slices, tuple(move.shape(shape)), shape)
    return narrow, embed


def _pad(step: Step, move: Pad, shape: Shape) -> tuple[Map, Map] | None:
    if not step.free(1) or any(low < 0 or high < 0 for low, high, _ in move.config):
        return None
    parts = [
        slice(low, low + (n - 1) * (inside + 1) + 1, inside + 1)
        for (low, _, inside), n in zip(move.config, shape, strict=True)
    ]
    return _window(parts, shape, tuple(move.shape(shape)), zeros=True)


def _window(
    parts: Sequence[slice], small: Shape, large: Shape, *, zeros: bool = False
) -> tuple[Map, Map]:
    # From a slice to the whole, and back. Zeros around it may have any label: along axes on which
    # labels do not depend, that of the others.
    every = itertools.chain(parts, itertools.repeat(slice(None)))
    within = [
        (axis, part)
        for axis, (part, n, m) in enumerate(zip(every, small, large, strict=False))
        if n != m
    ]

    def embed(labels: Any) -> Any:
        for axis, part in within:
            n, m = small[axis], large[axis]
            if not zeros or n == 1 or depends(labels, [axis]):
                labels = embedded(labels, axis, part, size=n, into=m)
        return labels

    return embed, lambda labels: cut(labels, within)


_STEPS: dict[type, Callable[[Step, Any, Shape], tuple[Map, Map] | None]] = {
    Permute: _permute, Regroup: _regroup, Spread: _spread, Take: _take, Pad: _pad,
}  # fmt: skip


def taking(step: Step) -> None:
    """Axes that are taken whole pass; along the others any element may be taken."""
    fill = step.params.get("fill_value")
    if fill is not None and abs(fill) > 0:  # NaN may stand for what lies outside
        return step.fix_all()
    pairs = whole_axes(step.op.eqn)
    source, target = ([pair[side] for pair in pairs] for side in (0, 1))
    for sign in (1, -1):
        join(step, 0, source, -1, target, signs=(sign, sign))
