"""What a trace finds: sites (contractions), taps (their activation operands), the graph."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class Site:
    """One contraction equation of the traced function: a product of arrays or a convolution.

    Attributes:
      name: unique; the path of the parameter leaf that feeds it ("Conv_0/kernel"; the largest, if
        there are several), else its name stack, else the primitive; repeats get "#1", "#2", ...
      primitive: "dot_general", "ragged_dot_general" or "conv_general_dilated".
      params: paths of all parameter leaves that the weight operand is made of; () if none.
      weight: index of the operand that is made of parameters; None if there is none.
      calls: how often it runs: product of the trip counts of the enclosing scans. A `while` counts
        as one trip, see `Graph.unknown_trips`.
      operands: shape and dtype of both operands, in one call.
      out: shape and dtype of the result of one call.
      macs: multiply-accumulates of one call, taps that fall on padding counted.
      valid_macs: the same without the taps on padding and on the zeros of a dilated input.
      config: parameters of the equation: dimension_numbers (for ragged products
        ragged_dot_dimension_numbers), precision, ...; for convolutions also
        window_strides, padding, lhs_dilation, rhs_dilation, feature_group_count,
        batch_group_count.
      loops: lengths of the enclosing scans, outermost first.
      branches: (number of the cond, number of the branch) for each enclosing `cond`, outermost
        first: of two sites with one cond and different branches only one runs.
    """

    name: str
    primitive: str
    params: tuple[str, ...]
    weight: int | None
    calls: int
    operands: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    out: jax.ShapeDtypeStruct
    macs: int
    valid_macs: int
    config: Mapping[str, Any] = field(hash=False)
    loops: tuple[int, ...] = ()
    branches: tuple[tuple[int, int], ...] = ()

    @property
    def leaf(self) -> str | None:
        """Path of the parameter leaf it is named after; None if it has another name."""
        base, _, _ = self.name.rpartition("#")
        return next((path for path in (self.name, base) if path in self.params), None)


@dataclass(frozen=True)
class Tap:
    """One activation operand of a site: what the `visit` of `walk` sees.

    Attributes:
      site: where.
      operand: 0 or 1.
      name: the site's name if it has one activation operand, else with "/lhs" or "/rhs".
      sizes: what a visitor of `walk` finds at a ragged product: the group sizes of this call,
        int [g] or [*axes in front, g]; None everywhere else.
    """

    site: Site
    operand: int
    name: str
    sizes: Any = field(default=None, compare=False, repr=False)

    @property
    def is_float(self) -> bool:
        """Whether it holds real floating-point numbers, which can be put on a grid."""
        return jax.numpy.issubdtype(self.aval.dtype, jax.numpy.floating)

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the operand in one call."""
        return self.site.operands[self.operand]


@dataclass(frozen=True)
class Graph:
    """All contractions of a function, and what it takes and gives.

    Attributes:
      sites: in order of execution (branches of a cond one after the other).
      taps: the activation operands of the sites, in the same order.
      folds: contractions that no input reaches (parameters or constants on both sides): the result
        counts as made of parameters, and could be computed once. They have no taps.
      out: pytree of the shapes and dtypes of the results.
      params: shape and dtype of every parameter leaf by path.
      unused: parameter leaves that feed no site as a weight: biases, norms, embeddings.
      unknown_trips: names of the sites inside a `while`, whose `calls` is a lower bound.
      unentered: contractions, or calls that may hold some, which `walk` cannot reach: "primitive
        at 'name stack': leaves". They are not among `sites`, so their MACs are not counted; passes
        that go by sites warn of them (`unentered.report`).
    """

    sites: tuple[Site, ...]
    taps: tuple[Tap, ...]
    folds: tuple[Site, ...]
    out: Any
    params: Mapping[str, jax.ShapeDtypeStruct] = field(hash=False)
    unused: tuple[str, ...]
    unknown_trips: tuple[str, ...]
    unentered: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all sites and calls; all branches of a `cond` are added."""
        return sum(site.macs * site.calls for site in self.sites)


def shape_dtype(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, an abstract value or a Python number."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.eval_shape(lambda: jax.numpy.asarray(x))


def size(x: Any) -> int:
    """Number of elements; 1 for values without a shape (tokens)."""
    return math.prod(getattr(x, "shape", ()))
