"""Exact top-k masks of an array or of a whole tree, without a sort.

Every pruning criterion ends here: given scores and a number of weights to keep, which ones? The
answer is that of a stable descending argsort, bit for bit, but found by counting (counting.py):
17 reads of float32 scores, and one more per two bits of their number if there are ties to break;
no copy of the scores, the same code per leaf and globally, and on sharded scores no traffic between
devices but the sum of three counts per read.
"""

import functools
from collections.abc import Iterable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.core.numerics.counting import (
    count_true,
    flat_index,
    lowest_order,
    order_bits,
    reread,
    search,
)
from jaxcompress.core.paths import leaves_with_paths

_MAX_SIZE = 2**31 - 1  # counts and flat indices are 32-bit words


def keep_count(size: int, sparsity) -> int | Array:
    """Number of `size` weights that survive at `sparsity`: (1 - sparsity) * size, rounded.

    The product is exact and the rounding is half to even, for a Python number and for a traced
    one alike: `keep_count(n, s)` under `jit` equals `keep_count(n, float(s))` outside, at any size
    (a float32 product would lose units beyond 2**24). The number that counts is the one passed:
    0.9 is the binary float just above nine tenths.

    Args:
      size: number of weights, at most 2**31 - 1.
      sparsity: fraction to remove. A Python or NumPy number in [0, 1], or an array, traced or
        not, which is read as float32 and clipped to [0, 1] (NaN removes nothing).

    Returns:
      A Python int for a number; int32 of the shape of `sparsity` for an array; in [0, size].

    Raises:
      ValueError: `size` or a number `sparsity` is out of range.

    >>> keep_count(10, 0.75), keep_count(6, 0.75), keep_count(10, 1.0)
    (2, 2, 0)
    >>> int(jax.jit(lambda s: keep_count(2**31 - 1, s))(0.5))
    1073741824
    """
    if not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"size must be in [0, 2**31 - 1], got {size}")
    if isinstance(sparsity, Array):
        return _keep_count_traced(size, sparsity.astype(np.float32))
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(float(sparsity))
    return round((1 - exact) * size)


def top_k_mask(scores: Array, keep) -> Array:
    """True at the `keep` largest of `scores`; of equal scores the first in flat order win.

    Equal, bit for bit, to the first `keep` entries of a stable descending argsort. NaN counts as
    -inf; -0 equals 0.

    Args:
      scores: [...] floats, integers or bools; a scalar or a zero-size array will do.
      keep: number of entries to keep, in [0, scores.size]. A Python int, or an int scalar array,
        traced or not, which is clipped to that range.

    Returns:
      [...] bool, with exactly `keep` True entries, and the sharding of `scores`.

    Raises:
      ValueError: more than 2**31 - 1 scores; a Python `keep` out of range; `keep` not a scalar.
      TypeError: complex scores; a `keep` that is not an integer.

    >>> top_k_mask(jnp.array([0.5, 2.0, 0.5, 0.1]), 2).tolist()
    [True, True, False, False]
    """
    return top_k_masks(jnp.asarray(scores), keep)


def top_k_masks(scores, keep):
    """`top_k_mask` over all leaves of a tree at once: the `keep` largest of all the scores.

    Ties go to the earlier leaf in flatten order, then to the lower flat index. Nothing is
    concatenated. Floating leaves of different dtypes are compared by value; integer leaves must
    share one dtype. Under `vmap` scores and `keep` may be batched.

    Args:
      scores: tree of arrays, as in `top_k_mask`.
      keep: as in `top_k_mask`, of the total size.

    Returns:
      Tree of bool arrays, of the structure and shapes of `scores`.

    Raises:
      ValueError, TypeError: as in `top_k_mask`; leaves that cannot be compared.

    >>> top_k_masks({"a": jnp.array([3, 1]), "b": jnp.array([[2], [3]])}, 2)["b"].tolist()
    [[False], [True]]
    """
    paths_and_scores = [(path, jnp.asarray(leaf)) for path, leaf in leaves_with_paths(scores)]
    total = sum(leaf.size for _, leaf in paths_and_scores)
    if total > _MAX_SIZE:
        raise ValueError(
            f"scores hold {total} elements, a selection spans at most 2**31 - 1: "
            "select per leaf, or per part of the tree"
        )
    keep = _checked_keep(keep, total)
    masks = _masks(_comparable(paths_and_scores), keep) if paths_and_scores else ()
    return jax.tree.unflatten(jax.tree.structure(scores), masks)


@jax.jit
def _masks(leaves: tuple[Array, ...], keep: Array) -> tuple[Array, ...]:
    # The order is lexicographic, score first, flat position second: find the score of the last
    # element kept, then how far to go into the elements of that very score.
    leaves = lax.stop_gradient(leaves)
    ends = np.cumsum([leaf.size for leaf in leaves])
    starts = tuple(jnp.uint32(end - leaf.size) for end, leaf in zip(ends, leaves, strict=True))
    size = jnp.int32(ends[-1])
    lowest = lowest_order(leaves[0].dtype)
    highest = jnp.array(np.iinfo(lowest.dtype).max, lowest.dtype)

    def reach(thresholds):
        orders = map(order_bits, reread(leaves, thresholds[0]))
        return _sum_counts([u >= t for t in thresholds] for u in orders)

    last = search(reach, low=jnp.array(lowest), high=highest, size=size, keep=keep)

    def tied(x):  # the maximum puts a NaN where -inf is
        return jnp.maximum(order_bits(x), lowest) == last.at

    def tied_before(drops):  # ties that are not among the last `drop` of all elements
        again = zip(*reread((leaves, starts), drops[0]), strict=True)
        ties = ((tied(x), flat_index(x, start)) for x, start in again)
        stops = [size.astype(np.uint32) - drop for drop in drops]
        return _sum_counts([tie & (index < stop) for stop in stops] for tie, index in ties)

    # When `keep` elements reach the score found there is nothing to break, and no round is run.
    most = jnp.where(last.reach == keep, 0, size).astype(np.uint32)
    ties, wanted = last.reach - last.above, keep - last.above
    drop = search(tied_before, low=jnp.uint32(0), high=most, size=ties, keep=wanted).at
    stop = size.astype(np.uint32) - drop
    return tuple(
        (order_bits(x) > last.at) | (tied(x) & (flat_index(x, start) < stop))
        for x, start in zip(leaves, starts, strict=True)
    )


def _sum_counts(predicates_of_leaves: Iterable[Sequence[Array]]) -> Sequence[Array]:
    counts = [count_true(predicates) for predicates in predicates_of_leaves]
    return [functools.reduce(jnp.add, column) for column in zip(*counts, strict=True)]


def _comparable(paths_and_scores: Sequence[tuple[str, Array]]) -> tuple[Array, ...]:
    """The leaves in one dtype that orders them all; every conversion is exact."""
    leaves = []
    for path, leaf in paths_and_scores:
        if jnp.issubdtype(leaf.dtype, np.complexfloating):
            where = f" at {path!r}" if path else ""
            raise TypeError(f"scores{where} are complex: select on their magnitude")
        if leaf.dtype == np.bool_:
            leaf = leaf.astype(np.uint8)
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1:
            leaf = leaf.astype(np.float32)
        elif leaf.dtype.name in ("int2", "int4", "uint2", "uint4"):
            leaf = leaf.astype(np.int8)
        leaves.append(leaf)
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) == 1:
        return tuple(leaves)
    for (path, _), leaf in zip(paths_and_scores, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"scores at {path!r} are {leaf.dtype}, the other leaves "
                f"{', '.join(sorted(d.name for d in dtypes - {leaf.dtype}))}: "
                "leaves of different dtypes are compared only if all are floating"
            )
    wide = np.float64 if np.dtype(np.float64) in dtypes else np.float32
    return tuple(leaf.astype(wide) for leaf in leaves)


def _checked_keep(keep, total: int) -> Array:
    if isinstance(keep, int | np.integer):
        if not 0 <= keep <= total:
            raise ValueError(f"keep must be in [0, {total}], the number of scores; got {keep}")
        return jnp.int32(keep)
    if not isinstance(keep, Array) or not jnp.issubdtype(keep.dtype, np.integer):
        raise TypeError(f"keep must be an integer number of scores, got {keep!r}: see keep_count")
    if keep.ndim:
        raise ValueError(f"keep must be a scalar, got shape {keep.shape}: use jax.vmap for several")
    wide = keep if keep.dtype.itemsize >= 4 else keep.astype(np.int32)
    return jnp.clip(wide, wide.dtype.type(0), wide.dtype.type(total)).astype(np.int32)


def _keep_count_traced(size: int, sparsity: Array) -> Array:
    """round((1 - sparsity) * size) in 32-bit integers; sparsity float32 [...]."""
    word = np.uint32
    sparsity = jnp.where(sparsity > 0, jnp.minimum(sparsity, np.float32(1)), np.float32(0))
    bits = lax.bitcast_convert_type(sparsity, np.uint32)
    # sparsity = mantissa * 2**-(24 + shift), shift in [0, 31]. Below 2**-32 it removes less than
    # half a weight: none.
    exponent = (bits >> word(23)).astype(np.int32)
    mantissa = (bits & word(0x7FFFFF)) | word(0x800000)
    mantissa = jnp.where(
        exponent >= 127, word(1 << 24), jnp.where(exponent < 95, word(0), mantissa)
    )
    shift = jnp.clip(126 - exponent, 0, 31).astype(np.uint32)
    # mantissa * size = high * 2**32 + low, by schoolbook multiplication, a byte at a time
    high = low = jnp.zeros_like(bits)
    for place in (0, 8, 16, 24):
        high = high + mantissa * word((size >> place) & 0xFF)
        low, high = low | ((high & word(0xFF)) << word(place)), high >> word(8)
    # twice the removed number, and whether a fraction of it was cut off
    top = (high << word(9)) | (low >> word(23))
    twice = top >> shift
    cut = ((low & word(0x7FFFFF)) != 0) | ((twice << shift) != top)
    kept = word(size) - (twice >> word(1))
    above_half = (twice & word(1) != 0) & (cut | (kept & word(1) != 0))
    return (kept - above_half.astype(np.uint32)).astype(np.int32)
