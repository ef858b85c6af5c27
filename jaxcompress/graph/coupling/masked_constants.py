"""What an elementwise operation gives where masks make some of its operands a known number.

A masked parameter is 0 at its masked indices, so functions of it have one value there: exp(0) is
1, log(0) is -inf, 0 / 0 is NaN. The operation itself is evaluated on these numbers. Operands that
masks do not make a number are taken to be finite, and divisors among them not to be 0.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Constant(NamedTuple):
    """The value of all elements that a mask concerns.

    Attributes:
      value: of all of them; NaN also stands for what depends on elements that are not known.
      source: path of the masked parameter that it comes from; "" of a number in the program.
      why: what made it infinite or NaN; "" if it is finite or infinite in the program.
    """

    value: Any
    source: str = ""
    why: str = ""

    @property
    def undefined(self) -> bool:
        """Whether it is NaN."""
        return self.value != self.value

    @property
    def zero(self) -> bool:
        """Whether it is 0."""
        return self.value == 0

    @property
    def infinite(self) -> bool:
        """Whether it is infinite or NaN."""
        return not np.isfinite(self.value)

    def same(self, other: "Constant") -> bool:
        """Whether both are one number, NaN included."""
        return self.value == other.value or (self.undefined and other.undefined)


Known = Constant | None  # None: not known


def joined(constants: Sequence[Known]) -> Known:
    """What is known of a value that is any of these: NaN if one is."""
    for c in constants:
        if c is not None and c.undefined:
            return c
    first = constants[0] if constants else None
    if first is None or any(c is None or not c.same(first) for c in constants):
        return None
    return first


def combined(eqn: Any, constants: Sequence[Known], scope: str) -> Known:
    """The result of an elementwise equation on operands some of which are known."""
    if eqn.primitive.name == "select_n":
        return _selected(constants)
    known = [c for c in constants if c is not None]
    if not known:
        return None
    nan = next((c for c in known if c.undefined), None)
    if nan is not None:
        return nan
    if len(known) == len(constants):
        return _evaluated(eqn, known, scope)
    return _PARTIAL.get(eqn.primitive.name, _unknown)(constants, Place(eqn.primitive.name, scope))


class Place(NamedTuple):
    """An operation, for messages."""

    primitive: str
    scope: str

    def nan(self, of: Constant) -> Constant:
        """NaN that this operation makes of a number and something unknown."""
        return of if of.undefined else Constant(math.nan, of.source, of.why or self.why(of, "nan"))

    def why(self, of: Constant, what: Any) -> str:
        """What this operation makes of a number."""
        source = f" of what is masked in {of.source!r}" if of.source else ""
        at = f" at {self.scope!r}" if self.scope else ""
        return f"{self.primitive}{source}{at} is {what}"


def times(a: Known, b: Known, place: Place) -> Known:
    """The product of two numbers, of which one may be unknown but finite."""
    if a is not None and b is not None:
        value = math.nan if a.undefined or b.undefined else a.value * b.value
        bad = next((c for c in (a, b) if c.infinite), a if a.source else b)
        return Constant(value, a.source or b.source) if value == value else place.nan(bad)
    known = a if a is not None else b
    if known is None or known.zero:
        return known
    return place.nan(known) if known.infinite else None


def _evaluated(eqn: Any, constants: Sequence[Constant], scope: str) -> Known:
    avals = [*(v.aval for v in eqn.invars), *(v.aval for v in eqn.outvars)]
    if not all(isinstance(aval.dtype, np.dtype) for aval in avals):
        return None  # keys
    params = {k: None if k == "sharding" else v for k, v in eqn.params.items()}
    dtypes = tuple(v.aval.dtype for v in eqn.invars)
    values = tuple(c.value for c in constants)
    try:
        value = _bound(eqn.primitive, tuple(params.items()), dtypes, values)
    except TypeError:  # parameters that cannot be hashed
        value = _bound.__wrapped__(eqn.primitive, tuple(params.items()), dtypes, values)
    source = next((c.source for c in constants if c.source), "")
    why = ""
    # What the program makes infinite, as a cast of -inf does, is no work of a mask.
    if value != value or (source and not np.isfinite(value)):
        origin = next((c for c in constants if c.source), constants[0])
        why = next((c.why for c in constants if c.why), "")
        why = why or Place(eqn.primitive.name, scope).why(origin, value)
    return Constant(value, source, why)


@functools.lru_cache(maxsize=4096)
def _bound(primitive: Any, params: tuple[Any, ...], dtypes: tuple[Any, ...], values: Any) -> Any:
    # Concrete also while a function around is traced.
    with jax.ensure_compile_time_eval():
        given = [jnp.asarray(x, dtype) for x, dtype in zip(values, dtypes, strict=True)]
        return np.asarray(primitive.bind(*given, **dict(params))).item()


def _unknown(constants: Sequence[Known], place: Place) -> Known:
    del constants, place
    return None


def _mul(constants: Sequence[Known], place: Place) -> Known:
    return times(constants[0], constants[1], place)


def _sub(constants: Sequence[Known], place: Place) -> Known:
    del place
    first, second = constants
    if first is None and second is not None and second.infinite:
        return second._replace(value=-second.value)
    return first if first is not None and first.infinite else None


def _add(constants: Sequence[Known], place: Place) -> Known:
    del place
    return next((c for c in constants if c is not None and c.infinite), None)


def _div(constants: Sequence[Known], place: Place) -> Known:
    above, below = constants
    if above is not None:
        return above if above.zero else (place.nan(above) if above.infinite else None)
    assert below is not None
    if below.infinite:
        return Constant(0, below.source)
    return place.nan(below) if below.zero else None


def _rem(constants: Sequence[Known], place: Place) -> Known:
    above, below = constants
    if below is not None:
        return place.nan(below) if below.zero else None
    assert above is not None
    return above if above.zero else (place.nan(above) if above.infinite else None)


def _pow(constants: Sequence[Known], place: Place) -> Known:
    base, exponent = constants
    if base is None:
        return Constant(1) if exponent is not None and exponent.zero else None
    # 0^k is 0, 1 or infinite
    return place.nan(base) if base.zero or base.infinite else None


def _max(constants: Sequence[Known], place: Place) -> Known:
    del place
    return next((c for c in constants if c is not None and c.value == math.inf), None)


def _min(constants: Sequence[Known], place: Place) -> Known:
    del place
    return next((c for c in constants if c is not None and c.value == -math.inf), None)


def _and(constants: Sequence[Known], place: Place) -> Known:
    del place
    return next((c for c in constants if c is not None and c.zero), None)


def _or(constants: Sequence[Known], place: Place) -> Known:
    del place
    return next((c for c in constants if c is not None and c.value is True), None)


def _selected(constants: Sequence[Known]) -> Known:
    which, cases = constants[0], constants[1:]
    if which is not None and not which.undefined:
        return cases[int(which.value)]
    made = next((c for c in cases if c is not None and c.why), None)
    same = joined(cases)
    # An infinity of the program may stand for what is masked out, as in attention.
    return same if same is not None or made is None else Constant(math.nan, made.source, made.why)


_PARTIAL = {
    "mul": _mul,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "div": _div,
    "rem": _rem,
    "pow": _pow,
    "max": _max,
    "min": _min,
    "and": _and,
    "or": _or,
}
