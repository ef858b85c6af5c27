"""The table of primitives, and what moves elements: against JAX itself."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxcompress.graph import compat
from jaxcompress.graph.primitives import degree_of, move, moved, row, rows, taken
from jaxcompress.graph.primitives.table import KINDS

WITHOUT = Path(__file__).with_name("primitives_without_row.txt")
KEY = jax.random.key(0)


# In a process of its own: what other tests differentiate or declare leaves primitives behind.
LIST = """
import gc, jax, jax.experimental.pallas, jax.scipy.special
from jax.extend.core import Primitive
print(*{p.name for p in gc.get_objects() if isinstance(p, Primitive)})
"""


def test_every_primitive_of_this_jax_has_a_row_or_is_listed():
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True)
    there, listed = set(done.stdout.split()), set(WITHOUT.read_text().split())
    assert len(there) > 200
    without = {name for name in there if not _has_row(name)}
    assert without <= listed, f"give these a row: {sorted(without - listed)}"
    assert not [name for name in listed if _has_row(name)]


def _has_row(name):
    return any(r.name == name for r in rows())


def test_rows_are_of_known_kinds():
    assert {r.kind for r in rows()} <= set(KINDS)
    assert all(r.neutral is None for r in rows() if r.kind != "reduce")


X = jax.random.normal(KEY, (2, 3, 4))
Y = jax.random.normal(jax.random.key(1), (2, 3, 4))
MOVES = {
    "reshape": (lambda x: x.reshape(6, 4), X),
    "reshape with dimensions": (lambda x: lax.reshape(x, (4, 6), (2, 0, 1)), X),
    "squeeze": (lambda x: lax.squeeze(x, (0,)), X[:1]),
    "expand_dims": (lambda x: lax.expand_dims(x, (1, 3)), X),
    "transpose": (lambda x: x.transpose(2, 0, 1), X),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 5, 3, 4), (0, 2, 3)), X),
    "broadcast of ones": (lambda x: lax.broadcast_in_dim(x, (7, 3, 4), (0, 1, 2)), X[:1]),
    "rev": (lambda x: lax.rev(x, (0, 2)), X),
    "slice": (lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 3)), X),
    "pad": (lambda x, f: lax.pad(x, f, ((1, 2, 0), (0, -1, 2), (-1, 0, 1))), X, jnp.float32(7)),
    "pad of none": (
        lambda x, f: lax.pad(x, f, ((1, 2, 3), (0, 0, 0), (0, 0, 0))),
        X[:0],
        Y[0, 0, 0],
    ),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), X, Y),
    "split": (lambda x: lax.split(x, (1, 2), axis=1), X),
    "stack": (lambda x, y: jnp.stack([x, y], 1), X, Y),
    "unstack": (lambda x: jnp.unstack(x, axis=1), X),
    "tile": (lambda x: jnp.tile(x, (2, 1, 3)), X),
    "copy": (lambda x: lax.copy_p.bind(x), X),
    "stop_gradient": (lambda x: lax.stop_gradient(x), X),
    "barrier": (lambda x, y: lax.optimization_barrier((x, y)), X, Y),
    "name": (lambda x: checkpoint_name(x, "n"), X),
}


@pytest.mark.parametrize("name", MOVES)
def test_elements_move_as_jax_moves_them(name):
    fn, *args = MOVES[name]
    closed = jax.make_jaxpr(fn)(*args)
    values = dict(zip(closed.jaxpr.invars, map(np.asarray, args), strict=True))
    read = lambda v: np.asarray(v.val) if compat.is_literal(v) else values[v]
    for eqn in closed.jaxpr.eqns:  # JAX 0.8 stacks and tiles by several
        results = move(eqn, [read(v) for v in eqn.invars])
        assert results is not None, eqn.primitive.name
        values.update(zip(eqn.outvars, results, strict=True))
        for shape, found in zip(_shapes(eqn), results, strict=True):
            assert found.shape == shape == tuple(shape)
    want = jax.tree.leaves(fn(*args))
    for found, right in zip(map(read, closed.jaxpr.outvars), want, strict=True):
        np.testing.assert_array_equal(found, right)


def _shapes(eqn):
    """The shapes of the results, by the steps alone."""
    found = []
    for result in moved(eqn) or []:
        parts = []
        for k in result.operands:
            shape = tuple(eqn.invars[k].aval.shape)
            for step in result.steps:
                shape = step.shape(shape)
            parts.append(shape)
        if result.axis is not None:
            joined = list(parts[0])
            joined[result.axis] = sum(p[result.axis] for p in parts)
            parts = [tuple(joined)]
        found.append(parts[0])
    return found


@pytest.mark.parametrize("name", [n for n in MOVES if n not in ("stack", "tile", "unstack")])
def test_axes_in_front_stay(name):
    fn, *args = MOVES[name]
    closed = jax.make_jaxpr(fn)(*args)
    if not closed.jaxpr.eqns:
        return
    (eqn,) = closed.jaxpr.eqns
    if any(map(compat.is_literal, eqn.invars)):
        return
    three = [np.stack([np.asarray(a) + k for k in range(3)]) if a.ndim else a for a in args]
    results = move(eqn, three, lead=1)
    for k in range(3):
        each = [a[k] if np.ndim(a) else a for a in three]
        want = move(eqn, each)
        assert results is not None
        assert want is not None
        for found, right in zip(results, want, strict=True):
            np.testing.assert_array_equal(found[k], right)


def test_sizes_may_be_symbols():
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 4, 6), jnp.float32)
    fn = lambda x: jnp.split(x.reshape(batch, 24)[:, ::-1], 3, axis=1)
    shapes = {}
    closed = jax.make_jaxpr(fn)(x)
    for eqn in closed.jaxpr.eqns:
        if row(eqn.primitive.name).kind == "move":
            shapes[eqn.primitive.name] = _shapes(eqn)
    assert shapes["reshape"] == [(batch, 24)]
    assert shapes["split"] == [(batch, 8)] * 3


def test_positions_that_are_known():
    table = jnp.arange(12.0).reshape(4, 3)
    for fn in (lambda t: t[jnp.array([2, 0])], lambda t: lax.dynamic_slice(t, (1, 1), (2, 2))):
        closed = jax.make_jaxpr(fn)(table)
        values = {closed.jaxpr.invars[0]: table}
        values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        for eqn in closed.jaxpr.eqns:
            operands = [v.val if compat.is_literal(v) else values[v] for v in eqn.invars]
            if row(eqn.primitive.name).kind == "index":
                which = taken(eqn, table.shape, operands[1:])
                np.testing.assert_array_equal(np.asarray(table).reshape(-1)[which], fn(table))
            values.update(zip(eqn.outvars, compat.evaluate(eqn, operands), strict=True))
    outside = jax.make_jaxpr(lambda t: t.at[jnp.array([9])].get(mode="fill"))(table)
    assert row(outside.eqns[-1].primitive.name).kind in ("index", "call")


FLOATS = {
    "one": lambda fn: (fn, jnp.abs(X) + 0.5),
    "two": lambda fn: (fn, jnp.abs(X) + 0.5, jnp.abs(Y) + 0.5),
}
DEGREES = {
    name: FLOATS["one"](fn)
    for name, fn in {
        "neg": lambda x: -x, "abs": jnp.abs, "sign": jnp.sign, "square": lax.square,
        "sqrt": lax.sqrt, "rsqrt": lax.rsqrt, "cbrt": lax.cbrt,
        "integer_pow": lambda x: lax.integer_pow(x, 3),
        "reduce_sum": lambda x: x.sum(1),
        "cumsum": lambda x: lax.cumsum(x, 1), "cummax": lambda x: lax.cummax(x, 1),
        "sort": lax.sort, "transpose": jnp.transpose,
    }.items()
} | {
    name: FLOATS["two"](fn)
    for name, fn in {
        "add": lax.add, "sub": lax.sub, "mul": lax.mul, "div": lax.div, "max": lax.max,
        "min": lax.min, "rem": lax.rem, "atan2": lax.atan2, "lt": lax.lt,
        "dot_general": lambda x, y: lax.dot_general(x, y, (((2,), (2,)), ((0,), (0,)))),
        "concatenate": lambda x, y: lax.concatenate([x, y], 0),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", DEGREES)
def test_degrees_are_those_of_the_functions(name):
    # f(c x, c y) = c^d f(x, y), in powers of two: without rounding
    fn, *args = DEGREES[name]
    eqn = [e for e in jax.make_jaxpr(fn)(*args).eqns if e.primitive.name == name][0]
    degree, c = degree_of(eqn), 64.0
    assert degree is not None
    scaled, plain = fn(*(c * a for a in args)), fn(*args)
    np.testing.assert_allclose(scaled, np.asarray(plain) * c**degree, rtol=1e-6)
    for k, power in enumerate(row(name).factors):
        one = [c * a if i == k else a for i, a in enumerate(args)]
        np.testing.assert_allclose(fn(*one), np.asarray(plain) * c**power, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in DEGREES if row(n).linear and not row(n).factors])
def test_linear_ones_are_linear(name):
    fn, *args = DEGREES[name]
    others = [jnp.cos(a) for a in args]
    both = fn(*(a + b for a, b in zip(args, others, strict=True)))
    np.testing.assert_allclose(both, fn(*args) + fn(*others), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in DEGREES if row(n).order])
def test_those_that_keep_order_commute_with_rounding(name):
    fn, *args = DEGREES[name]
    coarse = lambda x: jnp.round(x * 4) / 4
    np.testing.assert_array_equal(fn(*map(coarse, args)), coarse(fn(*args)))


@pytest.mark.parametrize("name", [n for n in DEGREES if row(n).exact])
def test_exact_ones_round_nothing(name):
    fn, *args = DEGREES[name]
    with jax.enable_x64(True):
        wide = fn(*(jnp.asarray(np.asarray(a, np.float64)) for a in args))
    np.testing.assert_array_equal(np.asarray(fn(*args), np.float64), np.asarray(wide, np.float64))
