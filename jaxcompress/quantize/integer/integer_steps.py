"""Steps in integers: int8 products into int32, int32 arithmetic, codes of 8 bits in between."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxcompress.graph.layers.matrices import taps
from jaxcompress.quantize.integer.constants import ADD_HEADROOM, MOVES, Node
from jaxcompress.quantize.integer.requantize import requantize

Numbers = dict[str, Any]


def run_node(node: Node, c: Numbers, *inputs: Array) -> Array:
    """The codes of a step's tensor, in the dtype of its inputs' codes; compiled also by itself."""
    with jax.named_scope(node.scope):
        return _compiled(node.bare, c, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(node: Node, c: Numbers, *inputs: Array) -> Array:
    if node.kind in MOVES:
        return _bounded(node, c, moved(node, inputs, c.get("fill")))
    if node.kind in ("conv", "dot"):
        acc = _CONTRACT[node.kind](node, c, inputs[0]) + c["folded"]
    else:
        acc = _core(node, c, [_steps(q, z) for q, z in zip(inputs, c["zeros"], strict=True)])
        acc = acc + c["bias"]
    steps = requantize(acc, c["multiplier"], c["shift"])
    # Bounds first: the zero point may not fit on top of a saturated number.
    codes = jnp.clip(steps, c["low"] - c["zero"], c["high"] - c["zero"]) + c["zero"]
    return codes.astype(inputs[0].dtype)


def _steps(codes: Array, zero: Array) -> Array:
    return codes.astype(jnp.int32) - zero


def _bounded(node: Node, c: Numbers, codes: Array) -> Array:
    if node.kind not in ("clamp", "window_max"):
        return codes
    return jnp.clip(codes, *(c[key].astype(codes.dtype) for key in ("low", "high")))


def _core(node: Node, c: Numbers, steps: Sequence[Array]) -> Array:
    if node.kind == "add":
        pairs = zip(steps, c["multipliers"], c["shifts"], strict=True)
        left, right = (requantize(q << ADD_HEADROOM, m, shift) for q, m, shift in pairs)
        return left + right
    if node.kind == "mul":
        acc = steps[0] * steps[1]
    elif node.kind == "sum":
        acc = jnp.sum(steps[0], axis=node.get("axes"), dtype=jnp.int32)
    elif node.kind == "window_sum":
        acc = over_windows(node, steps[0], jnp.int32(0), lax.add)
    else:
        acc = steps[0]
    return acc << node.get("headroom")


def over_windows(node: Node, x: Array, start: Any, join: Any) -> Array:
    """`join` over the windows of a step."""
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    size, strides, padding, base, window = (node.get(key) for key in keys)
    return lax.reduce_window(
        x, start, join, size, strides, padding, base_dilation=base, window_dilation=window
    )


def moved(node: Node, inputs: Sequence[Any], fill: Any) -> Array:
    """A step that moves or compares numbers of one grid: the same for codes and for floats.

    An axis of size None has that of the input: steps are not tied to a batch size.
    """
    x, kind = jnp.asarray(inputs[0]), node.kind
    sized = lambda: [x.shape[0] if n is None else n for n in node.get("sizes")]
    if kind == "regroup":
        return x.reshape(sized())
    if kind == "spread":
        return lax.broadcast_in_dim(x, sized(), node.get("axes"))
    if kind == "take":
        return x[tuple(slice(*bound) for bound in node.get("bounds"))]
    if kind == "pick":
        return x.reshape(x.shape[0], -1)[:, np.asarray(node.get("index"))].reshape(sized())
    if kind == "pad":
        return lax.pad(x, jnp.asarray(fill).astype(x.dtype), node.get("config"))
    if kind == "window_max":
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        lowest = -jnp.inf if is_float else jnp.iinfo(x.dtype).min
        return over_windows(node, x, jnp.asarray(lowest, x.dtype), lax.max)
    if kind == "join":
        return jnp.concatenate([jnp.asarray(x) for x in inputs], node.get("axis"))
    if kind == "permute":
        return jnp.transpose(x, node.get("order"))
    if kind in ("reduce_max", "reduce_min"):
        return (jnp.max if kind == "reduce_max" else jnp.min)(x, axis=node.get("axes"))
    assert kind == "clamp", kind
    return x


def convolved(node: Node, x: Any, weight: Any, *, precision: Any = None) -> Array:
    """A step's convolution of floats, weight [*space, in, out]."""
    rank = weight.ndim
    kernel = (rank - 1, rank - 2, *range(rank - 2))  # out, in, *space
    return lax.conv_general_dilated(
        x,
        weight,
        node.get("strides"),
        node.get("padding"),
        lhs_dilation=node.get("lhs_dilation"),
        rhs_dilation=node.get("rhs_dilation"),
        dimension_numbers=lax.ConvDimensionNumbers(
            node.get("lhs_spec"), kernel, node.get("out_spec")
        ),
        feature_group_count=node.get("groups"),
        precision=precision,
    )


def _int8(codes: Array, zero: Array) -> tuple[Array, Array]:
    # Codes and zero point as int8: unsigned ones less 128.
    if codes.dtype == jnp.int8:
        return codes, zero.astype(jnp.int8)
    lowered = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
    return lowered, (zero - 128).astype(jnp.int8)


def _dot(node: Node, c: Numbers, codes: Array) -> Array:
    x, _ = _int8(codes, c["zeros"][0])
    operands = (x, c["weight"]) if node.get("side") == 1 else (c["weight"], x)
    numbers = node.get("dimension_numbers")
    return lax.dot_general(*operands, numbers, preferred_element_type=jnp.int32)


def _conv(node: Node, c: Numbers, codes: Array) -> Array:
    # One product of matrices for each position of the kernel: XLA on CPU has no fast convolution
    # of integers, but has their dot. Padding holds the zero point: the number 0.
    x, zero = _int8(codes, c["zeros"][0])
    batch, channel, *space = node.get("lhs_spec")
    weight, acc = c["weight"], None
    found = taps(
        jnp.transpose(x, (batch, *space, channel)),
        zero,
        kernel=weight.shape[:-2],
        **{k: node.get(k) for k in ("strides", "padding", "lhs_dilation", "rhs_dilation")},
    )
    for tap, window in found:
        product = _product(window, weight[tap], node.get("groups"))
        acc = product if acc is None else acc + product
    assert acc is not None
    out_batch, out_channel, *out_space = node.get("out_spec")
    order = [out_batch, *out_space, out_channel]
    return jnp.transpose(acc, [order.index(axis) for axis in range(acc.ndim)])


def _product(x: Array, w: Array, groups: int) -> Array:
    # x [..., groups * in], w [in, groups * out], int8 -> int32 [..., groups * out]
    last = x.ndim - 1
    if groups == 1:
        numbers = (((last,), (0,)), ((), ()))
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)
    shape = x.shape[:-1]
    x, w = x.reshape(*shape, groups, -1), w.reshape(w.shape[0], groups, -1)
    if w.shape[0] == 1:
        wide = jnp.broadcast_to(w[0].astype(jnp.int32), (*shape, *w.shape[1:]))
        product = x.astype(jnp.int32) * wide
    else:
        numbers = (((last + 1,), (0,)), ((last,), (1,)))
        product = lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)
        product = jnp.moveaxis(product, 0, -2)
    return product.reshape(*shape, -1)


_CONTRACT = {"conv": _conv, "dot": _dot}
