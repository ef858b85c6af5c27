"""Integer programs of trained networks: the codes that quantization-aware training has learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.core.packed import unsigned_codes
from jaxcompress.formats import integer
from jaxcompress.formats.bits import signed
from jaxcompress.quantize import differing_codes, integer_only

RNG = np.random.default_rng(0)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def f32(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def network(p, x):
    x = jax.nn.relu(conv(x, p["a"]) + p["bias"])
    h = conv(x, p["b"])
    x = jax.nn.relu(h * p["gain"] + x)  # x is read twice, on two grids
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ p["c"]


@pytest.fixture(scope="module")
def trained():
    params = {
        "a": f32(3, 3, 2, 4) * 0.3,
        "bias": f32(1, 1, 1, 4) * 0.1,
        "b": f32(3, 3, 4, 4) * 0.2,
        "gain": jnp.asarray([1.3, -0.7, 0.9, 1.1], jnp.float32).reshape(1, 1, 1, 4),
        "c": f32(16, 3),
    }
    weights = {"[abc]": jc.quantize.lsq(4, axis=-1), ".*": jc.identity()}
    recipe = jc.by_path(weights)
    act = jc.quantize.lsq_activations(network, 6)
    batch = f32(8, 4, 4, 2), jnp.arange(8) % 3
    tx = optax.sgd(0.05)
    step = jc.train.make_step(jc.train.stateless(network), tx, recipe=recipe, activations=act)
    state = jc.train.create(params, recipe, tx, activations=act.init(params, batch[0]))
    before = act.grids(state.activations)["a"].qparams.scale
    for _ in range(4):
        state, _ = step(state, (), batch)
    grids = act.grids(state.activations)
    assert grids["a"].qparams.scale != before  # trained: no range gives it
    return recipe.pack(state.params, state.compress), grids, batch[0]


def test_the_program_has_the_codes_of_the_simulation(trained):
    packed, grids, x = trained
    program = integer_only(network, packed, [x], grids=grids)
    layers = [k for k, node in enumerate(program.nodes) if node.kind in ("conv", "dot")]
    names = ["a", "b", "c"]
    seen = {}

    def look(tap, value, grid):
        seen[tap.name] = value
        return grid.snap(value), grid

    jc.graph.walk(network, look)(grids, jc.unpack(packed), x)
    codes = program.run_every(program.quantize_input(x))
    scale_of = lambda name: float(grids[name].qparams.scale.ravel()[0])
    bias = 0.5 * scale_of("a") * float(packed["a"].qparams.scale.max())
    rounded = {"a": 0.0, "b": bias, "c": np.inf}
    for k, name in zip([k for k in layers if k in _first(program, layers)], names, strict=True):
        want = np.asarray(signed(unsigned_codes(packed[name]), 4))
        got = np.asarray(program.constants[k]["weight"])
        sign = np.sign(np.asarray(packed["gain"]).ravel()) if name == "b" else 1
        np.testing.assert_array_equal(got, want * sign)
        grid, number = grids[name], np.asarray(seen[name], np.float64)
        scale, zero = float(grid.qparams.scale.ravel()[0]), int(grid.qparams.zero_point.ravel()[0])
        exact = number / scale + zero
        off = np.asarray(codes[program.nodes[k].inputs[0]], np.int64).reshape(exact.shape)
        off = off - np.clip(np.rint(exact), 0, 63)
        assert np.abs(off).max() <= 1
        # A code may differ where the number lies as near to a tie as biases are rounded, to whole
        # steps of the accumulator; "c" stands behind an addition, whose operands have 8 bits.
        from_tie = np.abs(exact - np.floor(exact) - 0.5)
        assert (from_tie[off != 0] <= rounded[name] / scale + 1e-4).all(), name
        assert np.mean(off != 0) <= 0.1, name
    assert not differing_codes(program, program.quantize_input(x)).any()
    simulated = jc.quantize.with_activations(network)(grids, jc.unpack(packed), x)
    error = lambda p: jnp.abs(p.dequantize(p.run(p.quantize_input(x))) - simulated)
    anew = integer_only(network, jc.unpack(packed), [x], weights=integer(4))
    assert error(program).mean() < 0.5 * error(anew).mean()


def _first(program, layers):
    # a tensor that is read on two grids is computed twice, from the same codes
    first = {}
    for k in layers:
        first.setdefault((program.nodes[k].inputs, program.nodes[k].scope), k)
    kept, shapes = [], set()
    for k in first.values():
        weight = np.asarray(program.constants[k]["weight"])
        if (weight.shape, weight.tobytes()) not in shapes:
            shapes.add((weight.shape, weight.tobytes()))
            kept.append(k)
    return kept


def test_what_cannot_be_kept_is_said(trained):
    packed, grids, x = trained
    with pytest.raises(ValueError, match="grids: 'd' is no contraction.*nearest"):
        integer_only(network, packed, [x], grids={"d": grids["a"]})
    with pytest.raises(ValueError, match="'a' is on uint6, but activations= is symmetric"):
        integer_only(network, packed, [x], grids=grids, activations=integer(8))
    with pytest.raises(TypeError, match="'a' must be a Grid of formats.integer.*got float"):
        integer_only(network, packed, [x], grids={"a": 0.5})  # type: ignore
    fn, w = lambda p, x: x @ p["w"], {"w": f32(8, 4)}
    for how, said in (
        (jc.quantize.weights(integer(4), axis=-1, group=4), ValueError),
        (jc.quantize.weights(integer(4, symmetric=False), axis=-1), UserWarning),
        (jc.quantize.weights(jc.formats.nf4()), UserWarning),
    ):
        other = how.pack(w, how.init(w))
        if said is ValueError:
            with pytest.raises(ValueError, match="the steps differ along axes that are summed"):
                integer_only(fn, other, [f32(3, 8)])
        else:
            with pytest.warns(UserWarning, match="packed weights again, to int8: w;"):
                integer_only(fn, other, [f32(3, 8)])


def test_contractions_without_a_grid_are_named(trained):
    packed, grids, x = trained
    some = {name: grids[name] for name in ("a", "c")}
    with pytest.warns(UserWarning, match="the ranges of batches stand in for it: b$"):
        program = integer_only(network, packed, [x], grids=some)
    kept = [g.qparams.scale for g in program.grids]
    for name in some:  # those that are given stay
        assert any(s == some[name].qparams.scale.ravel()[0] for s in kept)
