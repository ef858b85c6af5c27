"""What one operation computes: a rule for every primitive, or the admission that there is none."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.graph.flat_list import END, LOOP, Op
from jaxcompress.graph.primitives import Pad, Regroup, Spread, Take, moved, row
from jaxcompress.graph.primitives.multiply_accumulates import count
from jaxcompress.graph.sites import size


class Work(NamedTuple):
    """Operations of one or more calls.

    Attributes:
      macs: multiply-accumulates, taps on padding counted.
      valid_macs: those without the taps on padding and on the zeros between dilated inputs.
      elementwise: other operations: additions, comparisons, casts of any kind but to floats.
      transcendentals: exp, log, tanh, sin, erf, square roots and the like.
    """

    macs: int = 0
    valid_macs: int = 0
    elementwise: int = 0
    transcendentals: int = 0

    def __mul__(self, times: Any) -> "Work":  # type: ignore[override]
        return Work(*(n * times for n in self))

    def plus(self, other: "Work") -> "Work":
        """Both together."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def flops(self) -> int:
        """Two for each multiply-accumulate, one for each other operation, transcendentals apart."""
        return 2 * self.macs + self.elementwise

    @property
    def valid_flops(self) -> int:
        """The same without multiply-accumulates on padding: what XLA counts."""
        return 2 * self.valid_macs + self.elementwise


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    result = Work()
    for work in works:
        result = result.plus(work)
    return result


# Integer operations per 32-bit word of a counter-based generator (Threefry: 20 rounds of add,
# rotate, xor, for two words).
_RANDOM_OPS = 50
_SLICES = ("dynamic_slice", "dynamic_update_slice")


def work(op: Op) -> Work | None:
    """Work of one call; None if there is no rule for the primitive.

    Data movement (gather, slice, pad, transpose, collectives) computes nothing; what it moves is
    counted in bytes. Integer powers count their multiplications, reductions one less than they
    take, windows likewise, sorting n log2 n comparisons, FFTs 5 n log2 n, factorizations their
    textbook figures (Cholesky n^3 / 3), random numbers 50 per word. Operations on complex numbers
    count as those on their parts: a product 6, a multiply-accumulate 4, others 2.
    """
    out = max((size(v.aval) for v in op.eqn.outvars), default=0)
    if op.primitive in (LOOP, END):
        return Work()
    rule = _RULES.get(row(op.primitive).work)
    if rule is None:
        return None
    return Work(*rule(op.eqn, out))


def is_view(op: Op) -> bool:
    """Whether the result is the operand under another shape: a slice of all, a pad by nothing."""
    meaning, eqn = row(op.primitive), op.eqn
    if meaning.kind == "identity" or op.primitive == "bitcast_convert_type":
        return op.primitive != "copy"
    if meaning.kind != "move":
        return False
    (first, *_) = moved(eqn) or []
    same = eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape
    return first.axis is None and all(
        isinstance(step, Regroup)
        or (same and isinstance(step, Spread | Pad))
        or (same and isinstance(step, Take) and all(step.whole(eqn.invars[0].aval.shape)))
        for step in first.steps
    )


def moves(op: Op) -> bool:
    """Whether elements move and nothing is computed; numbers that stand still are views."""
    kind, copied = row(op.primitive).kind, op.primitive in ("copy", *_SLICES)
    return copied or kind == "constant" or (kind == "move" and not _regroups(op))


def _regroups(op: Op) -> bool:
    (first, *_) = moved(op.eqn) or []
    return first.axis is None and all(isinstance(step, Regroup) for step in first.steps)


def is_light(op: Op) -> bool:
    """Whether it works element by element, or moves elements whose places are known."""
    return row(op.primitive).elementwise or is_move(op)


def is_move(op: Op) -> bool:
    """Whether it computes nothing but casts."""
    meaning = row(op.primitive)
    cast = meaning.elementwise and meaning.work == ""
    return cast or meaning.kind in ("move", "constant") or op.primitive in _SLICES


def unruled(op: Op) -> Work:
    """What is assumed without a rule: one operation for each element of the result."""
    return Work(elementwise=sum(size(v.aval) for v in op.eqn.outvars))


def _multiplications(power: int) -> int:
    # By repeated squaring.
    n = abs(power)
    return max(n.bit_length() + bin(n).count("1") - 2, 0) + (power < 0)


def _contracted(eqn: Any, out: int) -> tuple[int, int, int]:
    del out
    macs = count(eqn)
    return macs.dense, macs.valid, 0


def _one_each(eqn: Any, out: int) -> tuple[int, int, int]:
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating):
        return 0, 0, out
    return 0, 0, out * (6 if eqn.primitive.name in ("mul", "div") else 2)


def _ins(eqn: Any) -> int:
    return size(eqn.invars[0].aval)


def _reduced(eqn: Any, out: int) -> tuple[int, int, int]:
    return 0, 0, max(_ins(eqn) - out, 0)


def _windowed(eqn: Any, out: int) -> tuple[int, int, int]:
    taps = math.prod(eqn.params.get("window_dimensions", (2,)))
    if eqn.primitive.name.startswith("select_and"):
        out = min(size(v.aval) for v in eqn.invars)
    return 0, 0, out * (taps - 1)


def _sorted(eqn: Any, out: int) -> tuple[int, int, int]:
    length = eqn.invars[0].aval.shape[eqn.params.get("dimension", -1)] if out else 1
    return 0, 0, out * max(math.ceil(math.log2(max(length, 1))), 0)


def _fft(eqn: Any, out: int) -> tuple[int, int, int]:
    points = math.prod(eqn.params["fft_lengths"])
    batches = max(_ins(eqn), out) // max(points, 1)
    return 0, 0, 5 * batches * points * max(math.ceil(math.log2(max(points, 1))), 0)


def _cubed(share: float):
    def rule(eqn: Any, out: int) -> tuple[int, int, int]:
        del out
        *batch, _, n = eqn.invars[0].aval.shape
        return 0, 0, round(2 * share * math.prod(batch) * n**3)

    return rule


def _solved(eqn: Any, out: int) -> tuple[int, int, int]:
    return 0, 0, out * eqn.invars[0].aval.shape[-1]


# Operations of dense factorizations of m x n matrices, m >= n: (values alone, with the factors),
# each a m n^2 + b n^3. Golub and Van Loan, Matrix Computations, 4th ed., 5.2, 7.5, 8.3 and 8.6.
_FACTORS = {
    "geqrf": ((2, -2 / 3), (2, -2 / 3)),
    "householder_product": ((2, -2 / 3), (2, -2 / 3)),
    "qr": ((2, -2 / 3), (4, -4 / 3)),
    "svd": ((4, -4 / 3), (6, 20)),
    "eigh": ((0, 4 / 3), (0, 9)),
    "eig": ((0, 10), (0, 25)),
    "schur": ((0, 10), (0, 25)),
    "hessenberg": ((0, 10 / 3), (0, 10 / 3)),
    "tridiagonal": ((0, 4 / 3), (0, 4 / 3)),
}


def _factored(eqn: Any, out: int) -> tuple[int, int, int]:
    del out
    *batch, rows, columns = eqn.invars[0].aval.shape
    m, n = max(rows, columns), min(rows, columns)
    a, b = _FACTORS[eqn.primitive.name][len(eqn.outvars) > 1]
    return 0, 0, round(math.prod(batch) * (a * m * n**2 + b * n**3))


_RULES: dict[str, Callable[[Any, int], tuple[int, ...]]] = {
    "": lambda eqn, out: (0, 0, 0),
    "one": _one_each,
    "two": lambda eqn, out: (0, 0, 2 * out),
    "transcendental": lambda eqn, out: (0, 0, 0, out),
    "power": lambda eqn, out: (0, 0, out * _multiplications(eqn.params["y"])),
    # x and its coefficients: a multiplication and an addition for each but one
    "polynomial": lambda eqn, out: (0, 0, 2 * out * (len(eqn.invars) - 2)),
    "contract": _contracted,
    "reduce": _reduced,
    "window": _windowed,
    "cumulative": lambda eqn, out: (0, 0, out),
    "scatter": lambda eqn, out: (0, 0, size(eqn.invars[2].aval)),
    "random": lambda eqn, out: (0, 0, _RANDOM_OPS * out),
    "sort": _sorted,
    "top": lambda eqn, out: (0, 0, _ins(eqn) * max(eqn.params["k"].bit_length(), 1)),
    "fft": _fft,
    "cholesky": _cubed(1 / 6),
    "lu": _cubed(1 / 3),
    "solve": _solved,
    "factors": _factored,
}
"""By what the table of primitives calls their work."""


def weight(ops: list[Op]) -> tuple[int, int]:
    """How heavy a list of operations is: FLOPs, then transcendentals."""
    done = total((work(op) or unruled(op)) * op.times for op in ops)
    return done.flops, done.transcendentals
