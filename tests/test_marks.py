"""Marks change no number, and a marked integer program is the same network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.packed import Grid
from jaxcompress.export.litert_format.marked_program import marked_program
from jaxcompress.export.marks import FAKE_QUANT, mark, mark_activations, mark_grid, mark_weights
from jaxcompress.formats.scales import QParams
from jaxcompress.graph import compat


def marks_of(fn, *args):
    """The attributes of all marks in a traced function."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    found = [compat.composite(e) for e in jaxpr.eqns if e.primitive.name == "composite"]
    assert all(name == FAKE_QUANT for name, _ in found)
    return [attributes for _, attributes in found]


def test_a_mark_rounds_to_its_grid():
    x = jnp.array([-9.0, -0.26, -0.25, 0.24, 0.3, 80.0], jnp.float32)
    y = mark(x, scale=0.5, zero_point=-120, bits=8, narrow=False)
    q = np.clip(np.rint(np.asarray(x, np.float64) / 0.5) - 120, -128, 127)
    np.testing.assert_array_equal(y, (q + 120) * 0.5)


@pytest.mark.parametrize("bits, narrow, lowest", [(4, True, -7), (4, False, -8), (8, True, -127)])
def test_channels_and_bounds(bits, narrow, lowest):
    x = -1000.0 * jnp.ones((3, 2), jnp.float32)
    y = mark(x, scale=[1.0, 2.0], zero_point=0, bits=bits, narrow=narrow, axis=-1)
    np.testing.assert_array_equal(y, np.tile([lowest, 2.0 * lowest], (3, 1)))
    (seen,) = marks_of(
        lambda x: mark(x, scale=[1.0, 2.0], zero_point=0, bits=bits, narrow=narrow, axis=-1), x
    )
    assert seen["dtype"] == f"i{bits}" and seen["quantization_dimension"] == 1
    assert seen["narrow_range"] is narrow
    np.testing.assert_array_equal(seen["scale"], np.array([1.0, 2.0], np.float32))
    np.testing.assert_array_equal(seen["zero_point"], [0, 0])


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_marked_grid_is_the_grid(bits, symmetric):
    form = jc.formats.integer(bits, symmetric=symmetric)
    x = jnp.asarray(np.random.default_rng(0).normal(0.5, 2, (64,)), jnp.float32)
    grid = Grid(form.qparams(jnp.float32(-1.5), jnp.float32(2.0)), form)
    np.testing.assert_allclose(mark_grid(x, grid, where="here"), grid.snap(x), rtol=1e-6)


def test_marked_weights_are_what_is_unpacked():
    rng = np.random.default_rng(1)
    params = {
        "a": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(4,)), jnp.float32),
        "d": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "e": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    }
    recipe = jc.by_path(
        {
            "a": jc.quantize.weights(jc.formats.integer(4), axis=-1),
            "b": jc.quantize.weights(jc.formats.integer(8)),
            "d": jc.quantize.weights(jc.formats.integer(4), axis=-1, group=4),
            "e": jc.quantize.weights(jc.formats.integer(4), axis=(0, 1)),
        },
        default=jc.identity(),
    )
    packed = recipe.pack(params, recipe.init(params))
    unmarked = r"mark_weights: .*'d' \(its scales.* groups\); 'e' \(its scales.* several axes\)$"
    with pytest.warns(UserWarning, match=unmarked) as said:
        view = mark_weights(packed)
    assert len(said) == 1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), view, jc.unpack(packed))
    with pytest.warns(UserWarning, match=unmarked):
        seen = marks_of(lambda: mark_weights(packed))
    assert [m["dtype"] for m in seen] == ["i4", "i8"]
    assert [m.get("quantization_dimension") for m in seen] == [1, None]


def test_marked_activations_are_fake_quantized():
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    fn = lambda p, x: x @ p["w"]
    act = jc.quantize.activations(fn, jc.formats.integer(8, symmetric=False))
    grids = jc.quantize.calibrate_activations(act, params, [(x,)])
    marked = mark_activations(fn, grids)
    assert len(marks_of(marked, params, x)) == 1
    np.testing.assert_allclose(marked(params, x), act.apply(grids, params, x), rtol=1e-5)


def network(params, x):
    """Every kind of step that matters."""
    y = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jnp.clip(y * params["gain"].reshape(1, 1, 1, -1) + 0.1, 0.0, 1.5)
    z = jnp.pad(y[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1)))
    z = jax.lax.reduce_window(
        z, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID"
    ) - 0.25 * jnp.pad(y[:, 1:4, 1:4], ((0, 0), (0, 0), (0, 0), (1, 1)))
    return jnp.mean(z * z, axis=(1, 2)) @ params["dense"] + params["bias"].reshape(1, -1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_marked_program_is_the_integer_program(symmetric):
    rng = np.random.default_rng(3)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
        "gain": jnp.asarray([1.0, -2.0, 0.5, 1.5], jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        "bias": jnp.asarray([0.3, 0.0, -1.0], jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 2)), jnp.float32)
    program = jc.quantize.integer_only(
        network, params, [x], activations=jc.formats.integer(8, symmetric=symmetric)
    )
    want = program.dequantize(program.run(program.quantize_input(x)))
    found = marked_program(program)(x)
    step = float(program.grids[program.output].qparams.scale)
    apart = np.abs(np.asarray(found) - np.asarray(want)) / step
    # One code where the two round differently, never two.
    assert apart.max() < 1.01 and (apart > 0.5).mean() < 0.2
    small = marked_program(program)(x[:1])
    np.testing.assert_allclose(small, found[:1], atol=1e-5)


def test_errors():
    x = jnp.ones((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        mark(x, scale=1.0, zero_point=0, bits=5, narrow=True)
    with pytest.raises(ValueError, match="must have 3 numbers"):
        mark(x, scale=[1.0, 2.0], zero_point=0, bits=8, narrow=True, axis=1)
    two = Grid(QParams(jnp.ones((2,))), jc.formats.integer(8))
    with pytest.raises(ValueError, match="here: activations must have one scale"):
        mark_grid(x, two, where="here")
    with pytest.raises(ValueError, match=r"here: .*formats.integer"):
        mark_grid(x, Grid((), jc.formats.parse("float8_e4m3")), where="here")
