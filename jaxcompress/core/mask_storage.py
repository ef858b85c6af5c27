"""Which storage of a mask is the smallest, by exact bytes."""

import math

import numpy as np

from jaxcompress.core.pytrees import packed_bytes
from jaxcompress.core.sparse import WIDEST, Bitmask, Groups, Positions, Rows, kept_in_line

_LARGEST_GROUP = 16  # of the N:M patterns that are looked for


def smallest_form(mask: np.ndarray) -> Positions:
    """The form of the smallest storage of a concrete mask, of equals the simplest; not packed yet.

    >>> smallest_form(np.tile([True, False, False, False], (64, 16))).name
    'groups:1:4:1'
    """
    nnz = int(mask.sum())
    forms = [*for_any_mask(mask.shape, nnz), *for_even_masks(mask.shape, nnz)]
    # By bytes first: whether a form fits costs a pass over the mask.
    return next(form for form in sorted(forms, key=packed_bytes) if form.fits(mask))


def for_any_mask(shape: tuple[int, ...], nnz: int) -> list[Positions]:
    """The forms that every mask with `nnz` kept elements has, the simplest first."""
    last = max(len(shape) - 1, 0)
    rows = [Rows.like(shape, nnz, split=split) for split in range(last, -1, -1)]
    return [Bitmask.like(shape), *rows]


def for_even_masks(shape: tuple[int, ...], nnz: int) -> list[Positions]:
    """The forms that a mask with `nnz` kept elements has if they are spread evenly.

    N:M along any axis with M up to 16, constant fan-in along any axis and along all but any.
    """
    size, found = math.prod(shape), []
    for along in _lines(len(shape)) if size else ():
        length = math.prod(shape[axis] for axis in along)
        small = range(2, min(length, _LARGEST_GROUP) + 1) if len(along) == 1 else ()
        # Of equals a power of two, which kernels know.
        for group in sorted({*small, length}, key=lambda group: (group & (group - 1) != 0, group)):
            # ceil(N * length / M) grows with N: at most one N has the right count.
            kept = nnz * length // size * group // length
            right = size // length * kept_in_line(length, kept, group) == nnz
            if right and 2 <= group <= WIDEST:
                found.append(Groups.like(shape, kept, group, along=along))
    return found


def _lines(ndim: int) -> list[tuple[int, ...]]:
    # Each axis, the last one first, then all axes but one.
    axes = range(ndim - 1, -1, -1)
    others = [tuple(a for a in range(ndim) if a != axis) for axis in axes] if ndim > 2 else []
    return [*((axis,) for axis in axes), *others]
