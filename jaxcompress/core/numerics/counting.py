"""Order statistics by counting: how many elements reach a threshold, and no sort.

A sort of 10 million floats moves them dozens of times and, on a sharded array, across devices.
Counting reads them in place, so the only thing that crosses devices is a scalar. Two facts make
it quick: floats compare like integers after one subtraction (`order_bits`), and on one device a
variadic reduction counts three thresholds in one pass over memory, which is two bits of the answer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Count = Callable[[Sequence[Array]], Sequence[Array]]  # thresholds -> counts, all scalars

# Thresholds per pass. On a CPU 1 to 3 cost the same (memory bound), 7 cost 1.6 times as much for
# 1.5 times the bits.
_THRESHOLDS = 3


class Found(NamedTuple):
    """Where a search ended; all scalars."""

    at: Array  # unsigned: the largest threshold that enough elements reach
    reach: Array  # int32: elements with order >= at
    above: Array  # int32: elements with order > at; meaningful where reach != keep


def order_bits(x: Array) -> Array:
    """Map numbers to unsigned integers of the same width that compare alike.

    For floats -0 equals 0 and every NaN lies below `lowest_order`, the image of -inf.

    Args:
      x: [...] integers, or floats of 16, 32 or 64 bits.

    Returns:
      [...] unsigned integers u with u[i] < u[j] exactly when x[i] < x[j].

    >>> order_bits(jnp.array([3, -1, 2], jnp.int8)).tolist()
    [131, 127, 130]
    """
    word = np.dtype(f"uint{x.dtype.itemsize * 8}")
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x
    bits = lax.bitcast_convert_type(x, word)
    sign = word.type(1 << (word.itemsize * 8 - 1))
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        return bits ^ sign
    # Sign and magnitude to two's complement, then turned until +inf is the largest word:
    # the positive NaNs, which lay above +inf, come out at the bottom, where they are wanted.
    turn = word.type(_infinity_bits(x.dtype) + 1)
    return jnp.where(bits >= sign, (sign - turn) - bits, bits - turn)


def lowest_order(dtype: np.dtype) -> np.unsignedinteger:
    """The image under `order_bits` of the lowest number of `dtype`: -inf for floats."""
    word = np.dtype(f"uint{dtype.itemsize * 8}").type
    if jnp.issubdtype(dtype, jnp.integer):
        return word(0)
    return word(np.iinfo(word).max - 2 * _infinity_bits(dtype))


def flat_index(x: Array, start: Array) -> Array:
    """Row-major position of every element of `x`, plus the uint32 scalar `start`; uint32 [...].

    Built from one iota per axis: a reshape to one axis would move data between devices.
    """
    index, stride = jnp.broadcast_to(start, x.shape), 1
    for axis in reversed(range(x.ndim)):
        index = index + lax.broadcasted_iota(np.uint32, x.shape, axis) * np.uint32(stride)
        stride *= x.shape[axis]
    return index


def count_true(predicates: Sequence[Array], *, one_pass: bool | None = None) -> Sequence[Array]:
    """Number of True entries of each of several arrays of one shape; int32 scalars.

    Args:
      predicates: bool [...].
      one_pass: count them all in one variadic reduction. On a CPU a sum each would be one pass over
        memory each; but over several devices XLA gathers the counts of a variadic reduction, and
        adds up those of single ones in one all-reduce. None: True if there is one device.
    """
    ones = tuple(jnp.atleast_1d(p).astype(np.int32) for p in predicates)
    axes = tuple(range(ones[0].ndim))
    if jax.device_count() == 1 if one_pass is None else one_pass:
        add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
        return lax.reduce(ones, (np.int32(0),) * len(ones), add, axes)
    return [lax.reduce(x, np.int32(0), lax.add, axes) for x in ones]


def search(count: Count, *, low: Array, high: Array, size: Array, keep: Array) -> Found:
    """Largest threshold in [low, high] that at least `keep` elements reach.

    Four-way search: each round counts three thresholds and keeps a quarter of the interval. It
    ends early when a threshold is reached by exactly `keep` elements; no round is run at all when
    `low` is.

    Args:
      count: number of elements that reach each of the thresholds; falls as a threshold rises.
      low, high: unsigned scalars of one dtype.
      size: int32 scalar, elements that reach `low`; at least `keep`.
      keep: int32 scalar.
    """
    word = low.dtype.type
    one = word(1)

    def unsettled(state: tuple[Found, Array]) -> Array:
        found, high = state
        return (found.at < high) & (found.reach != keep)

    def narrow(state: tuple[Found, Array]) -> tuple[Found, Array]:
        (at, reach, above), high = state
        width = high - at
        step = width // word(_THRESHOLDS + 1) + one
        steps = [step * word(k) for k in range(1, _THRESHOLDS + 1)]
        thresholds = [at + jnp.minimum(s, width) for s in steps]
        rounds = [(t, n, n >= keep) for t, n in zip(thresholds, count(thresholds), strict=True)]
        for t, n, enough in rounds:
            at, reach = jnp.where(enough, t, at), jnp.where(enough, n, reach)
        for t, n, enough in reversed(rounds):
            high, above = jnp.where(enough, high, t - one), jnp.where(enough, above, n)
        return Found(at, reach, above), high

    start = Found(low, size, jnp.zeros_like(size))
    found, _ = lax.while_loop(unsettled, narrow, (start, high))
    return found


def reread(arrays, after: Array):
    """The same tree of arrays, in a form that ties what is computed from it to the scalar `after`.

    Without it XLA moves everything that does not change out of the loop of a search, and writes
    it to memory: slower than to compute it again in registers, and as large as the weights.
    """
    return lax.optimization_barrier((arrays, after))[0]


def _infinity_bits(dtype: np.dtype) -> int:
    return int(np.asarray(np.inf, dtype).view(f"uint{dtype.itemsize * 8}"))
