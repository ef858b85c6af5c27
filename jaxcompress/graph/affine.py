"""How a scale per channel passes through a program: labels on elements, and a rule per primitive.

An element with the label c is multiplied by t_c, for any t_c > 0. Every operation that touches a
labelled value ties labels together (what it adds must be scaled alike), passes them on, or fixes
them (t_c = 1: what it does depends on the size of its operand).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.inline import END, LOOP, carried, rows

FIXED = 0
"""The label of what must not be scaled; -1 is the label of what no rule has reached."""

Labels = np.ndarray  # int [trips, *shape], 1 along axes on which the label does not depend


class Classes:
    """Labels, and which of them must be equal."""

    def __init__(self):
        self.parent = np.zeros(1, np.int64)
        self.reasons: list[str] = []

    def fresh(self, shape: Sequence[int]) -> Labels:
        """New labels, all different."""
        start, count = len(self.parent), math.prod(shape)
        labels = np.arange(start, start + count)
        self.parent = np.concatenate([self.parent, labels])
        return labels.reshape(shape)

    def find(self, labels: Labels) -> Labels:
        """The same with one label for each class; `FIXED` for those that are fixed."""
        return np.where(labels < 0, -1, self.parent[labels])

    def union(self, a: Labels, b: Labels) -> None:
        """Ties labels in pairs; both arrays are flat, without -1."""
        a, b = self.parent[a], self.parent[b]
        apart = a != b
        pairs = np.unique(a[apart] * len(self.parent) + b[apart])
        for pair in pairs.tolist():
            x, y = (self._root(label) for label in divmod(pair, len(self.parent)))
            self.parent[max(x, y)] = min(x, y)
        while not np.array_equal(again := self.parent[self.parent], self.parent):
            self.parent = again

    def _root(self, x: int) -> int:
        while self.parent[x] != x:
            x = self.parent[x]
        return x

    def fix(self, labels: Labels, reason: str) -> None:
        """Labels that must not be scaled, and why."""
        found = self.find(labels)
        alive = np.unique(found[found > FIXED])
        if alive.size:
            self.reasons.append(reason)
            self.union(alive, np.zeros_like(alive))

    def tie(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """One label along some axes, which get the size 1."""
        axes = tuple(axis for axis in axes if labels.shape[axis] > 1)
        if not axes:
            return labels
        one = labels.max(axis=axes, keepdims=True)
        known = labels >= 0
        self.union(np.broadcast_to(one, labels.shape)[known], labels[known])
        return self.find(one)

    def merge(self, old: Labels | None, new: Labels) -> Labels:
        """Both labels of one value; what is fixed does not spread, it only fixes."""
        new = self.find(new)
        if old is None:
            return _compressed(np.where(new > FIXED, new, -1))
        old, new = np.broadcast_arrays(self.find(old), new)
        both = (old >= 0) & (new >= 0) & (old != new)
        if both.any():
            self.union(old[both], new[both])
        return _compressed(self.find(np.where(old < 0, np.where(new > FIXED, new, -1), old)))


def _compressed(labels: Labels) -> Labels:
    for axis in range(labels.ndim):
        first = labels.take([0], axis) if labels.shape[axis] > 1 else labels
        if labels.shape[axis] > 1 and (labels == first).all():
            labels = first
    return labels


def varies(labels: Labels | None, axes: Sequence[int]) -> bool:
    """Whether a label depends on the index along some axes of its value."""
    return labels is not None and any(labels.shape[axis + 1] > 1 for axis in axes)


def move(
    classes: Classes, labels: Labels, source: Sequence[int], target: Sequence[int], rank: int
) -> Labels:
    """Labels along the axes `source`, tied along all others, at the axes `target` of a value."""
    others = [axis + 1 for axis in range(labels.ndim - 1) if axis not in source]
    labels = classes.tie(labels, others)
    order = [at for _, at in sorted(zip(target, source, strict=True))]
    labels = labels.transpose(0, *(axis + 1 for axis in order), *others)
    shape = [labels.shape[0], *[1] * rank]
    for size, axis in zip(labels.shape[1:], sorted(target), strict=False):
        shape[axis + 1] = size
    return labels.reshape(shape)


def _along(labels: Labels, axis: int, size: int) -> Labels:
    # The same with its true size along an axis of the value.
    shape = list(labels.shape)
    shape[axis + 1] = size
    return np.broadcast_to(labels, shape)


def reshaped(labels: Labels, shape: Sequence[int], into: Sequence[int]) -> Labels:
    """Labels of a reshaped value; axes on which they do not depend stay of size 1."""
    blocks, i, j = [], 0, 0
    while i < len(shape) or j < len(into):
        start = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(into))
        while (n := math.prod(shape[start[0] : i])) != (m := math.prod(into[start[1] : j])):
            i, j = (i + 1, j) if n < m else (i, j + 1)
        blocks.append((start, (i, j)))
    source, target = [labels.shape[0]], [labels.shape[0]]
    for (i, j), (i_end, j_end) in blocks:
        depends = any(size > 1 for size in labels.shape[i + 1 : i_end + 1])
        source += shape[i:i_end] if depends else [1] * (i_end - i)
        target += into[j:j_end] if depends else [1] * (j_end - j)
    return np.broadcast_to(labels, source).reshape(target)


class Step:
    """One operation of a trial, and the labels at its ports.

    Ports are the operands 0, 1, ... and the results -1, -2, ...; signs are +1 for what is
    multiplied by t and -1 for what is divided by it.
    """

    def __init__(self, trial: Any, at: int):
        self.trial, self.at, self.op = trial, at, trial.flat.ops[at]
        self.classes, self.params = trial.classes, self.op.eqn.params

    def number(self, port: int) -> int | None:
        """The value at a port; None for a literal."""
        return self.op.operands[port] if port >= 0 else self.op.outputs[-1 - port]

    def shape(self, port: int) -> tuple[int, ...]:
        """The shape of a port."""
        eqn = self.op.eqn
        variable = eqn.invars[port] if port >= 0 else eqn.outvars[-1 - port]
        return tuple(variable.aval.shape)

    def free(self, port: int) -> bool:
        """Whether an operand is known to be 0 or infinite everywhere."""
        return port >= 0 and self.trial.flat.is_free(self.op, port)

    def see(self, port: int, sign: int = 1) -> Labels | None:
        """Labels at a port, in the trips of the operation; None if there are none."""
        number = self.number(port)
        labels = None if number is None else self.trial.see(number, sign)
        if labels is None or number is None:
            return None
        flat = self.trial.flat
        if flat.values[number].aval.shape != self.shape(port):
            return self.classes.fix(labels, "it is split over devices")
        if labels.shape[0] == 1:
            return labels
        inner = flat.trips[self.op.region] // flat.trips[flat.region.get(number, ())]
        return np.repeat(labels, inner, axis=0)

    def put(self, port: int, labels: Labels | None, sign: int = 1) -> None:
        """The value at a port has these labels too."""
        if labels is None:
            return
        number, classes = self.number(port), self.classes
        if self.free(port):
            return
        if number is None:
            value = self.trial.flat.literal(self.op, port)
            what = "a number" if value is None else value
            return classes.fix(labels, f"{self.op.primitive!r} combines it with {what}")
        if self.trial.flat.values[number].aval.shape != self.shape(port):
            return classes.fix(labels, "it is split over devices")
        if labels.shape[0] > 1:
            own = self.trial.flat.trips[self.trial.flat.region.get(number, ())]
            labels = labels.reshape(own, -1, *labels.shape[1:])
            labels = np.squeeze(classes.tie(labels, [1]), 1)
        self.trial.assign(number, labels, sign)

    def fix(self, port: int, reason: str = "") -> None:
        """What is at a port must not be scaled."""
        for sign in (1, -1):
            if (labels := self.see(port, sign)) is not None:
                self.classes.fix(labels, reason)


Rule = Callable[[Step], None]
Map = Callable[[Labels], Labels]


def link(step: Step, a: int, b: int, *, to: Map, back: Map) -> None:
    """The labels of two ports are those of the other one, mapped."""
    for sign in (1, -1):
        if (labels := step.see(a, sign)) is not None:
            step.put(b, to(labels), sign)
        if (labels := step.see(b, sign)) is not None:
            step.put(a, back(labels), sign)


def same(step: Step, a: int, b: int, *, opposite: bool = False) -> None:
    """Two ports are scaled alike, element by element; or inversely."""
    if step.free(a) or step.free(b):
        return
    for sign in (1, -1):
        other = -sign if opposite else sign
        step.put(b, _spread(step, step.see(a, sign), step.shape(b)), other)
        step.put(a, _spread(step, step.see(b, other), step.shape(a)), sign)


def _spread(step: Step, labels: Labels | None, shape: tuple[int, ...]) -> Labels | None:
    if labels is None:
        return None
    if labels.ndim == len(shape) + 1:  # sizes of 1 may stand for all
        return step.classes.tie(labels, [axis + 1 for axis, n in enumerate(shape) if n == 1])
    if labels.ndim == 1:
        return labels.reshape(-1, *(1 for _ in shape))
    return step.classes.tie(labels, range(1, labels.ndim)).reshape(-1)


def _alike(step: Step) -> None:
    # Sums, maxima, choices: all operands are scaled as the result.
    for port in range(len(step.op.operands)):
        same(step, -1, port)


def _select(step: Step) -> None:
    for port in range(1, len(step.op.operands)):
        same(step, -1, port)


def _pairs(step: Step) -> None:
    for port in range(len(step.op.operands)):
        same(step, port, -1 - port)


def _compare(step: Step) -> None:
    same(step, 0, 1)


def _div(step: Step) -> None:
    same(step, 0, -1)
    step.fix(1, "it is a divisor")


def _sign(step: Step) -> None:
    step.fix(-1, "it is the result of 'sign'")


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
        return _unknown(step)
    link(
        step,
        0,
        -1,
        to=lambda labels: reshaped(labels, a, b),
        back=lambda labels: reshaped(labels, b, a),
    )


def _broadcast(step: Step) -> None:
    into, shape, out = step.params["broadcast_dimensions"], step.shape(0), step.shape(-1)
    kept = [(i, axis) for i, axis in enumerate(into) if shape[i] == out[axis]]
    source, target = ([pair[k] for pair in kept] for k in (0, 1))
    link(
        step,
        0,
        -1,
        to=lambda labels: move(step.classes, labels, source, target, len(out)),
        back=lambda labels: move(step.classes, labels, target, source, len(shape)),
    )


def _window(step: Step, cuts: Sequence[tuple[int, slice]], *, narrow: int, wide: int) -> None:
    # The narrow port is a slice of the wide one along some axes.
    small, large = step.shape(narrow), step.shape(wide)

    def cut(labels):
        at = [slice(None)] * labels.ndim
        for axis, part in cuts:
            if labels.shape[axis + 1] > 1:
                at[axis + 1] = part
        return labels[tuple(at)]

    def embed(labels):
        for axis, part in cuts:
            if small[axis] != large[axis]:
                narrowed = _along(labels, axis, small[axis])
                shape = list(labels.shape)
                shape[axis + 1] = large[axis]
                labels = np.full(shape, -1)
                labels[(slice(None),) * (axis + 1) + (part,)] = narrowed
        return labels

    link(step, narrow, wide, to=embed, back=cut)


def _slice(step: Step) -> None:
    p = step.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    bounds = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    _window(step, [(i, slice(*bound)) for i, bound in enumerate(bounds)], narrow=-1, wide=0)


def _parts(step: Step, axis: int, wide: int, ports: Sequence[int]) -> None:
    start = 0
    for port in ports:
        end = start + step.shape(port)[axis]
        _window(step, [(axis, slice(start, end))], narrow=port, wide=wide)
        start = end


def _concatenate(step: Step) -> None:
    _parts(step, step.params["dimension"], -1, range(len(step.op.operands)))


def _split(step: Step) -> None:
    _parts(step, step.params["axis"], 0, [-1 - k for k in range(len(step.op.outputs))])


def _pad(step: Step) -> None:
    config = step.params["padding_config"]
    if not step.free(1) or any(low < 0 or high < 0 for low, high, _ in config):
        return _unknown(step)
    # Zeros have any label: along axes on which labels do not depend, that of the others.
    cuts = [
        (axis, slice(low, low + (n - 1) * (inside + 1) + 1, inside + 1))
        for axis, ((low, _, inside), n) in enumerate(zip(config, step.shape(0), strict=True))
    ]
    wide = {axis for axis, _ in cuts if step.shape(0)[axis] == 1}

    def to(labels):
        out = step.shape(-1)
        for axis, part in cuts:
            if out[axis] != step.shape(0)[axis] and (labels.shape[axis + 1] > 1 or axis in wide):
                shape = list(labels.shape)
                shape[axis + 1] = out[axis]
                padded = np.full(shape, -1)
                padded[(slice(None),) * (axis + 1) + (part,)] = labels
                labels = padded
        return labels

    def back(labels):
        at = [part if labels.shape[axis + 1] > 1 else slice(None) for axis, part in cuts]
        return labels[(slice(None), *at)]

    link(step, 0, -1, to=to, back=back)


def _gather(step: Step) -> None:
    # Axes that are taken whole pass; along the others any element may be taken.
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    fill = step.params["fill_value"]
    if fill is not None and abs(fill) > 0:  # NaN may stand for what lies outside
        return _unknown(step)
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
        _joined(step, 0, source, -1, target, sign, sign)


def _rev(step: Step) -> None:
    axes = tuple(axis + 1 for axis in step.params["dimensions"])
    flip = lambda labels: np.flip(labels, axes)
    link(step, 0, -1, to=flip, back=flip)


def _reduce(step: Step) -> None:
    axes = [axis + 1 for axis in step.params["axes"]]
    link(
        step,
        0,
        -1,
        to=lambda labels: np.squeeze(step.classes.tie(labels, axes), tuple(axes)),
        back=lambda labels: np.expand_dims(labels, tuple(axes)),
    )


def _pool(step: Step) -> None:
    window = step.params["window_dimensions"]
    shapes = zip(window, step.shape(0), step.shape(-1), strict=True)
    axes = [axis + 1 for axis, (size, n, m) in enumerate(shapes) if size > 1 or n != m]
    tied = lambda labels: step.classes.tie(labels, axes)
    link(step, 0, -1, to=tied, back=tied)


def _cumulative(step: Step) -> None:
    tied = lambda labels: step.classes.tie(labels, [step.params["axis"] + 1])
    link(step, 0, -1, to=tied, back=tied)


def _unknown(step: Step) -> None:
    name = step.op.primitive
    for port in range(len(step.op.operands)):
        step.fix(port, f"it enters {name!r}, which does not pass a scale on")
    for port in range(len(step.op.outputs)):
        step.fix(-1 - port, f"it comes from {name!r}, which does not pass a scale on")


def _mul(step: Step, decide: bool) -> bool:
    flat, (a, b) = step.trial.flat, step.op.operands
    if a is not None and a == b:
        _unknown(step)
        return True
    fixed = [n is None or not (flat.is_data(n) or flat.is_made_of_params(n)) for n in (a, b)]
    if any(fixed):
        same(step, int(fixed[0]), -1)
        return True
    seen = {port: any(step.see(port, s) is not None for s in (1, -1)) for port in (0, 1, -1)}
    if not any(seen.values()):
        return True
    mode = step.trial.mode(step.at, _mul_options(step, seen), decide)
    if mode is None:
        return False
    if mode == "cancel":
        same(step, 0, 1, opposite=True)
        step.fix(-1, "it is divided out of one product and multiplied into another")
        return True
    carrier = int(mode)
    same(step, carrier, -1)
    step.fix(1 - carrier, "it is a factor of a scaled value")
    return True


def _mul_options(step: Step, seen: dict[int, bool]) -> list[str]:
    flat = step.trial.flat
    data = [flat.is_data(number) for number in step.op.operands]
    if seen[-1]:
        options = ["0", "1"] if data[0] or not data[1] else ["1", "0"]
        return options[:1] if seen[int(options[0])] else options
    carrier = 0 if seen[0] else 1
    if all(data):
        return [str(carrier)]
    if step.trial.fold and any(data) and data[carrier]:
        return ["cancel"]
    return [str(carrier), "cancel"]


class Roles(NamedTuple):
    """Axes of a product of arrays."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    out_batch: tuple[int, ...]
    out_free: tuple[tuple[int, ...], tuple[int, ...]]


def dot_roles(step: Step) -> Roles:
    """The axes of a `dot_general`."""
    contracted, batch = step.params["dimension_numbers"]
    free = tuple(
        tuple(a for a in range(len(step.shape(k))) if a not in (*contracted[k], *batch[k]))
        for k in (0, 1)
    )
    n, m = len(batch[0]), len(batch[0]) + len(free[0])
    out_free = tuple(range(n, m)), tuple(range(m, m + len(free[1])))
    return Roles(contracted, batch, (free[0], free[1]), tuple(range(n)), out_free)


def _joined(
    step: Step, a: int, axes: Sequence[int], b: int, at: Sequence[int], sign: int, other: int
) -> None:
    # Axes of one port are axes of another one; labels do not depend on the other axes.
    classes = step.classes
    if (labels := step.see(a, sign)) is not None:
        step.put(b, move(classes, labels, axes, at, len(step.shape(b))), other)
        step.put(a, move(classes, labels, axes, axes, len(step.shape(a))), sign)
    if (labels := step.see(b, other)) is not None:
        step.put(a, move(classes, labels, at, axes, len(step.shape(a))), sign)
        step.put(b, move(classes, labels, at, at, len(step.shape(b))), other)


def _dot(step: Step, decide: bool) -> bool:
    flat, roles = step.trial.flat, dot_roles(step)
    data = [flat.is_data(number) for number in step.op.operands]
    if step.op.operands[0] == step.op.operands[1]:
        _unknown(step)
        return True
    done = True
    for sign in (1, -1):
        ports = (0, 1, -1)
        if all(step.see(port, sign) is None for port in ports):
            if sign == 1 and sum(data) == 1 and step.see(1 - data.index(True), -1) is not None:
                pass  # the weight is divided: so is nothing else, but its input is scaled
            else:
                continue
        options = _dot_options(step, roles, data, sign)
        mode = step.trial.mode((step.at, sign), options, decide)
        if mode is None:
            done = False
        elif mode == "weight":
            _weighted(step, roles, data.index(True))
        else:
            _carried(step, roles, int(mode), sign)
    return done


def _dot_options(step: Step, roles: Roles, data: list[bool], sign: int) -> list[str]:
    out = step.see(-1, sign)
    along = [varies(out, roles.out_free[k]) for k in (0, 1)]
    if sum(data) == 1:
        x = data.index(True)
        seen = step.see(x, sign)
        mixes = varies(seen, roles.free[x]) and not varies(seen, roles.contracted[x])
        return [str(x)] if mixes or (along[x] and not along[1 - x]) else ["weight"]
    for k in (0, 1):
        if step.see(k, sign) is not None:
            return [str(k)]
    return ["1", "0"] if along[0] == along[1] else [str(int(along[1]))]


def _weighted(step: Step, roles: Roles, x: int) -> None:
    w = 1 - x
    into, gives = (*roles.batch[w], *roles.contracted[w]), (*roles.batch[w], *roles.free[w])
    _joined(step, x, (*roles.batch[x], *roles.contracted[x]), w, into, 1, -1)
    _joined(step, w, gives, -1, (*roles.out_batch, *roles.out_free[w]), 1, 1)


def _carried(step: Step, roles: Roles, x: int, sign: int) -> None:
    axes = (*roles.batch[x], *roles.free[x])
    _joined(step, x, axes, -1, (*roles.out_batch, *roles.out_free[x]), sign, sign)
    data = [step.trial.flat.is_data(number) for number in step.op.operands]
    for also in (1, -1) if any(data) else (sign,):
        if (labels := step.see(1 - x, also)) is not None:
            step.classes.fix(labels, "it is a factor of a scaled value")


def _conv(step: Step) -> None:
    flat, p = step.trial.flat, step.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if not flat.is_data(step.number(0)) or flat.is_data(step.number(1)):
        return _unknown(step)
    if p["batch_group_count"] > 1:
        return _unknown(step)
    out_axis, in_axis = numbers.rhs_spec[:2]
    _joined(step, 1, (out_axis,), -1, (numbers.out_spec[1],), 1, 1)
    kernel, channel = step.shape(1), numbers.lhs_spec[1]
    if (labels := step.see(0)) is not None:
        labels = move(step.classes, labels, (channel,), (channel,), len(step.shape(0)))
        step.put(0, labels)
        flatted = labels.reshape(len(labels), -1)
        if flatted.shape[1] > 1:
            grouped = flatted.reshape(len(labels), groups, 1, -1)
            size = kernel[out_axis] // groups
            flatted = np.broadcast_to(grouped, (len(labels), groups, size, kernel[in_axis]))
        flatted = flatted.reshape(len(labels), -1, kernel[in_axis] if flatted.ndim > 2 else 1)
        step.put(1, move(step.classes, flatted, (0, 1), (out_axis, in_axis), len(kernel)), -1)
    if (labels := step.see(1, -1)) is not None:
        labels = move(step.classes, labels, (out_axis, in_axis), (0, 1), 2)
        full = np.broadcast_to(labels, (len(labels), kernel[out_axis], kernel[in_axis]))
        full = full.reshape(len(labels), groups, -1, kernel[in_axis])
        full = step.classes.tie(full, [2]).reshape(len(labels), -1)
        step.put(0, move(step.classes, full, (0,), (channel,), len(step.shape(0))))


def _loop(step: Step) -> None:
    # Rows of a scan are labelled trip by trip; what a loop carries or collects is left alone.
    op, trial = step.op, step.trial
    _, by_row = rows(op)
    _, inner = carried(op)
    first = len(op.operands) - len(by_row)
    for port in range(len(op.operands) - len(inner), first):
        step.fix(port, "a loop carries it")
    for number in op.outputs:
        if number not in by_row:
            for sign in (1, -1):
                if (labels := trial.see(number, sign)) is not None:
                    step.classes.fix(labels, "a loop carries or collects it")
    outer_trips = trial.flat.trips[op.region]
    trips = trial.flat.trips[(*op.region, op.place)]
    for port, number in zip(range(first, len(op.operands)), by_row, strict=True):
        for sign in (1, -1):
            if (labels := step.see(port, sign)) is not None:
                shape = labels.shape[2:]
                if labels.shape[:2] != (1, 1):
                    size = (outer_trips, trips // outer_trips, *shape)
                    labels = np.broadcast_to(labels, size)
                trial.assign(number, labels.reshape(-1, *shape), sign)
            if (labels := trial.see(number, sign)) is not None:
                shape = labels.shape[1:]
                lead = (1, 1) if len(labels) == 1 else (outer_trips, trips // outer_trips)
                step.put(port, labels.reshape(*lead, *shape), sign)


def _end(step: Step) -> None:
    params = step.op.eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["body_jaxpr"]
    given = len(compat.body(body).jaxpr.outvars)
    for port in range(len(step.op.operands) - given, len(step.op.operands)):
        number = step.number(port)
        for sign in (1, -1):
            labels = None if number is None else step.trial.see(number, sign)
            if labels is not None:
                step.classes.fix(labels, "a loop carries or collects it")
    for number in step.op.outputs:
        for sign in (1, -1):
            if (labels := step.trial.see(number, sign)) is not None:
                step.classes.fix(labels, "a loop carries it")


_RULES: dict[str, Rule] = {
    **dict.fromkeys("add add_any sub max min clamp".split(), _alike),
    **dict.fromkeys("eq ne lt le gt ge".split(), _compare),
    **dict.fromkeys(
        "neg abs copy copy_p convert_element_type reduce_precision sharding_constraint name "
        "optimization_barrier".split(),
        _pairs,
    ),
    **dict.fromkeys("reshape squeeze expand_dims".split(), _reshape),
    **dict.fromkeys("reduce_sum reduce_max reduce_min".split(), _reduce),
    **dict.fromkeys("reduce_window_sum reduce_window_max reduce_window_min".split(), _pool),
    **dict.fromkeys("cumsum cummax cummin".split(), _cumulative),
    "select_n": _select,
    "div": _div,
    "sign": _sign,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "concatenate": _concatenate,
    "split": _split,
    "pad": _pad,
    "rev": _rev,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    compat.CONV: _conv,
    LOOP: _loop,
    END: _end,
}
_CHOOSING: dict[str, Callable[[Step, bool], bool]] = {"mul": _mul, compat.DOT: _dot}


def apply(step: Step, *, decide: bool) -> bool:
    """What an operation does with the labels at its ports; by default it fixes them.

    Returns:
      False if a choice must be made first, and `decide` does not allow it.
    """
    name = step.op.primitive
    if name in _CHOOSING:
        return _CHOOSING[name](step, decide)
    _RULES.get(name, _unknown)(step)
    return True
