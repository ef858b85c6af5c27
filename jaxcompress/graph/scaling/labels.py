"""Labels on the elements of values, and which of them must be equal.

An element with the label c is multiplied by t_c, for any t_c > 0; where c is `FIXED`, t_c = 1.

The question is which scales may move between layers without a change of the function. Nobody knows
beforehand how channels lie: a reshape mixes them with positions, a stack interleaves them, heads
share them. So every element may have a scale of its own at first, and each operation says which
must be equal; what is left is all the freedom there is. It never finds too much: a tie that is
missed would be a wrong rule, a tie too many only loses a scale.

Two things keep that cheap. Labels are arrays with an axis of size 1 wherever they do not depend on
it, so a scale per channel of [64, 56, 56, 256] activations is 256 numbers. And which labels are
equal is one flat array of representatives (a union-find that is compressed at once), so that a tie
of whole arrays is one NumPy operation.
"""

import math
from collections.abc import Sequence

import numpy as np

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

    def move(
        self, labels: Labels, source: Sequence[int], target: Sequence[int], rank: int
    ) -> Labels:
        """Labels along the axes `source`, tied along all others, at the axes `target` of a value.

        Args:
          labels: of a value of any rank.
          source, target: axes of that value, and where they are in one of rank `rank`.
        """
        others = [axis + 1 for axis in range(labels.ndim - 1) if axis not in source]
        labels = self.tie(labels, others)
        order = [at for _, at in sorted(zip(target, source, strict=True))]
        labels = labels.transpose(0, *(axis + 1 for axis in order), *others)
        shape = [labels.shape[0], *[1] * rank]
        for size, axis in zip(labels.shape[1:], sorted(target), strict=False):
            shape[axis + 1] = size
        return labels.reshape(shape)


def _compressed(labels: Labels) -> Labels:
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.take([0], axis)
            labels = first if (labels == first).all() else labels
    return labels


def depends(labels: Labels | None, axes: Sequence[int]) -> bool:
    """Whether a label depends on the index along some axes of its value."""
    return labels is not None and any(labels.shape[axis + 1] > 1 for axis in axes)


def cut(labels: Labels, parts: Sequence[tuple[int, slice]]) -> Labels:
    """Labels of a value from which slices are taken along some axes."""
    at = [slice(None)] * labels.ndim
    for axis, part in parts:
        if depends(labels, [axis]):
            at[axis + 1] = part
    return labels[tuple(at)]


def embedded(labels: Labels, axis: int, part: slice, *, size: int, into: int) -> Labels:
    """Labels of a value of `size` along an axis as a slice of one of size `into`, -1 around it."""
    shape = list(labels.shape)
    shape[axis + 1] = size
    labels = np.broadcast_to(labels, shape)
    shape[axis + 1] = into
    wide = np.full(shape, -1)
    wide[(slice(None),) * (axis + 1) + (part,)] = labels
    return wide


def reshaped(labels: Labels, shape: Sequence[int], into: Sequence[int]) -> Labels:
    """Labels of a reshaped value; axes on which they do not depend stay of size 1."""
    source, target = [labels.shape[0]], [labels.shape[0]]
    for old, new in _blocks(shape, into):
        kept = depends(labels, old)
        source += [shape[axis] if kept else 1 for axis in old]
        target += [into[axis] if kept else 1 for axis in new]
    return np.broadcast_to(labels, source).reshape(target)


def _blocks(shape: Sequence[int], into: Sequence[int]) -> list[tuple[range, range]]:
    # The axes of both shapes, in order, in the smallest parts with as many elements.
    blocks, i, j = [], 0, 0
    while i < len(shape) or j < len(into):
        start, other = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(into))
        while (n := math.prod(shape[start:i])) != (m := math.prod(into[other:j])):
            i, j = (i + 1, j) if n < m else (i, j + 1)
        blocks.append((range(start, i), range(other, j)))
    return blocks
