"""Multiply-accumulates of one contraction, with and without the taps that fall on padding."""

import math
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.primitives.contractions import multiply_accumulates


class Macs(NamedTuple):
    """Counts of one call."""

    dense: int
    valid: int


def count(eqn: Any) -> Macs:
    """MACs of a contraction's equation.

    dot: |out| * prod(contracted sizes), ragged or not: a row meets one matrix.
    conv: |out| * input channels per group * prod(kernel); `valid` leaves out the products with
    padding or with the zeros between dilated inputs. Complex numbers take four products of their
    parts.
    """
    dense, valid = _count(eqn)
    parts = 4 if np.issubdtype(eqn.outvars[0].aval.dtype, np.complexfloating) else 1
    return Macs(parts * dense, parts * valid)


def _count(eqn: Any) -> tuple[int, int]:
    if eqn.primitive.name != compat.CONV:
        total = multiply_accumulates(eqn)
        return total, total
    lhs, rhs = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    lhs_spec, rhs_spec, out_spec = eqn.params["dimension_numbers"]
    # The kernel's input axis holds the channels of one group already; the output's batch axis is
    # one group's batch already. So neither group count enters.
    taps_apart = math.prod(out[axis] for axis in out_spec[:2]) * rhs[rhs_spec[1]]
    dense = valid = taps_apart
    for i in range(len(eqn.params["window_strides"])):
        n, kernel, outs = lhs[lhs_spec[2 + i]], rhs[rhs_spec[2 + i]], out[out_spec[2 + i]]
        dense *= kernel * outs
        valid *= _valid_pairs(
            n,
            kernel,
            outs,
            stride=eqn.params["window_strides"][i],
            pad_low=eqn.params["padding"][i][0],
            lhs_dilation=eqn.params["lhs_dilation"][i],
            rhs_dilation=eqn.params["rhs_dilation"][i],
        )
    return dense, valid


def _valid_pairs(
    n: int,
    kernel: int,
    outs: int,
    *,
    stride: int,
    pad_low: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    # Pairs (output, kernel tap) along one axis that hit one of the n inputs:
    # pos = o * stride + k * rhs_dilation - pad_low
    # 0 <= pos < (n - 1) * lhs_dilation + 1  and  pos % lhs_dilation == 0
    o, k = np.arange(outs, dtype=np.int64)[:, None], np.arange(kernel, dtype=np.int64)[None, :]
    pos = o * stride + k * rhs_dilation - pad_low
    inside = (pos >= 0) & (pos < (n - 1) * lhs_dilation + 1) & (pos % lhs_dilation == 0)
    return int(inside.sum())
