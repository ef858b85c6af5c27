"""Number types by name, and which of them holds which: int4 fits into int8, both into bfloat16."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_FLOATS = {
    "float64": (53, 11),
    "float32": (24, 8),
    "tfloat32": (11, 8),
    "float16": (11, 5),
    "bfloat16": (8, 8),
}


class Kind(NamedTuple):
    """What a number type can represent.

    A "table" has arbitrary values (codebooks, powers of two, block formats): its codes are looked
    up and computed with as floats.
    """

    family: str  # "int" | "float" | "table"
    digits: int  # int: bits; float: bits of the significand, the hidden one included; table: bits
    exponent: int = 0  # bits of the exponent


def kind(name: str) -> Kind:
    """The kind of a type: `int4`, `float32`, `bfloat16`, `float8_e4m3`, `table4`.

    Raises:
      ValueError: no such type.

    >>> kind("float8_e4m3")
    Kind(family='float', digits=4, exponent=4)
    """
    if name in _FLOATS:
        return Kind("float", *_FLOATS[name])
    if match := re.fullmatch(r"float\d+_e(\d+)m(\d+)", name):
        return Kind("float", int(match[2]) + 1, int(match[1]))
    if match := re.fullmatch(r"(int|table)([1-9]\d*)", name):
        return Kind(match[1], int(match[2]))
    raise ValueError(
        f"unknown number type {name!r}; known: intB and tableB of B bits, float<B>_e<E>m<M>, "
        + ", ".join(_FLOATS)
    )


def holds(wide: str, narrow: str) -> bool:
    """Whether every number of type `narrow` is a number of type `wide` (up to a scale).

    Integers of b bits are taken to +-(2**b - 1) in a float, as a zero point makes them. A table
    is held by floats of 8 significand bits and more, as decoded values are.

    >>> holds("int8", "int4"), holds("bfloat16", "int8"), holds("int8", "float32")
    (True, True, False)
    """
    w, n = kind(wide), kind(narrow)
    if wide == narrow:
        return True
    if n.family == "table":
        return w.family == "float" and w.digits >= 8
    if n.family == "int":
        return w.family in ("int", "float") and w.digits >= n.digits
    return w.family == "float" and w.digits >= n.digits and w.exponent >= n.exponent


def of_array(dtype: Any) -> tuple[str, int]:
    """Name and stored bits of an array's dtype.

    Unsigned integers count as integers; complex numbers are two of their floats, random keys are
    the words that they hold.

    >>> of_array("uint8"), of_array("bfloat16"), of_array("complex64")
    (('int8', 8), ('bfloat16', 16), ('float32', 64))
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return "int32", 32 * words.size
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return "int1", 8
    if jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
        return f"int{bits}", bits
    if jnp.issubdtype(dtype, jnp.complexfloating):
        bits = jnp.finfo(dtype).bits  # of one of the two parts
        return f"float{bits}", 2 * bits
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"arrays of {dtype.name} have no cost: numbers and keys do")
    bits = jnp.finfo(dtype).bits
    match = re.match(r"float\d+_e\d+m\d+", dtype.name)
    return match[0] if match else dtype.name, bits


def of_format(format: Any) -> tuple[str, int]:
    """Name and bits of a number format (anything with `bits`, and `name` where it has one).

    A block format has the type of its elements; binary and ternary codes are integers of 1 and 2
    bits.

    >>> from jaxcompress.formats import parse
    >>> of_format(parse("uint4")), of_format(parse("q2.5")), of_format(parse("mxfp4"))
    (('int4', 4), ('int8', 8), ('float4_e2m1', 4))
    """
    bits = math.ceil(format.bits)
    name = str(getattr(getattr(format, "element", format), "name", f"int{bits}"))
    if re.fullmatch(r"ternary\w*|binary|int\d+_\d+", name):
        return f"int{bits}", bits
    if re.fullmatch(r"u?int\d+(_full)?|q-?\d+\.-?\d+", name):
        return f"int{bits}", bits
    if match := re.fullmatch(r"(?:float\d+_|fp\d+_)?e(\d+)m(\d+)(?:fn)?", name):
        return f"float{bits}_e{match[1]}m{match[2]}", bits
    if name in _FLOATS:
        return name, bits
    return f"table{bits}", bits
