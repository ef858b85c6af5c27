"""Number formats: grids, codes, packing."""

from jaxcompress.formats.base import Format, check_format, parse, predicted_bytes
from jaxcompress.formats.bits import pack_bits, row_bytes, unpack_bits
from jaxcompress.formats.fixed_point import FixedPoint, fixed_point
from jaxcompress.formats.granularity import Granularity, granularity
from jaxcompress.formats.integer import Integer, QParams, integer
from jaxcompress.formats.rounding import clip_ste, round_ste, uniform_codes, uniform_ste

__all__ = [
    "FixedPoint",
    "Format",
    "Granularity",
    "Integer",
    "QParams",
    "check_format",
    "clip_ste",
    "fixed_point",
    "granularity",
    "integer",
    "pack_bits",
    "parse",
    "predicted_bytes",
    "round_ste",
    "row_bytes",
    "uniform_codes",
    "uniform_ste",
    "unpack_bits",
]
