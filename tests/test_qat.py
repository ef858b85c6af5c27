"""Learned quantizers: values and gradients against the formulas of the papers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.core.compressor import CompressState


def lsq_reference(v, s, low, high, cotangent):
    """v_hat, its gradient by v, and by s without g; arXiv 1902.08153, eq. 1 to 3."""
    v, s, cotangent = (np.asarray(a, np.float64) for a in (v, s, cotangent))
    t = v / s
    inside = (t >= low) & (t <= high)
    bar = np.round(np.clip(t, low, high))
    slope = np.where(inside, bar - t, bar)
    return bar * s, np.where(inside, cotangent, 0.0), slope * cotangent


def test_lsq_equals_the_paper_per_channel_and_traced():
    rng = np.random.default_rng(0)
    w, cotangent = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    start = jc.quantize.lsq(3, axis=-1).init({"w": w}).learned["w"]
    wanted = 2 * np.abs(np.asarray(w, np.float64)).mean(0, keepdims=True) / np.sqrt(3)
    np.testing.assert_allclose(start, wanted, rtol=1e-6)

    @jax.jit
    def both(w, step, bits):
        comp = jc.quantize.lsq(bits, axis=-1)
        view = lambda w, s: comp.apply(w, CompressState(learned=s))
        out, pull = jax.vjp(view, w, step)
        return out, *pull(cotangent)

    for bits in (2, 3, 4, 8):
        step = start * 2.0 ** (3 - bits)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        out, dw, ds = both(w, step, jnp.int32(bits))
        view, by_w, by_s = lsq_reference(w, step, low, high, cotangent)
        np.testing.assert_allclose(out, view, rtol=1e-6)
        np.testing.assert_allclose(dw, by_w, rtol=1e-6)
        np.testing.assert_allclose(
            ds, by_s.sum(0, keepdims=True) / np.sqrt(6 * high), rtol=1e-5, atol=1e-6
        )
    assert both._cache_size() == 1  # type: ignore


def test_steps_stay_positive_and_zeros_have_one():
    comp = jc.quantize.lsq(4)
    state = comp.init({"w": jnp.zeros((3, 2), jnp.bfloat16)})
    assert state.learned["w"].item() == 1.0 and state.learned["w"].dtype == jnp.float32
    w = {"w": jnp.array([0.5, -0.25])}
    for step in (-0.25, 0.25):
        view = comp.apply(w, CompressState(learned={"w": jnp.full(1, step)}))["w"]
        assert view.tolist() == [0.5, -0.25]
    nothing = comp.apply(w, CompressState(learned={"w": jnp.zeros(1)}))["w"]
    assert np.isfinite(nothing).all()


def network(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"]


@pytest.fixture(scope="module")
def params_and_inputs():
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"first": {"kernel": array(5, 8), "bias": array(8)}, "last": {"kernel": array(8, 3)}}
    return params, array(16, 5)


def test_activations_start_from_data_and_get_the_gradients_of_the_paper(params_and_inputs):
    params, x = params_and_inputs
    act = jc.quantize.lsq_activations(network, {"first/.*": 8, "last/.*": 2})
    state = act.init(params, x)
    assert {k: bool(v.all()) for k, v in state.buffers.items()} == {
        "first/kernel": True,
        "last/kernel": False,
    }
    snapped, _, _ = lsq_reference(x, state.learned["first/kernel"], -128, 127, 0.0)
    kernel, bias = (np.asarray(params["first"][k], np.float64) for k in ("kernel", "bias"))
    hidden = np.maximum(snapped @ kernel + bias, 0)
    step = state.learned["last/kernel"]
    np.testing.assert_allclose(np.ravel(step), [2 * hidden.mean() / np.sqrt(3)], rtol=1e-5)

    def total(learned):
        out, new = act.train(state._replace(learned=learned), params, x)
        return jnp.sum(out), (out, new)

    grads, (out, new) = jax.grad(total, has_aux=True)(state.learned)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    last = np.asarray(params["last"]["kernel"], np.float64)
    cotangent = np.ones((16, 3)) @ last.T
    values, _, slope = lsq_reference(hidden, step, 0, 3, cotangent)
    np.testing.assert_allclose(out, values @ last, rtol=1e-4, atol=1e-5)
    wanted = slope.sum() / np.sqrt(8 * 3)
    np.testing.assert_allclose(np.ravel(grads["last/kernel"]), [wanted], rtol=1e-4)
    grids = act.grids(state)
    assert {k: g.format.name for k, g in grids.items()} == {
        "first/kernel": "int8_full",
        "last/kernel": "uint2",
    }
    assert (act.apply(grids, params, x) == out).all()


def test_make_step_trains_weights_steps_and_activation_steps(params_and_inputs):
    params, x = params_and_inputs
    labels = jnp.argmax(network(params, x), -1)
    recipe = jc.chain(
        jc.prune.magnitude(0.5),
        jc.by_path({".*kernel": jc.quantize.lsq(2, axis=-1)}, default=jc.identity()),
    )
    act = jc.quantize.lsq_activations(network, 3)
    tx = jc.prune.masked_optimizer(
        optax.partition(
            {"params": optax.sgd(0.1, momentum=0.9), "learned": optax.sgd(0.01)}, jc.train.label_learned
        )
    )
    view = recipe.apply(params, recipe.init(params))
    state = jc.train.create(params, recipe, tx, activations=act.init(view, x))
    before = jax.tree.map(np.asarray, state.trainable)
    step = jc.train.make_step(jc.train.stateless(network), tx, recipe=recipe, activations=act)
    losses = []
    for _ in range(60):
        state, metrics = step(state, (), (x, labels))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1  # type: ignore
    assert losses[-1] < 0.5 * losses[0]
    for old, new in zip(
        jax.tree.leaves((before.learned, before.activations)),
        jax.tree.leaves((state.trainable.learned, state.trainable.activations)),
        strict=True,
    ):
        assert (old != new).all()
    packed = recipe.pack(state.params, state.compress)
    assert jc.packed_bytes(packed["last"]["kernel"]) <= 3 + 2 * 3 + 3 * 4
    shipped = act.apply(act.grids(state.activations), jc.unpack(packed), x)
    outputs, _ = act.train(state.activations, recipe.apply(state.params, state.compress), x)
    assert (shipped == outputs).all()


@pytest.mark.parametrize("bits, error", [(1, ValueError), (9, ValueError), ("4", TypeError)])
def test_bad_bits(bits, error):
    for make in (jc.quantize.lsq, lambda b: jc.quantize.lsq_activations(network, {".*": b})):
        with pytest.raises(error, match="bits must be"):
            make(bits)


def test_a_rule_that_matches_no_contraction(params_and_inputs):
    params, x = params_and_inputs
    act = jc.quantize.lsq_activations(network, {"lost/.*": 4})
    with pytest.raises(ValueError, match="lost"):
        act.init(params, x)
