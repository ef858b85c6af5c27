"""Learned quantizers: values and gradients against float64 formulas, and training with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from _trees import bits_equal

import jaxcompress as jc
from jaxcompress import quantize
from jaxcompress.formats import integer

f64 = lambda x: np.asarray(x, np.float64)


def lsq_reference(v, s, qn, qp):
    """v^, dv^/dv, dv^/ds of LSQ, elementwise, float64 (Esser et al., eq. 1 to 5)."""
    u = v / s
    value = s * np.round(np.clip(u, -qn, qp))
    inside = (u >= -qn) & (u <= qp)
    slope = np.where((u > -qn) & (u < qp), np.round(u) - u, np.where(u <= -qn, -qn, qp))
    return value, inside.astype(float), slope


# Inside, at and outside both ends of the clip for steps of 0.25; ties among them.
V = np.array([[-3.0, -2.0, -1.95, -0.125, 0.0, 0.1], [0.375, 1.74, 1.75, 1.8, 5.0, 0.3]])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("axis", [None, 0])
def test_lsq_value_and_gradients_are_the_papers(axis, narrow):
    comp = quantize.lsq(4, axis=axis, narrow=narrow)
    qn, qp = (7 if narrow else 8), 7
    steps = np.full((1, 1), 0.25) if axis is None else np.array([[0.25], [0.2]])
    w = jnp.asarray(V, jnp.float32)
    state = comp.init(w)._replace(learned=quantize.LearnedStep(jnp.asarray(steps, jnp.float32)))
    cotangent = np.random.default_rng(0).normal(size=V.shape)

    def loss(w, learned):
        view = comp.apply(w, state._replace(learned=learned))
        return jnp.sum(view * jnp.asarray(cotangent, jnp.float32))

    dw, dlearned = jax.grad(loss, argnums=(0, 1))(w, state.learned)
    s = f64(jnp.asarray(steps, jnp.float32))
    value, inside, slope = lsq_reference(f64(w), s, qn, qp)
    np.testing.assert_allclose(comp.apply(w, state), value, rtol=1e-6)
    np.testing.assert_allclose(dw, cotangent * inside, rtol=1e-6)
    g = 1 / np.sqrt(V.size / steps.size * qp)
    want = g * (cotangent * slope).sum(axis=None if axis is None else 1, keepdims=True)
    np.testing.assert_allclose(dlearned.step, want, rtol=2e-5)


def test_lsq_steps_start_where_the_papers_start():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
    w[..., 2] = 0.0
    w[0, 0, :, 3] = 0.0  # pruned: does not count
    got = quantize.lsq(3, axis=-1).init(jnp.asarray(w)).learned.step
    size, kept = np.abs(f64(w)).sum((0, 1, 2)), np.maximum((w != 0).sum((0, 1, 2)), 1)
    want = 2 * size / kept / np.sqrt(3)
    want[2] = 1.0
    np.testing.assert_allclose(np.ravel(got), want, rtol=1e-6)
    dense = jnp.asarray(rng.normal(1.0, 2.0, size=(40, 5)), jnp.float32)
    mean, sigma = f64(dense).mean(0), f64(dense).std(0)
    want = np.maximum(abs(mean - 3 * sigma), abs(mean + 3 * sigma)) / 8
    got = quantize.lsq_plus(4, axis=-1).init(dense).learned.step
    np.testing.assert_allclose(np.ravel(got), want, rtol=1e-5)


def test_steps_may_start_from_a_calibrated_range():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32)
    comp = quantize.lsq(4, axis=-1, calibrate=quantize.min_max())
    np.testing.assert_allclose(comp.init(w).learned.step[0], np.abs(f64(w)).max(0) / 7, rtol=1e-6)
    error = lambda comp: float(jnp.sum(jnp.square(comp.apply(w, comp.init(w)) - w)))
    assert error(quantize.lsq(2, axis=-1, calibrate=quantize.mse())) < error(
        quantize.lsq(2, axis=-1)
    )
    params, x = mlp_params(), some_inputs()
    act = quantize.lsq_activations(mlp, 4, calibrate=quantize.min_max())
    learned = act.init(params, x).learned
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    signed = max(-f64(x).min() / 8, f64(x).max() / 7)
    np.testing.assert_allclose(learned["a/kernel"].step.item(), signed, rtol=1e-5)
    np.testing.assert_allclose(learned["b/kernel"].step.item(), f64(hidden).max() / 15, rtol=1e-5)


def test_a_step_below_zero_is_used_by_its_magnitude_and_never_stuck():
    comp, w = quantize.lsq(4), jnp.asarray(V, jnp.float32)
    state = comp.init(w)
    at = lambda step: state._replace(learned=quantize.LearnedStep(jnp.full((1, 1), step)))
    total = lambda step: jnp.sum(comp.apply(w, at(step)))
    assert bits_equal(comp.apply(w, at(-0.25)), comp.apply(w, at(0.25)))
    assert float(jax.grad(total)(-0.25)) == -float(jax.grad(total)(0.25)) != 0
    slope = jax.grad(total)(0.0)  # all saturate: Q_P, 0 or -Q_N each
    want = (7.0 * (V > 0).sum() - 8.0 * (V < 0).sum()) / np.sqrt(V.size * 7)
    np.testing.assert_allclose(slope, want, rtol=1e-6)
    assert np.all(np.isfinite(comp.apply(w, at(0.0))))


def mlp(params, x):
    h = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return h @ params["b"]["kernel"]


def mlp_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"a": {"kernel": normal(6, 16), "bias": normal(16)}, "b": {"kernel": normal(16, 3)}}


def some_inputs(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(32, 6)), jnp.float32)


def test_lsq_activations_start_from_calibration_and_their_grids_are_what_is_trained():
    params, x = mlp_params(), some_inputs()
    act = quantize.lsq_activations(mlp, 4)
    state = act.init(params, x)
    hidden = f64(jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None]))
    want = {
        "a/kernel": 2 * np.abs(f64(x)).mean() / np.sqrt(7),
        "b/kernel": 2 * hidden.mean() / np.sqrt(15),
    }
    for name, step in want.items():
        np.testing.assert_allclose(np.ravel(state.learned[name].step), [step], rtol=1e-5)
    grids = act.grids(state)
    points = {name: int(grid.qparams.zero_point.item()) for name, grid in grids.items()}
    assert points == {"a/kernel": 8, "b/kernel": 0}  # signed, and after ReLU
    both = jax.jit(lambda s: (act.train(s, params, x)[0], act.apply(act.grids(s), params, x)))
    outputs, shipped = both(state)
    assert bits_equal(outputs, shipped)
    # more batches: the mean over all of them, not over init's
    halves = [(x[:16],), (x[16:],)]
    again = quantize.calibrate_activations(act, params, halves)
    for name, step in want.items():
        np.testing.assert_allclose(np.ravel(again[name].qparams.scale), [step], rtol=1e-5)


def test_gradients_of_activation_steps_are_the_papers():
    params, x = mlp_params(), some_inputs()
    act = quantize.lsq_activations(mlp, 3)
    state = act.init(params, x)
    cotangent = np.random.default_rng(2).normal(size=(32, 3))

    def loss(learned, x):
        out, _ = act.train(state._replace(learned=learned), params, x)
        return jnp.sum(out * jnp.asarray(cotangent, jnp.float32))

    learned, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(state.learned, x)
    wa, ba, wb = f64(params["a"]["kernel"]), f64(params["a"]["bias"]), f64(params["b"]["kernel"])
    sa, sb = (f64(state.learned[n].step).item() for n in ("a/kernel", "b/kernel"))
    qa, inside_a, slope_a = lsq_reference(f64(x), sa, 4, 3)
    pre = qa @ wa + ba
    _, inside_b, slope_b = lsq_reference(np.maximum(pre, 0), sb, 0, 7)
    dh = cotangent @ wb.T
    np.testing.assert_allclose(
        learned["b/kernel"].step.item(), (dh * slope_b).sum() / np.sqrt(16 * 7), rtol=1e-4
    )
    da = (dh * inside_b * (pre > 0)) @ wa.T
    np.testing.assert_allclose(
        learned["a/kernel"].step.item(), (da * slope_a).sum() / np.sqrt(6 * 3), rtol=1e-4
    )
    np.testing.assert_allclose(dx, da * inside_a, rtol=1e-4, atol=1e-5)


@pytest.fixture
def optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_steps_are_trained_beside_the_params_in_their_own_group(optax_mixes_dtypes):
    del optax_mixes_dtypes
    params, x = mlp_params(), some_inputs()
    labels = jnp.argmax(mlp(params, x), axis=-1)
    recipe = jc.by_path({".*kernel": quantize.lsq(2, axis=-1)}, default=jc.identity())
    act = quantize.lsq_activations(mlp, 2)
    view = recipe.apply(params, recipe.init(params))

    def run(learning_rate):
        tx = optax.multi_transform(
            {"params": optax.set_to_zero(), "learned": optax.adam(learning_rate)},
            jc.train.label_learned,
        )
        step = jc.train.make_step(jc.train.stateless(mlp), tx, recipe=recipe, activations=act)
        state = jc.train.create(params, recipe, tx, activations=act.init(view, x))
        losses = []
        for _ in range(25):
            state, metrics = step(state, (), (x, labels))
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
        return state, losses

    state, losses = run(0.02)
    assert losses[-1] < 0.8 * losses[0]  # with steps alone
    assert bits_equal(state.params, params)
    assert all(np.all(np.asarray(s) > 0) for s in jax.tree.leaves(state.activations.learned))
    assert bits_equal(state.activations.buffers, act.init(view, x).buffers)
    fixed, _ = run(0.0)
    for old, new in (
        (fixed.compress.learned, state.compress.learned),
        (fixed.activations.learned, state.activations.learned),
    ):
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert np.mean(np.asarray(a) != np.asarray(b)) > 0.8  # but for units that never fire


def test_a_quantizer_of_the_forward_itself_carries_the_model_state():
    def forward(params, seen, x):
        return mlp(params, x), {"mean": 0.9 * seen["mean"] + 0.1 * x.mean(0)}

    params, x, model = mlp_params(), some_inputs(), {"mean": jnp.zeros(6)}
    tx, act = optax.sgd(0.01), quantize.lsq_activations(forward, 4)
    step = jc.train.make_step(forward, tx, activations=act)
    state = jc.train.create(
        params, jc.identity(), tx, model_state=model, activations=act.init(params, model, x)
    )
    before = f64(state.activations.learned["b/kernel"].step)
    state, _ = step(state, (), (x, np.arange(32) % 3))
    np.testing.assert_allclose(state.model_state["mean"], 0.1 * f64(x).mean(0), rtol=1e-5)
    assert f64(state.activations.learned["b/kernel"].step) != before


def test_one_compile_while_bits_change():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
    params, x = mlp_params(), some_inputs()

    @jax.jit
    def both(bits):
        comp, act = quantize.lsq(bits, axis=-1), quantize.lsq_activations(mlp, bits)
        grad = jax.grad(lambda w, s: jnp.sum(jnp.square(comp.apply(w, s))), argnums=1)
        state = comp.init(w)
        out, _ = act.train(act.init(params, x), params, x)
        return comp.apply(w, state), grad(w, state).learned.step, out

    for bits in (2, 4, 8):
        view, slope, out = both(jnp.int32(bits))
        comp, act = quantize.lsq(bits, axis=-1), quantize.lsq_activations(mlp, bits)
        np.testing.assert_allclose(view, comp.apply(w, comp.init(w)), rtol=1e-6, atol=1e-6)
        assert np.all(np.isfinite(slope))
        want = act.train(act.init(params, x), params, x)[0]
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert both._cache_size() == 1  # type: ignore


def test_layers_of_a_scan_have_their_own_steps_and_gradients():
    stack = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6)), jnp.float32)}

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["w"])[0]

    def looped(params, x):
        for name in "abc":
            x = jax.nn.relu(x @ params[name])
        return x

    x = some_inputs()
    loop = {name: stack["w"][i] for i, name in enumerate("abc")}
    results = []
    for fn, params in ((scanned, stack), (looped, loop)):
        act = quantize.lsq_activations(fn, 4)
        state = act.init(params, x)
        loss = lambda learned, act=act, state=state, params=params: jnp.sum(
            act.train(state._replace(learned=learned), params, x)[0]
        )
        found = (state.learned, jax.jit(jax.grad(loss))(state.learned))
        results.append(np.ravel([np.ravel(s) for s in jax.tree.leaves(found)]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_a_sharded_batch_gives_the_gradients_of_one_device():
    params, x = mlp_params(), some_inputs()
    act = quantize.lsq_activations(mlp, 4)
    state = act.init(params, x)
    loss = lambda learned, x: jnp.sum(
        jnp.square(act.train(state._replace(learned=learned), params, x)[0])
    )
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    grad = jax.jit(jax.grad(loss))
    one, many = (grad(state.learned, batch) for batch in (x, jax.device_put(x, along)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_mixed_precision_of_weights_and_activations_by_path():
    params, x = mlp_params(), some_inputs()
    recipe = jc.chain(
        jc.prune.magnitude(0.5),
        jc.by_path(
            {"a/kernel": quantize.lsq(8, axis=-1), "b/.*": quantize.lsq(2)}, default=jc.identity()
        ),
    )
    state = recipe.init(params)
    packed, view = (f(params, state) for f in (recipe.pack, recipe.apply))
    for name, bits, steps in (("a", 8, 16), ("b", 2, 1)):
        # one bit per element says which are not zero; then their codes, and the steps
        w = np.asarray(view[name]["kernel"])
        codes = -(-np.count_nonzero(w) * bits // 8)
        assert jc.packed_bytes(packed[name]["kernel"]) == w.size // 8 + codes + 4 * steps
    act = quantize.lsq_activations(mlp, {"a/.*": 8, ".*": 2})
    grids = act.grids(act.init(params, x))
    assert {name: grid.bits for name, grid in grids.items()} == {"a/kernel": 8, "b/kernel": 2}
    one = quantize.pact_activations(mlp, {"b/kernel": 4})
    assert set(one.grids(one.init(params, x))) == {"b/kernel"}
    with pytest.raises(ValueError, match="rule 'c' matches no parameter; nearest"):
        quantize.lsq_activations(mlp, {"c": 8, ".*": 2}).init(params, x)
    with pytest.raises(ValueError, match="the keys of bits=.* choose the sites already"):
        quantize.lsq_activations(mlp, {".*": 8}, sites="a.*")


def test_bad_arguments_and_data_are_refused_by_name():
    with pytest.raises(ValueError, match=r"lsq\(bits\): a learned step needs 2 bits"):
        quantize.lsq(1)
    with pytest.raises(ValueError, match=r"lsq_activations\(bits\): learned activations need 2"):
        quantize.lsq_activations(mlp, 1)
    with pytest.raises(ValueError, match="kernel: an array to quantize must be finite"):
        quantize.lsq(4).init({"kernel": jnp.array([1.0, jnp.nan])})
    params, x = mlp_params(), some_inputs()
    with pytest.raises(ValueError, match="activations of 'a/kernel' must be finite"):
        quantize.lsq_activations(mlp, 4).init(params, x.at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="sites='c.*' matches no contraction"):
        quantize.lsq_activations(mlp, 4, sites="c.*").init(params, x)
    comp = quantize.lsq(4)
    other = quantize.weights(integer(4)).init(params)
    with pytest.raises(ValueError, match=r"made for int4 \(axis.*this compressor stores int4_full"):
        comp.apply(params, other)
    with pytest.raises(ValueError, match="the state holds no learned steps"):
        comp.apply(params, other._replace(maker=()))
