"""Convolutions whose gradient by the kernel is cheap on a CPU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.graph import compat
from jaxcompress.graph.evaluate import Evaluator

_CHUNK = 16  # examples at a time: their windows stay in the cache


def fast_kernel_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; its convolutions' gradients by the kernel are matrix products.

    XLA on CPU runs that gradient as a convolution with a window as large as the image, at a tenth
    of the speed of the forward pass where channels are few. Here the inputs shifted along the width
    and the cotangents shifted along the height are laid side by side as channels; one product of
    the two holds the gradients of all taps, without more multiplications and with K + K copies
    rather than the K^2 of im2col, some images at a time so that they stay in the cache. Results
    are those of `fn`, gradients differ by the order of summation.

    Float32 convolutions of two spatial axes, [N, H, W, C] with [H, W, I, O], without groups,
    dilation or cropping, outside loops and custom derivatives, are replaced; all others stay. Meant
    for one device: a batch that is split over several is gathered. Jit the function: it traces `fn`
    at every call. Forward mode (jvp) is not available.

    >>> fn = fast_kernel_gradients(lambda w, x: lax.conv_general_dilated(
    ...     x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    >>> grad = jax.grad(lambda w, x: fn(w, x).sum())(jnp.ones((3, 3, 1, 1)), jnp.ones((1, 4, 4, 1)))
    >>> print(grad[..., 0, 0])
    [[ 9. 12.  9.]
     [12. 16. 12.]
     [ 9. 12.  9.]]
    """

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        results = _Fast().run(compat.body(closed), jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return evaluated


class _Fast(Evaluator):
    def enters(self, eqn: Any, at: Any) -> bool:
        return eqn.primitive.name in compat.JIT

    def equation(self, eqn: Any, values: list[Any], at: Any) -> Sequence[Any]:
        if eqn.primitive.name != compat.CONV or not _fits(eqn):
            return super().equation(eqn, values, at)
        with compat.surroundings(eqn):
            return [_conv(*values, eqn.params["window_strides"], eqn.params["padding"])]


def _fits(eqn: Any) -> bool:
    params, (x, kernel) = eqn.params, (v.aval for v in eqn.invars)
    if x.ndim != 4 or x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        return False
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    return (
        params["dimension_numbers"] == numbers
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and set((*params["lhs_dilation"], *params["rhs_dilation"])) == {1}
        and min(min(pair) for pair in params["padding"]) >= 0
    )


def _plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, strides, padding):
    return _plain(x, kernel, strides, padding)


def _forward(x, kernel, strides, padding):
    return _plain(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, cotangent):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: _plain(x, kernel, strides, padding), x)[1](cotangent)
    n = len(x)
    chunk = next(k for k in range(min(_CHUNK, n), 0, -1) if n % k == 0) if n else 1
    rows = [a.reshape(n // chunk, chunk, *a.shape[1:]) for a in (x, cotangent)]

    def add(total, pair):
        x, dy = pair
        return total + _kernel_gradient(x, dy, kernel.shape, strides, padding), None

    return dx, lax.scan(add, jnp.zeros_like(kernel), rows)[0]


_conv.defvjp(_forward, _backward)


def _kernel_gradient(x, dy, shape, strides, padding):
    # dk[i, j] = sum over n, h, w of x[n, s h + i, s w + j] dy[n, h, w]
    height, width, c_in, c_out = shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    n_cols, used = dy.shape[2], strides[0] * (dy.shape[1] - 1) + 1
    last = strides[1] * (n_cols - 1) + 1
    columns = [x[:, :, j : j + last : strides[1]] for j in range(width)]
    left = lax.optimization_barrier(jnp.concatenate(columns, axis=-1))
    # cotangents at the rows of x they meet under tap i
    rest = x.shape[1] - used
    zero = jnp.zeros((), dy.dtype)
    spread = [
        lax.pad(dy, zero, ((0, 0, 0), (i, rest - i, strides[0] - 1), (0, 0, 0), (0, 0, 0)))
        for i in range(height)
    ]
    right = lax.optimization_barrier(jnp.concatenate(spread, axis=-1))
    both = left.reshape(-1, width * c_in).T @ right.reshape(-1, height * c_out)
    return both.reshape(width, c_in, height, c_out).transpose(2, 0, 1, 3)
