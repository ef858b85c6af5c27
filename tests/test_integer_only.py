"""Integer-only execution: against Python's integers, hand-written sums and the simulation."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress.formats import integer
from jaxcompress.quantize.integer.integer_program import (
    IntegerProgram,
    assert_integer_only,
    differing_codes,
    float_operations,
    integer_only,
)
from jaxcompress.quantize.integer.requantize import fixed_multiplier, requantize, rounded_product
from tests._models import nnx_cnn

pytestmark = pytest.mark.broad

MOST, LEAST = 2**31 - 1, -(2**31)
int8 = integer(8)


def arrays(seed, *shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in shapes]


# ---------------------------------------------------------------- requantization


def by_definition(acc, m, shift):
    """gemmlowp in Python's integers: truncating division, then ties away from zero."""
    acc = min(max(acc * 2 ** max(shift, 0), LEAST), MOST)
    product = acc * m
    if acc == m == LEAST:
        high = MOST
    else:
        nudged = product + (2**30 if product >= 0 else 1 - 2**30)
        high = abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)
    divisor = 2 ** max(-shift, 0)
    return (2 * abs(high) + divisor) // (2 * divisor) * (1 if high >= 0 else -1)


def cases(count=260_000):
    rng = np.random.default_rng(0)
    wide = rng.integers(LEAST, MOST, count, endpoint=True)
    acc = wide >> rng.integers(0, 31, count)
    m = rng.integers(2**30, 2**31, count) * rng.choice([-1, 1], count)
    shift = rng.integers(-31, 31, count)
    # Ties of both roundings, and the ends.
    tie = rng.integers(0, 31, 2000)
    acc = np.concatenate([acc, (1 << tie) * rng.choice([-3, -1, 1, 3], 2000)])
    m = np.concatenate([m, np.full(2000, 2**30)])
    shift = np.concatenate([shift, -rng.integers(0, 31, 2000)])
    ends = [LEAST, LEAST + 1, -(2**30), -1, 0, 1, 2**30, MOST]
    a, b, c = np.meshgrid(ends, [*ends], [-31, -30, -1, 0, 1, 30], indexing="ij")
    parts = zip((acc, m, shift), (a, b, c), strict=True)
    return [np.clip(np.concatenate([p, q.ravel()]), LEAST, MOST).astype(np.int32) for p, q in parts]


def test_requantize_equals_pythons_integers():
    acc, m, shift = cases()
    assert len(acc) > 256_000
    triples = zip(acc.tolist(), m.tolist(), shift.tolist(), strict=True)
    expected = np.array([by_definition(*triple) for triple in triples])
    np.testing.assert_array_equal(jax.jit(requantize)(acc, m, shift), expected)
    np.testing.assert_array_equal(jax.vmap(requantize)(acc, m, shift), expected)
    np.testing.assert_array_equal(rounded_product(acc.astype(np.float64), m, shift), expected)
    small = (np.abs(acc) < 2**21) & (shift <= 0)  # the short way of the simulation
    quick = rounded_product(acc[small].astype(np.float64), m[small], shift[small])
    np.testing.assert_array_equal(quick, expected[small])


def test_requantize_takes_one_multiplier_per_channel():
    acc = np.random.default_rng(1).integers(-(2**24), 2**24, (3, 5, 4)).astype(np.int32)
    m, shift = fixed_multiplier(np.array([[[0.3, -1e-4, 7.0, 0.0]]]))
    found = np.asarray(requantize(acc, m, shift))
    for channel in range(4):
        one = m[0, 0, channel].item(), shift[0, 0, channel].item()
        expected = [by_definition(a, *one) for a in acc[..., channel].ravel().tolist()]
        np.testing.assert_array_equal(found[..., channel].ravel(), expected)
    assert not found[..., 3].any()
    assert not float_operations(jax.make_jaxpr(requantize)(acc, m, shift))


def test_fixed_multipliers_are_the_nearest_of_31_bits():
    real = np.array([1.0, 0.5, 1 - 2.0**-40, 3e-7, -0.7, 12345.678, 2.0**40, 1e-12, 0.0])
    m, shift = fixed_multiplier(real)
    exact = m * 2.0 ** (shift.astype(float) - 31)
    np.testing.assert_allclose(exact[:6], real[:6], rtol=2.0**-31)
    assert (np.abs(m[:6].astype(np.int64)) >= 2**30).all()
    assert (m[6], shift[6]) == (MOST, 30) and not m[7:].any()
    with pytest.raises(ValueError, match="must be finite"):
        fixed_multiplier([np.nan])
    with pytest.raises(TypeError, match=r"requantize\(acc\): must be int32, got float32"):
        requantize(jnp.ones(2), m[:1], shift[:1])


# ---------------------------------------------------------------- networks


def check(apply_fn, params, x, *, more=(), tolerance=0.05, **settings):
    """Integers equal the simulation everywhere, hold no float, and are near the float network."""
    program = integer_only(apply_fn, params, [x, *more], **settings)
    codes = program.quantize_input(x)
    assert codes.dtype == program.code_dtype
    assert_integer_only(IntegerProgram.run, program, codes)
    assert not differing_codes(program, codes).any()
    rng = np.random.default_rng(0)
    low, high = (-127, 127) if program.code_dtype == jnp.int8 else (0, 255)
    noise = rng.integers(low, high, codes.shape, endpoint=True).astype(codes.dtype)
    assert not differing_codes(program, noise).any()
    found = program.run(codes)
    y = np.asarray(apply_fn(params, x))
    assert found.shape == y.shape
    error = np.asarray(program.dequantize(found)) - y
    assert np.sqrt(np.mean(error**2)) <= tolerance * max(np.ptp(y), 1e-6)
    return program


def conv(x, w, *, strides=1, padding: Any = "SAME", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        w,
        (strides, strides),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def kinds(program):
    return [node.kind for node in program.nodes]


def test_one_convolution_equals_sums_written_by_hand():
    # SAME padding where 0 is not the code 0: the border shows whether it is the zero point.
    (w, b), (x,) = arrays(0, (3, 3, 2, 4), (4,)), arrays(1, (2, 5, 5, 2))
    x = x + 2.0
    fn = lambda p, x: jax.nn.relu(conv(x, p["w"]) + p["b"][None, None, None])
    program = check(fn, {"w": w, "b": b}, x)
    assert kinds(program) == ["conv"]
    c = {key: np.asarray(value, np.int64) for key, value in program.constants[0].items()}
    q = np.asarray(program.quantize_input(x), np.int64)
    (z,) = c["zeros"].tolist()
    assert z != 0 and z == int(program.grids[0].qparams.zero_point)
    padded = np.full((2, 7, 7, 2), z)
    padded[:, 1:-1, 1:-1] = q
    found = np.asarray(program.run(program.quantize_input(x)))
    for n, i, j, o in np.ndindex(2, 5, 5, 4):
        window = padded[n, i : i + 3, j : j + 3]
        acc = int(((window - z) * c["weight"][..., o]).sum() + c["bias"].ravel()[o])
        m, shift = int(c["multiplier"].ravel()[o]), int(c["shift"].ravel()[o])
        code = by_definition(acc, m, shift) + int(c["zero"])
        assert found[n, i, j, o] == min(max(code, c["low"]), c["high"])
    # weights: symmetric, narrow, one scale per output channel
    scale = np.abs(np.asarray(w)).max((0, 1, 2)) / 127
    np.testing.assert_allclose(c["weight"] * scale, w, atol=scale.max() / 2 * 1.001)
    np.testing.assert_allclose(np.ravel(program.weight_scales[0]), scale, rtol=1e-6)
    # M = S_x S_w / S_y
    s_in, s_out = (float(grid.qparams.scale) for grid in program.grids)
    exact = c["multiplier"].ravel() * 2.0 ** (c["shift"].ravel() - 31)
    np.testing.assert_allclose(exact, s_in * scale / s_out, rtol=1e-6)
    assert np.abs(c["weight"]).max() == 127


def test_a_dense_layer_is_as_near_as_its_grids_allow():
    (w, b), (x,) = arrays(2, (16, 8), (8,)), arrays(3, (64, 16))
    program = integer_only(lambda p, x: x @ p[0] + p[1][None], (w, b), [(x,)])
    s_in, s_out = (float(grid.qparams.scale) for grid in program.grids)
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    step = np.abs(np.asarray(w)).max(0) / 127
    # input (its ends may be clipped by half a step), weights, bias, output (twice rounded, clipped)
    bound = s_in * np.abs(w).sum(0) + step / 2 * (
        np.abs(np.asarray(x)).sum(1, keepdims=True) + 16 * s_in
    )
    bound = bound + s_in * step + 1.5 * s_out
    error = np.abs(np.asarray(program.dequantize(program.run(program.quantize_input(x)))) - y)
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("symmetric, offset", [(False, -3.0), (False, 1.5), (True, 0.5)])
def test_residual_network_with_padding_and_pooling(symmetric, offset):
    w1, w2, w3 = arrays(4, (3, 3, 3, 4), (3, 3, 4, 8), (8, 5), scale=0.4)

    def fn(p, x):
        x = jax.nn.relu(conv(x, p[0]))
        y = conv(x, p[1], strides=2)
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
        return jnp.mean(jax.nn.relu(short + y), axis=(1, 2)) @ p[2]

    (x,) = arrays(5, (4, 6, 6, 3))
    activations = integer(8, symmetric=symmetric)
    program = check(fn, (w1, w2, w3), x + offset, activations=activations, tolerance=0.06)
    assert kinds(program) == ["conv", "take", "pad", "conv", "add", "sum", "dot"]
    assert program.batched


LAYERS = {
    "relu": lambda p, x: jax.nn.relu(x),
    "relu6": lambda p, x: jnp.clip(2 * x, 0.0, 6.0),
    "lax clamp": lambda p, x: lax.clamp(-0.5, x, 0.75),
    "shared relu": lambda p, x: jax.nn.relu(x) + x,
    "conv": lambda p, x: conv(x, p["conv"]),
    "strided": lambda p, x: conv(x, p["conv"], strides=2, padding=((1, 0), (0, 2))),
    "negative padding": lambda p, x: conv(x, p["conv"], padding=((-1, 1), (2, -1))),
    "dilated": lambda p, x: conv(x, p["conv"], dilation=2),
    "transposed": lambda p, x: lax.conv_transpose(x, p["conv"], (2, 2), "SAME"),
    "grouped": lambda p, x: conv(x, p["grouped"], groups=2),
    "depthwise": lambda p, x: conv(x, p["depthwise"], groups=4),
    "nchw": lambda p, x: jnp.transpose(
        lax.conv(jnp.transpose(x, (0, 3, 1, 2)), p["oihw"], (1, 1), "SAME"), (0, 2, 3, 1)
    ),
    "dense": lambda p, x: x @ p["dense"] + p["bias"][None, None, None],
    "weight first": lambda p, x: jnp.einsum("oc,bhwc->bhwo", p["dense"], x),
    "affine": lambda p, x: x * p["bias"][None, None, None] - 1.0,
    "batch norm": lambda p, x: (
        (conv(x, p["conv"]) - 0.3) * p["signed"] / 0.8 + p["bias"][None, None, None]
    ),
    "negated": lambda p, x: 1.0 - x,
    "difference": lambda p, x: x - conv(x, p["conv"]),
    "gate": lambda p, x: x * jnp.clip(jnp.mean(x, (1, 2), keepdims=True) / 6 + 0.5, 0.0, 1.0),
    "hard swish": lambda p, x: x * jax.nn.relu6(x + 3) / 6,
    "concat": lambda p, x: jnp.concatenate([x, 3 * conv(x, p["conv"]), x], -1)[..., 1:5],
    "concat zeros": lambda p, x: jnp.concatenate([jnp.zeros_like(x), x], -1)[..., 2:6],
    "pad": lambda p, x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "max pool": lambda p, x: nn.max_pool(x, (2, 2), (2, 2), "SAME"),
    "average pool": lambda p, x: nn.pool(x, 0.0, lax.add, (3, 3), (1, 1), "SAME") / 9.0,
    "mean": lambda p, x: x + jnp.mean(x, axis=-1, keepdims=True),
    "max": lambda p, x: jnp.max(x, axis=1, keepdims=True),
    "min": lambda p, x: jnp.min(x, axis=2, keepdims=True),
    "gathered": lambda p, x: jnp.take(x, jnp.array([1, 3, 5]), axis=1, mode="clip"),
    "rev": lambda p, x: lax.rev(x, (1, 3)),
    "halves": lambda p, x: jnp.concatenate(jnp.split(x, 2, axis=-1)[::-1], -1),
    "reshape": lambda p, x: x.reshape(x.shape[0], -1)[:, ::-1].reshape(x.shape),
    "reused": lambda p, x: conv(conv(x, p["conv"]), p["conv"]),
}


def layer_params(seed=7):
    names = {"conv": (3, 3, 4, 4), "grouped": (3, 3, 2, 4), "depthwise": (3, 3, 1, 4)}
    names |= {"oihw": (4, 4, 3, 3), "dense": (4, 4), "bias": (4,)}
    found = dict(zip(names, arrays(seed, *names.values(), scale=0.4), strict=True))
    return found | {"signed": jnp.array([1.0, -0.5, 2.0, 0.0])[None, None, None]}


def test_every_kind_of_layer_in_one_network():
    (x,) = arrays(8, (2, 6, 6, 4))
    x, params = x + 0.5, layer_params()

    def fn(p, x):
        outputs = []
        for name, layer in LAYERS.items():
            with jax.named_scope(name.replace(" ", "_")):
                outputs.append(layer(p, x).reshape(x.shape[0], -1))
        return jnp.concatenate(outputs, axis=1)

    program = check(fn, params, x)
    y = np.asarray(program.dequantize(program.run(program.quantize_input(x))))
    start, step = 0, float(program.grids[-1].qparams.scale)
    for name, layer in LAYERS.items():  # each on its own, in steps of the common grid
        part = np.asarray(layer(params, x)).reshape(2, -1)
        found = y[:, start : start + part.shape[1]]
        np.testing.assert_allclose(found, part, atol=4 * step, err_msg=name)
        start += part.shape[1]
    assert start == y.shape[1]


def stacked(names, size, batch, offset, weight_bits, symmetric):
    def fn(p, x):
        for name in names:
            x = LAYERS[name](p, x)
        return x.reshape(x.shape[0], -1)

    (x,) = arrays(9, (batch, size, size, 4))
    settings = {"weights": integer(weight_bits), "activations": integer(8, symmetric=symmetric)}
    check(fn, layer_params(), x + jnp.float32(offset), tolerance=np.inf, **settings)


STACKS = {
    "names": st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=4),
    "size": st.integers(5, 7),
    "batch": st.integers(1, 3),
    "offset": st.floats(-2, 2),
    "weight_bits": st.sampled_from([2, 4, 8]),
    "symmetric": st.booleans(),
}


@settings(max_examples=2, deadline=None, derandomize=True)
@given(**STACKS)
def test_stacks_of_layers_equal_their_simulation(**drawn):
    stacked(**drawn)


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(**STACKS)
def test_many_stacks_of_layers_equal_their_simulation(**drawn):
    stacked(**drawn)


class Net(nn.Module):
    """Convolution, BatchNorm, ReLU, depthwise, pooling, dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu6(nn.Conv(8, (3, 3), feature_group_count=8, strides=2)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def linen(seed=0):
    (x,) = arrays(seed, (4, 8, 8, 3))
    shapes = jax.eval_shape(Net().init, jax.random.key(seed), x)
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = arrays(seed, *(leaf.shape for leaf in leaves), scale=0.3)
    variables = jax.tree.unflatten(treedef, drawn)
    stats = jax.tree.map(lambda s: 0.3 + jnp.abs(s), variables["batch_stats"])
    return lambda v, x: Net().apply(v, x), {**variables, "batch_stats": stats}, x


def test_linen_with_batch_norm_fuses_to_one_step_per_layer():
    program = check(*linen())
    assert kinds(program) == ["conv", "conv", "window_max", "regroup", "dot"]
    assert {node.scope.split("/")[-1] for node in program.nodes} >= {"Conv_0", "Conv_1", "Dense_0"}
    # the maximum and the view keep the grid of what they take
    assert program.grids[2] is program.grids[3] is program.grids[4]


def test_packed_parameters_and_other_calibrators():
    (w,), (x,) = arrays(0, (6, 4)), arrays(1, (32, 6))
    comp = jc.quantize.weights(int8, axis=-1)
    packed = comp.pack({"w": w}, comp.init({"w": w}))
    fn = lambda p, x: x @ p["w"]
    from_packed, program = (integer_only(fn, p, [x]) for p in (packed, {"w": w}))
    for a, b in zip(from_packed.constants, program.constants, strict=True):
        np.testing.assert_array_equal(a["weight"], b["weight"])
    span = lambda program: float(program.grids[0].qparams.scale)
    for calibrate in (jc.quantize.percentile(90.0), jc.quantize.moving_average(0.5)):
        found = integer_only(fn, {"w": w}, [x, x / 2], calibrate=calibrate)
        assert span(found) < span(program)
        assert not differing_codes(found, found.quantize_input(x)).any()


def test_ranges_come_from_all_batches():
    (x,) = arrays(1, (3, 4))
    fn = lambda p, x: x * 2.0
    program = integer_only(fn, (), [x, 10 * x])
    for grid, factor in zip(program.grids, (1, 2), strict=True):
        span = 10 * factor * (max(float(x.max()), 0) - min(float(x.min()), 0))
        np.testing.assert_allclose(float(grid.qparams.scale), span / 255, rtol=1e-5)


def test_long_sums_are_exact_where_float32_is_not():
    w = jnp.where(jnp.arange(4096)[:, None] % 2 == 0, 1.0, 0.999) * jnp.ones((1, 2))
    x = jnp.concatenate([jnp.ones((1, 4096)), jnp.linspace(0, 1, 4096)[None]])
    program = check(lambda p, x: x @ p, w, x)
    codes = np.asarray(program.constants[0]["weight"], np.int64)
    steps = np.asarray(program.quantize_input(x), np.int64)
    acc = steps @ codes
    assert acc.max() > 2**24
    c = program.constants[0]
    m, shift = np.ravel(c["multiplier"])[0].item(), np.ravel(c["shift"])[0].item()
    expected = [[min(by_definition(a, m, shift), 255) for a in row] for row in acc.tolist()]
    np.testing.assert_array_equal(program.run(program.quantize_input(x)), expected)
    with pytest.raises(ValueError, match=r"dot at '.*': its accumulator may reach .* int32 holds"):
        integer_only(lambda p, x: x @ p, jnp.ones((70_000, 1)), [jnp.ones((1, 70_000))])


def test_a_dead_channel_keeps_its_bias():
    w = jnp.array([[1.0, 1e-30], [0.5, 0.0]])
    b = jnp.array([[0.25, 0.75]])
    (x,) = arrays(0, (8, 2))
    program = check(lambda p, x: x @ p[0] + p[1], (w, b), x)
    y = program.dequantize(program.run(program.quantize_input(x)))
    step = float(program.grids[-1].qparams.scale)
    np.testing.assert_allclose(y[:, 1], 0.75, atol=step)


# ---------------------------------------------------------------- the program as a value


def test_programs_are_arguments_of_one_compiled_function():
    fn, variables, x = linen()
    traces = []

    def run(program, codes):
        traces.append(1)
        return program.run(codes)

    compiled = jax.jit(run)
    for factor in (1.0, 0.5):
        scaled = jax.tree.map(lambda w, f=factor: w * f, variables)
        program = integer_only(fn, scaled, [x])
        codes = program.quantize_input(x)
        np.testing.assert_array_equal(compiled(program, codes), program.run(codes))
    assert len(traces) == 1
    leaves, treedef = jax.tree.flatten(program)
    again = jax.tree.unflatten(treedef, leaves)
    np.testing.assert_array_equal(again.run(codes), program.run(codes))
    weights = [c["weight"] for c in program.constants if "weight" in c]
    assert {w.dtype for w in weights} == {jnp.dtype(jnp.int8)}
    assert sum(w.size for w in weights) == 3 * 3 * 3 * 8 + 3 * 3 * 8 + 2 * 2 * 8 * 5


def test_other_batch_sizes_run_where_examples_are_independent():
    fn, variables, x = linen()
    program = integer_only(fn, variables, [x])
    codes = program.quantize_input(x)
    whole = np.asarray(program.run(codes))
    for rows in (slice(0, 1), slice(1, 4)):
        np.testing.assert_array_equal(program.run(codes[rows]), whole[rows])
        np.testing.assert_array_equal(program.simulate(codes[rows]), whole[rows])
    fixed = integer_only(lambda p, x: x.reshape(2, 6)[:, :3], (), [jnp.ones((4, 3))])
    assert not fixed.batched
    with pytest.raises(ValueError, match=r"must have the shape \(4, 3\), got \(2, 3\)"):
        fixed.run(jnp.zeros((2, 3), jnp.uint8))


def test_float_operations_are_found_at_any_depth():
    program = integer_only(lambda p, x: x * 2.0, (), [jnp.ones((2, 2))])
    codes = jnp.zeros((2, 2), jnp.uint8)
    assert_integer_only(IntegerProgram.run, program, codes)

    def planted(program, codes):
        half = jax.jit(lambda q: (q.astype(jnp.float32) / 2).astype(jnp.uint8))
        return lax.cond(codes[0, 0] > 0, half, lambda q: q, program.run(codes))

    found = float_operations(jax.make_jaxpr(planted)(program, codes))
    assert [line.split(":")[0] for line in found] == [
        "convert_element_type",
        "div",
        "convert_element_type",
    ]
    with pytest.raises(
        ValueError, match="3 operations are not of integers: convert_element_type: u"
    ):
        assert_integer_only(planted, program, codes)
    with pytest.raises(ValueError, match="operations are not of integers"):
        assert_integer_only(lambda p, q: p.dequantize(p.run(q)), program, codes)


# ---------------------------------------------------------------- errors


def scoped(f):
    def fn(p, x):
        with jax.named_scope("head"):
            return f(x)

    return fn


@pytest.mark.parametrize(
    "fn, message",
    [
        (
            scoped(jnp.tanh),
            r"cannot run tanh at 'head' \(result \(2, 3\)\): it has no integer form",
        ),
        (scoped(lambda x: jax.nn.softmax(x)), "cannot run .* at 'head'"),
        (scoped(lambda x: jax.nn.leaky_relu(x)), "cannot run .* at 'head'"),
        (scoped(lambda x: x @ x.T), "dot_general at 'head'.*both operands are activations"),
        (scoped(lambda x: 1.0 / x), "div at 'head'.*divides by an activation"),
        (scoped(lambda x: x / 0.0), "div at 'head'.*divides by zero"),
        (scoped(lambda x: jnp.maximum(x, x * 2)), "max at 'head'.*both operands are activations"),
        (scoped(lambda x: jnp.maximum(x, jnp.arange(3.0)[None])), "bounds must be single numbers"),
        (scoped(lambda x: x.astype(jnp.int32)), "turns an activation into integers"),
        (scoped(lambda x: x * 0.0), "rescale at 'head'.*multiplied by zero"),
        (
            scoped(lambda x: jnp.concatenate([x, jnp.arange(6.0).reshape(2, 3)])),
            "joins activations",
        ),
        (
            scoped(lambda x: x[jnp.array([1, 0])]),
            "gather at 'head'.*what it takes is not the same of every example",
        ),
        (lambda p, x: (x, x), "must return one array, got 2"),
        (lambda p, x: jnp.ones(3), "does not depend on x"),
    ],
)
def test_what_integers_cannot_do_is_named(fn, message):
    with pytest.raises(ValueError, match=message):
        integer_only(fn, (), [jnp.ones((2, 3))])


def test_gelu_of_an_nnx_network_is_refused():
    model = nnx_cnn()
    with pytest.raises(ValueError, match="integer_only cannot run (erf|erfc|tanh|integer_pow)"):
        integer_only(model.apply, model.params, [model.x])


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "batches is empty"),
        ([jnp.ones((0, 3))], ValueError, r"with elements, got \(0, 3\)"),
        ([jnp.float32(1.0)], ValueError, r"with elements, got \(\)"),
        ([jnp.ones((2, 3), jnp.int32)], TypeError, "floating point inputs, got int32"),
        ([{"x": 1}], TypeError, r"arrays x or tuples \(x,\), got dict"),
        ([jnp.ones((2, 3)), jnp.ones((3, 3))], ValueError, "must have one shape: the first is"),
        ([jnp.array([[1.0, jnp.nan, 0.0]])], ValueError, "'the input' must be finite"),
    ],
)
def test_batches_that_cannot_be(batches, error, message):
    with pytest.raises(error, match=message):
        integer_only(lambda p, x: x + 1.0, (), batches)


def test_formats_and_codes_that_cannot_be():
    fn, x = (lambda p, x: x + 1.0), jnp.ones((2, 3))
    with pytest.raises(TypeError, match=r"weights must be a formats.integer\(bits\), got"):
        integer_only(fn, (), [x], weights=jc.formats.nf4())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be symmetric"):
        integer_only(fn, (), [x], weights=integer(8, symmetric=False))
    program = integer_only(fn, (), [x])
    with pytest.raises(
        TypeError, match=r"run\(codes\): must be uint8, as quantize_input gives, got"
    ):
        program.run(x)
    with pytest.raises(ValueError, match=re.escape("must have the shape (B, 3), got (2, 4)")):
        program.run(jnp.zeros((2, 4), jnp.uint8))
    with pytest.raises(ValueError, match=re.escape("must have the shape (B, 3), got (0, 3)")):
        program.simulate(jnp.zeros((0, 3), jnp.uint8))
    with pytest.raises(TypeError, match=r"quantize_input\(x\): must be floating point, got int32"):
        program.quantize_input(jnp.ones((2, 3), jnp.int32))


def test_accumulators_rounded_once_are_the_nearest_codes():
    rng = np.random.default_rng(5)
    w, x = rng.normal(size=(64, 8)), jnp.asarray(rng.normal(size=(200, 64)), jnp.float32)
    program = jc.quantize.integer_only(lambda p, x: x @ p, jnp.asarray(w, jnp.float32), [x])
    codes = program.quantize_input(x)
    c, (first, last) = program.constants[0], program.grids
    q = np.asarray(codes, np.int64) - int(first.qparams.zero_point)
    scale = np.asarray(program.weight_scales[0], np.float64).reshape(-1)
    real = q @ np.asarray(c["weight"], np.int64) * (float(first.qparams.scale) * scale)
    steps = real / float(last.qparams.scale)
    want = np.clip(np.rint(steps) + int(last.qparams.zero_point), 0, 255)
    once = program.simulate(codes, rounding="once")
    sure = np.abs(steps - np.floor(steps) - 0.5) > 1e-6
    np.testing.assert_array_equal(once[sure], want[sure])
    twice = program.simulate(codes).astype(int)
    assert 0 < (once != twice).sum() and np.abs(once - twice).max() == 1
    with pytest.raises(ValueError, match="'twice' or 'once'"):
        program.simulate(codes, rounding="never")
