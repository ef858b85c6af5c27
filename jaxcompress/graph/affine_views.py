"""How a scale per channel passes where elements only move: views, joined and taken parts."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxcompress.graph.labels import cut, depends, embedded, reshaped
from jaxcompress.graph.ports import Step, join, link


def _transpose(step: Step) -> None:
    order = [axis + 1 for axis in step.params["permutation"]]
    inverse = np.argsort(order) + 1
    link(
        step,
        0,
        -1,
        to=lambda labels: labels.transpose(0, *order),
        back=lambda labels: labels.transpose(0, *inverse),
    )


def _reshape(step: Step) -> None:
    a, b = step.shape(0), step.shape(-1)
    if 0 in a:
        return step.fix_all()
    link(
        step,
        0,
        -1,
        to=lambda labels: reshaped(labels, a, b),
        back=lambda labels: reshaped(labels, b, a),
    )


def _broadcast(step: Step) -> None:
    into, shape, out = step.params["broadcast_dimensions"], step.shape(0), step.shape(-1)
    source = [axis for axis, n in enumerate(shape) if n == out[into[axis]]]
    target, move = [into[axis] for axis in source], step.classes.move
    link(
        step,
        0,
        -1,
        to=lambda labels: move(labels, source, target, len(out)),
        back=lambda labels: move(labels, target, source, len(shape)),
    )


def _rev(step: Step) -> None:
    axes = tuple(axis + 1 for axis in step.params["dimensions"])
    flip = lambda labels: np.flip(labels, axes)
    link(step, 0, -1, to=flip, back=flip)


def _slice(step: Step) -> None:
    p = step.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    bounds = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    _window(step, [slice(*bound) for bound in bounds], narrow=-1, wide=0)


def _pad(step: Step) -> None:
    config = step.params["padding_config"]
    if not step.free(1) or any(low < 0 or high < 0 for low, high, _ in config):
        return step.fix_all()
    parts = [
        slice(low, low + (n - 1) * (inside + 1) + 1, inside + 1)
        for (low, _, inside), n in zip(config, step.shape(0), strict=True)
    ]
    _window(step, parts, narrow=0, wide=-1, zeros=True)


def _concatenate(step: Step) -> None:
    _parts(step, step.params["dimension"], -1, range(len(step.op.operands)))


def _split(step: Step) -> None:
    _parts(step, step.params["axis"], 0, [-1 - k for k in range(len(step.op.outputs))])


def _parts(step: Step, axis: int, wide: int, ports: Sequence[int]) -> None:
    start = 0
    for port in ports:
        end = start + step.shape(port)[axis]
        parts = [slice(None)] * axis + [slice(start, end)]
        _window(step, parts, narrow=port, wide=wide)
        start = end


def _window(
    step: Step, parts: Sequence[slice], *, narrow: int, wide: int, zeros: bool = False
) -> None:
    # The narrow port is a slice of the wide one; zeros around it may have any label: along axes on
    # which labels do not depend, that of the others.
    small, large = step.shape(narrow), step.shape(wide)
    moved = [(axis, part) for axis, part in enumerate(parts) if small[axis] != large[axis]]

    def embed(labels):
        for axis, part in moved:
            n, m = small[axis], large[axis]
            if not zeros or n == 1 or depends(labels, [axis]):
                labels = embedded(labels, axis, part, size=n, into=m)
        return labels

    link(step, narrow, wide, to=embed, back=lambda labels: cut(labels, moved))


def _gather(step: Step) -> None:
    # Axes that are taken whole pass; along the others any element may be taken.
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    fill = step.params["fill_value"]
    if fill is not None and abs(fill) > 0:  # NaN may stand for what lies outside
        return step.fix_all()
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(sizes)) if axis not in gone]
    pairs = zip(window, sorted(numbers.offset_dims), strict=True)
    _taken(step, [(a, b) for a, b in pairs if sizes[a] == step.shape(0)[a]])


def _dynamic_slice(step: Step) -> None:
    shapes = zip(step.shape(0), step.shape(-1), strict=True)
    _taken(step, [(axis, axis) for axis, (n, m) in enumerate(shapes) if n == m])


def _taken(step: Step, pairs: Sequence[tuple[int, int]]) -> None:
    source, target = ([pair[k] for pair in pairs] for k in (0, 1))
    for sign in (1, -1):
        join(step, 0, source, -1, target, signs=(sign, sign))


VIEWS: dict[str, Callable[[Step], None]] = {
    **dict.fromkeys("reshape squeeze expand_dims".split(), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
"""The rules by the names of the primitives."""
