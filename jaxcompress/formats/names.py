"""Formats by name: what checkpoints and command lines speak."""

import re
from collections.abc import Callable

from jaxcompress.formats import block
from jaxcompress.formats.base import Format
from jaxcompress.formats.codebooks.fixed_codebooks import additive_power_of_two, nf4
from jaxcompress.formats.codebooks.learned_codebooks import k_means
from jaxcompress.formats.fixed_point_grids import fixed_point
from jaxcompress.formats.integers import integer
from jaxcompress.formats.ternary_grids import binary, ternary, ternary_absmean, ternary_ttq

_BY_NAME: dict[str, Callable[[], Format]] = {
    "ternary": ternary,
    "ternary_absmean": ternary_absmean,
    "ternary_absmean_refit": lambda: ternary_absmean(refit=True),
    "ternary_ttq": ternary_ttq,
    "binary": binary,
    "nf4": nf4,
    "nf4_float32_scale": lambda: nf4(double_quantization=False),
    "float8_e4m3": block.float8_e4m3,
    "float8_e5m2": block.float8_e5m2,
    "float6_e2m3": block.float6_e2m3,
    "float6_e3m2": block.float6_e3m2,
    "float4_e2m1": block.float4_e2m1,
    "mxfp4": block.mxfp4,
    "mxfp6_e2m3": block.mxfp6_e2m3,
    "mxfp6_e3m2": block.mxfp6_e3m2,
    "mxfp8_e4m3": block.mxfp8_e4m3,
    "mxfp8_e5m2": block.mxfp8_e5m2,
    "mxint8": block.mxint8,
    "nvfp4": block.nvfp4,
}


def parse(name: str) -> Format:
    """The format of a name: `int4`, `int4_full`, `uint8`, `q2.5`, `pot4`, `kmeans4`, `mxfp4`, ...

    Raises:
      ValueError: no such format; the message lists the forms.

    >>> parse("uint4"), parse("q0.7").bits, parse("ternary").bits
    (Integer(bits=4, symmetric=False, narrow=True), 8, 1.6)
    """
    if name in _BY_NAME:
        return _BY_NAME[name]()
    if match := re.fullmatch(r"(u?)int([1-8])(_full)?", name):
        unsigned, bits, full = match.groups()
        if not (unsigned and full):
            return integer(int(bits), symmetric=not unsigned, narrow=not full)
    if match := re.fullmatch(r"q(-?\d+)\.(-?\d+)", name):
        return fixed_point(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"pot([2-8])", name):
        return block.power_of_two(int(match[1]))
    if match := re.fullmatch(r"apot([2-8])(?:_(\d))?", name):
        return additive_power_of_two(int(match[1]), terms=int(match[2] or 2))
    if match := re.fullmatch(r"kmeans([1-8])", name):
        return k_means(int(match[1]))
    raise ValueError(
        f"unknown format {name!r}; known: int1 to int8, int1_full to int8_full (full range), "
        "uint1 to uint8 (asymmetric), qM.N (fixed point), pot2 to pot8 (powers of two), apot3 to "
        f"apot8 (sums of two), kmeans1 to kmeans8, {', '.join(_BY_NAME)}"
    )
