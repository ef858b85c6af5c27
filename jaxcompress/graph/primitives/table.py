"""What every JAX primitive means: one row each, and all that asks for a meaning asks the row.

A row says of which kind a primitive is and what follows from its mathematics alone: how it scales,
whether it is linear, keeps the order of numbers, rounds, what masks leave known behind it, what it
costs. How equations that move elements move them is in `movement`. `declare` adds rows for
primitives of others.

A new primitive of JAX gets its row here. If it moves elements it also gets a line in `movement`;
nothing else needs to know its name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal[
    "identity",  # results are the operands
    "move",  # elements take other places, which shapes and parameters alone decide
    "index",  # elements take other places, which operands decide
    "constant",  # no operand, the same result at every call
    "elementwise",  # operands of one shape, or scalars; the result at each index from those there
    "compare",  # elementwise, and a truth value
    "reduce",  # along axes that are gone then
    "cumulative",  # along an axis, which stays
    "window",  # over windows
    "contract",  # sums of products: sites
    "sort",  # along an axis
    "call",  # of one jaxpr
    "loop",  # of jaxprs: scan, while, cond
    "random",
    "collective",  # between devices
    "opaque",  # none of these, or nothing to look at inside
]
KINDS = get_args(Kind)
Stays = Literal["any", "zero", "unit", "covered", "undefined"]


@dataclass(frozen=True)
class Row:
    """What a primitive means.

    Attributes:
      name: of the primitive.
      kind: one of `KINDS`.
      degree: d where f(c x, c y, ...) = c^d f(x, y, ...) for c > 0; None if there is none. Of
        `integer_pow` it is NaN: its exponent is a parameter, see `degree_of`.
      factors: exponents with which the scale of each operand alone comes out: (1, -1) of a
        quotient; () if operands cannot be scaled one by one.
      linear: in all operands together, or in each factor while the others stay.
      order: x <= y elementwise gives f(x) <= f(y), and every result is one of the operands'
        numbers: rounding before is rounding after.
      exact: it rounds nothing.
      neutral: what a reduction does not see; None of other kinds.
      stays: which numbers that masks make known are still there behind it ("any"; "zero" alone;
        "unit", 0 and 1; "covered", any where no window lies in the padding alone; "undefined", NaN
        and infinities alone). Elementwise primitives are evaluated instead.
      update: of an indexing primitive that writes, the number of the operand that it writes.
      work: how `cost.operations` counts it: "" for nothing, "one" operation per element of the
        result, "transcendental", or the name of a rule there; "?" if it has none.
    """

    name: str
    kind: Kind
    degree: float | None = None
    factors: tuple[float, ...] = ()
    linear: bool = False
    order: bool = False
    exact: bool = False
    neutral: float | bool | None = None
    stays: Stays = "undefined"
    update: int = 0
    work: str = "?"

    @property
    def elementwise(self) -> bool:
        """Whether the result at each index comes from the operands there."""
        return self.kind in ("identity", "elementwise", "compare")

    @property
    def moves(self) -> bool:
        """Whether results hold the elements of the operands and no others, but for padding."""
        return self.kind in ("identity", "move", "index")


_NAN = float("nan")
_TABLE: dict[str, Row] = {}


def _rows(kind: Kind, text: str, **settings: Any) -> None:
    for name in text.split():
        assert name not in _TABLE, name
        _TABLE[name] = Row(name, kind, **settings)


_same = {"degree": 1, "linear": True, "order": True, "exact": True, "stays": "any"}
_rows(
    "identity",
    """copy copy_p name stop_gradient device_put sharding_constraint reshard mesh_cast
    layout_constraint with_memory_space_constraint optimization_barrier pvary pcast pin unpin
    preduced reduced_vary_cast reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p
    xla_metadata_value""",
    **_same,
    work="",
)
_rows(
    "move",
    """reshape squeeze expand_dims transpose broadcast_in_dim broadcast_to rev slice pad
    concatenate split stack unstack tile""",
    **_same,
    work="",
)
_rows("index", "gather dynamic_slice", **_same, work="")
_rows("index", "dynamic_update_slice", **_same, update=1, work="")
_rows("index", "scatter", **_same, update=2, work="scatter")
_rows("index", "scatter-add scatter_add scatter-sub scatter_sub", degree=1, linear=True,
      update=2, work="scatter")  # fmt: skip
_rows("index", "scatter-min scatter_min scatter-max scatter_max", degree=1, exact=True,
      update=2, work="scatter")  # fmt: skip
_rows("index", "scatter-mul scatter_mul", update=2, work="scatter")
_rows("constant", "iota empty empty2 create_token after_all axis_index platform_index program_id "
      "num_programs dim_as_value dimension_size", exact=True, work="")  # fmt: skip

# Elementwise.
_rows("elementwise", "convert_element_type reduce_precision", **{**_same, "exact": False}, work="")
_rows("elementwise", "bitcast_convert_type", exact=True, work="")
_rows("elementwise", "add add_any sub", degree=1, linear=True, work="one")
_rows("elementwise", "neg real imag conj", degree=1, linear=True, exact=True, work="one")
_rows("elementwise", "complex", degree=1, linear=True, exact=True, work="one")
_rows("elementwise", "max min clamp", degree=1, order=True, exact=True, work="one")
_rows("elementwise", "abs", degree=1, exact=True, work="one")
_rows("elementwise", "select_n", degree=1, exact=True, work="one")
_rows("elementwise", "sign is_finite", degree=0, exact=True, work="one")
_rows("elementwise", "mul", degree=2, factors=(1, 1), linear=True, work="one")
_rows("elementwise", "div", degree=0, factors=(1, -1), linear=True, work="one")
_rows("elementwise", "rem", degree=1, exact=True, work="one")
_rows("elementwise", "reciprocal", degree=-1, factors=(-1,), work="one")
_rows("elementwise", "square", degree=2, factors=(2,), work="one")
_rows("elementwise", "sqrt", degree=0.5, factors=(0.5,), work="transcendental")
_rows("elementwise", "rsqrt", degree=-0.5, factors=(-0.5,), work="transcendental")
_rows("elementwise", "cbrt", degree=1 / 3, factors=(1 / 3,), work="transcendental")
_rows("elementwise", "integer_pow", degree=_NAN, work="power")
_rows("elementwise", "polynomial", work="polynomial")
_rows("elementwise", "one_minus_square", work="two")
_rows("elementwise", "round floor ceil", exact=True, work="one")
_rows("elementwise", "and or xor not shift_left shift_right_logical shift_right_arithmetic "
      "population_count clz mulhi", exact=True, work="one")  # fmt: skip
_rows("elementwise", "nextafter", work="one")
_rows("elementwise", """exp exp2 expm1 log log1p log2 log_plus_one tanh logistic sin cos tan asin
      acos atan sinh cosh asinh acosh atanh erf erf_inv erfc lgamma digamma bessel_i0e
      bessel_i1e igamma igammac igamma_grad_a random_gamma_grad pow polygamma zeta
      regularized_incomplete_beta""", work="transcendental")  # fmt: skip
_rows("elementwise", "atan2", degree=0, work="transcendental")
_rows("compare", "eq ne lt le gt ge eq_to le_to lt_to", degree=0, exact=True, work="one")

# Along axes.
_rows("reduce", "reduce_sum", degree=1, linear=True, neutral=0, work="reduce")
_rows("reduce", "reduce_prod", neutral=1, work="reduce")
_rows("reduce", "reduce_max", degree=1, order=True, exact=True, neutral=-float("inf"),
      work="reduce")  # fmt: skip
_rows("reduce", "reduce_min", degree=1, order=True, exact=True, neutral=float("inf"),
      work="reduce")  # fmt: skip
_rows("reduce", "reduce_and", exact=True, neutral=True, work="reduce")
_rows("reduce", "reduce_or", exact=True, neutral=False, work="reduce")
_rows("reduce", "reduce_xor", exact=True, neutral=0, work="reduce")
_rows("reduce", "argmax argmin", degree=0, exact=True, work="reduce")
_rows("opaque", "reduce", work="reduce")
_rows("cumulative", "cumsum", degree=1, linear=True, stays="zero", work="cumulative")
_rows("cumulative", "cumprod", stays="unit", work="cumulative")
_rows("cumulative", "cummax cummin", degree=1, order=True, exact=True, stays="any",
      work="cumulative")  # fmt: skip
_rows("cumulative", "cumlogsumexp", work="cumulative")
_rows("window", "reduce_window_sum", degree=1, linear=True, stays="zero", work="window")
_rows("window", "reduce_window_max reduce_window_min", degree=1, order=True, exact=True,
      stays="covered", work="window")  # fmt: skip
_rows("opaque", "reduce_window reduce_window_prod", work="window")
_rows("window", "select_and_scatter_add select_and_gather_add", degree=1, work="window")
_rows("opaque", "select_and_scatter", work="window")
_rows("sort", "sort", degree=1, exact=True, stays="any", work="sort")
_rows("sort", "top_k approx_top_k", degree=1, exact=True, work="top")
_rows("contract", "dot_general conv_general_dilated ragged_dot_general", degree=2, factors=(1, 1),
      linear=True, work="contract")  # fmt: skip

# What holds jaxprs.
_rows("call", """jit pjit closed_call core_call core_closed_call remat2 checkpoint remat
      custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr""")  # fmt: skip
_rows("loop", "scan while cond")

# Numbers per 32-bit word; collectives move bytes and compute next to nothing.
_rows("random", "random_bits random_seed random_fold_in random_split threefry2x32 threefry4x32 "
      "philox2x32 philox4x32 rng_bit_generator rng_uniform", work="random")  # fmt: skip
_rows("random", "random_wrap random_unwrap random_clone", work="")
_rows("random", "random_gamma")
_rows("collective", """psum psum_invariant psum_scatter all_gather all_gather_invariant
      all_gather_reduced all_to_all ppermute reduce_scatter pmax pmin pbroadcast
      ragged_all_to_all unreduced_psum unreduced_pmax unreduced_pmin
      unreduced_reduce_scatter""", work="")  # fmt: skip

# Whole algorithms, and code of others.
_rows("opaque", "fft", degree=1, linear=True, work="fft")
_rows("opaque", "cholesky", work="cholesky")
_rows("opaque", "lu", work="lu")
_rows("opaque", "triangular_solve tridiagonal_solve", work="solve")
_rows("opaque", "lu_pivots_to_permutation", work="one")
_rows("opaque", "geqrf householder_product qr svd eigh eig schur hessenberg tridiagonal",
      work="factors")  # fmt: skip
_rows("opaque", """geqp3 ormqr cholesky_update symmetric_product custom_linear_solve linear_call
      custom_vmap_call custom_partitioning pallas_call shard_map composite call_exported
      call_hi_primitive ffi_call tpu_custom_call ragged_dot scaled_dot scaled_matmul
      scaled_matmul_wrapper dot_product_attention_fwd dot_product_attention_fwd_wrapper
      dot_product_attention_bwd dot_product_attention_bwd_wrapper
      dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
      dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper pure_callback
      io_callback""")  # fmt: skip
_rows("opaque", "debug_callback debug_print", work="")

FOREIGN = frozenset(
    """ragged_dot scaled_dot scaled_matmul scaled_matmul_wrapper dot_product_attention_fwd
    dot_product_attention_fwd_wrapper dot_product_attention_bwd dot_product_attention_bwd_wrapper
    dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd_wrapper ffi_call
    call_exported call_hi_primitive tpu_custom_call pure_callback io_callback""".split()
)
"""Primitives that multiply matrices, or may, with nothing inside to look at."""

TABLE: Mapping[str, Row] = _TABLE
"""The rows by name; read it, and add to it with `declare`."""


def row(name: str) -> Row:
    """The row of a primitive; of one without a row it is opaque, with the work "?".

    >>> row("tanh").kind, row("add").degree, row("of_somebody").kind
    ('elementwise', 1, 'opaque')
    """
    return _TABLE.get(name) or Row(name, "opaque")


def degree_of(eqn: Any) -> float | None:
    """d where the equation gives c^d times its results if all operands are multiplied by c > 0."""
    degree = row(eqn.primitive.name).degree
    return float(eqn.params["y"]) if degree is not None and degree != degree else degree


def names(*kinds: Kind) -> frozenset[str]:
    """The primitives of some kinds.

    >>> sorted(names("loop"))
    ['cond', 'scan', 'while']
    """
    return frozenset(r.name for r in _TABLE.values() if r.kind in kinds)


def rows() -> Iterator[Row]:
    """All rows."""
    return iter(tuple(_TABLE.values()))


def add(name: str, new: Row) -> None:
    """Enters a row; see `declare`, which checks it."""
    _TABLE[name] = replace(new, name=name)
