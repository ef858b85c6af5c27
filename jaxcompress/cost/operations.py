"""What one operation computes: a rule for every primitive, or the admission that there is none."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress.graph import compat
from jaxcompress.graph.inline import END, LOOP, Op
from jaxcompress.graph.macs import count
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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names(
    "reshape squeeze expand_dims bitcast_convert_type copy_p stop_gradient sharding_constraint "
    "optimization_barrier mesh_cast layout_constraint pvary pcast name"
)
"""Nothing moves and nothing is computed."""
MOVES = _names(
    "broadcast_in_dim transpose rev slice pad concatenate split copy dynamic_slice tile iota empty "
    "empty2 dynamic_update_slice"
)
"""Elements move, nothing is computed."""
CASTS = _names("convert_element_type reduce_precision")
_ONE_EACH = _names(
    "add add_any sub mul div rem neg abs sign max min and or xor not eq ne lt le gt ge select_n "
    "clamp round floor ceil is_finite square shift_left shift_right_logical "
    "shift_right_arithmetic nextafter eq_to le_to lt_to population_count clz real imag conj "
    "complex"
)
_TRANSCENDENTAL = _names(
    "exp exp2 expm1 log log1p log_plus_one tanh logistic sin cos tan asin acos atan sinh cosh "
    "asinh acosh atanh atan2 erf erf_inv erfc lgamma digamma bessel_i0e bessel_i1e igamma igammac "
    "sqrt rsqrt cbrt pow polygamma zeta regularized_incomplete_beta"
)
ELEMENTWISE = _ONE_EACH | _TRANSCENDENTAL | CASTS | _names("integer_pow iota")
"""Primitives that work element by element."""
_REDUCE = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"
)
_WINDOW = _names(
    "reduce_window reduce_window_sum reduce_window_max reduce_window_min reduce_window_prod "
    "select_and_scatter_add select_and_gather_add select_and_scatter"
)
_CUMULATIVE = _names("cumsum cumprod cummax cummin cumlogsumexp")
_SCATTER = _names(
    "scatter scatter-add scatter_add scatter-mul scatter_mul scatter-min scatter_min scatter-max "
    "scatter_max scatter-sub scatter_sub"
)
# Integer operations per 32-bit word of a counter-based generator (Threefry: 20 rounds of add,
# rotate, xor, for two words).
_RANDOM_OPS = 50
_RANDOM = _names(
    "random_bits random_seed random_fold_in random_split threefry2x32 rng_bit_generator rng_uniform"
)
_FREE = _names(
    "random_wrap random_unwrap random_clone create_token after_all gather device_put "
    "debug_callback debug_print psum psum_invariant psum_scatter all_gather all_gather_invariant "
    "all_to_all ppermute reduce_scatter pmax pmin axis_index"
)
_RULED = {LOOP, END}


def work(op: Op) -> Work | None:
    """Work of one call; None if there is no rule for the primitive.

    Data movement (gather, slice, pad, transpose, collectives) computes nothing; what it moves is
    counted in bytes. Integer powers count their multiplications, reductions one less than they
    take, windows likewise, sorting n log2 n comparisons, FFTs 5 n log2 n, factorizations their
    textbook figures (Cholesky n^3 / 3), random numbers 50 per word. Operations on complex numbers
    count as those on their parts: a product 6, a multiply-accumulate 4, others 2.
    """
    name = op.primitive
    out = max((size(v.aval) for v in op.eqn.outvars), default=0)
    if name in compat.CONTRACTIONS:
        macs = count(op.eqn)
        return Work(macs.dense, macs.valid)
    if name in VIEWS or name in MOVES or name in _FREE or name in _RULED or name in CASTS:
        return Work()
    if name in _TRANSCENDENTAL:
        return Work(transcendentals=out)
    if name in _ONE_EACH:
        return Work(elementwise=out * _parts(op))
    if name == "integer_pow":
        return Work(elementwise=out * _multiplications(op.eqn.params["y"]))
    ruled = _RULES.get(name)
    return None if ruled is None else Work(*ruled(op.eqn, out))


def _parts(op: Op) -> int:
    if not jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.complexfloating):
        return 1
    return 6 if op.primitive in ("mul", "div") else 2


def is_view(op: Op) -> bool:
    """Whether the result is the operand under another shape: a slice of all, a pad by nothing."""
    if op.primitive in ("slice", "pad", "broadcast_in_dim"):
        return op.eqn.invars[0].aval.shape == op.eqn.outvars[0].aval.shape
    return op.primitive in VIEWS


def unruled(op: Op) -> Work:
    """What is assumed without a rule: one operation for each element of the result."""
    return Work(elementwise=sum(size(v.aval) for v in op.eqn.outvars))


def _multiplications(power: int) -> int:
    # By repeated squaring.
    n = abs(power)
    return max(n.bit_length() + bin(n).count("1") - 2, 0) + (power < 0)


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


_RULES = {
    **dict.fromkeys(_REDUCE, _reduced),
    "reduce": _reduced,
    **dict.fromkeys(_WINDOW, _windowed),
    **dict.fromkeys(_CUMULATIVE, lambda eqn, out: (0, 0, out)),
    **dict.fromkeys(_SCATTER, lambda eqn, out: (0, 0, size(eqn.invars[2].aval))),
    **dict.fromkeys(_RANDOM, lambda eqn, out: (0, 0, _RANDOM_OPS * out)),
    "sort": _sorted,
    **dict.fromkeys(
        ("top_k", "approx_top_k"),
        lambda eqn, out: (0, 0, _ins(eqn) * max(eqn.params["k"].bit_length(), 1)),
    ),
    "fft": _fft,
    "cholesky": _cubed(1 / 6),
    "lu": _cubed(1 / 3),
    "triangular_solve": _solved,
    "lu_pivots_to_permutation": lambda eqn, out: (0, 0, out),
    **dict.fromkeys(_FACTORS, _factored),
}


def weight(ops: list[Op]) -> tuple[int, int]:
    """How heavy a list of operations is: FLOPs, then transcendentals."""
    done = total((work(op) or unruled(op)) * op.times for op in ops)
    return done.flops, done.transcendentals
