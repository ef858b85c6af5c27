"""Post-training quantization: exact identities, an independent GPTQ, and what errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress import core, formats
from jaxcompress.formats import integer
from jaxcompress.quantize import mse, ptq
from jaxcompress.quantize.fake_quantized_weights import qparams_of
from jaxcompress.quantize.ptq import Spec, adaround, gptq, gptq_sweep, hqq, recipe
from jaxcompress.quantize.ptq.network_reconstruction import squared_error

pytestmark = pytest.mark.broad


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def dense(params, x):
    return x @ params["w"]


def correlated(rows, k, *, seed=0, rank=None):
    mix = np.eye(k) + 0.6 * np.asarray(draw(k, k, seed=seed + 1)) / np.sqrt(k)
    x = np.asarray(draw(rows, k, seed=seed)) @ mix
    if rank is not None:
        x = x[:, :rank] @ np.asarray(draw(rank, k, seed=seed + 2))
    return jnp.asarray(x, jnp.float32)


def losses(w, view, x):
    x, delta = np.asarray(x, np.float64), np.asarray(view, np.float64) - np.asarray(w, np.float64)
    return ((x @ delta) ** 2).sum(0) / len(x)


def nearest(w, spec):
    comp = spec.weights()
    return comp.apply(w, comp.init(w))


def by_inverse(w, x, scale, bits, *, damping=0.01, order=None):
    """Optimal brain quantization with frozen columns, in float64, by downdates of the inverse."""
    w, x = np.asarray(w, np.float64).copy(), np.asarray(x, np.float64)
    h = x.T @ x / len(x)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    inverse, q, errors, qmax = np.linalg.inv(h), np.zeros_like(w), 0.0, 2 ** (bits - 1) - 1
    order = range(len(w)) if order is None else order
    for i in order:
        q[i] = np.clip(np.round(w[i] / scale), -qmax, qmax) * scale
        errors += ((w[i] - q[i]) ** 2 / inverse[i, i]).sum()
        w -= np.outer(inverse[:, i] / inverse[i, i], w[i] - q[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        w[i] = q[i]
        inverse[i], inverse[:, i] = 0.0, 0.0
    return q, errors, h


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_sequence_of_optimal_updates_and_its_error_identity_holds(act_order):
    w, x = draw(24, 6), correlated(64, 24)
    scale = np.asarray(qparams_of(w, integer(4), formats.granularity(-1)).scale)[0]
    power = np.diag(np.asarray(x, np.float64).T @ np.asarray(x, np.float64))
    order = np.argsort(-power, kind="stable") if act_order else None
    want, errors, h = by_inverse(w, x, scale, 4, order=order)
    got, _ = gptq(dense, {"w": w}, [(x,)], {"w": Spec(integer(4))}, act_order=act_order)
    mine = np.asarray(got["w"], np.float64)
    plain = losses(w, nearest(w, Spec(integer(4))), x)
    better = losses(w, want, x) <= plain  # else the rounded column is kept
    assert better.sum() >= 5
    np.testing.assert_allclose(mine[:, better], want[:, better], atol=1e-6)
    # tr((W - Q)^T H (W - Q)) = sum of squared errors, H damped
    delta = np.asarray(w, np.float64) - want
    assert np.trace(delta.T @ h @ delta) == pytest.approx(errors, rel=1e-5)


def test_the_factor_is_the_one_of_the_inverse():
    x = np.asarray(correlated(80, 40), np.float64)
    h = x.T @ x / 80
    u = np.asarray(gptq_sweep.inverse_factor(jnp.asarray(h, jnp.float32)), np.float64)
    assert np.array_equal(u, np.triu(u))
    np.testing.assert_allclose(u @ h @ u.T, np.eye(40), atol=2e-4)
    assert not np.isfinite(np.asarray(gptq_sweep.inverse_factor(-jnp.eye(3)))).all()


@pytest.mark.parametrize("k", [7, 32, 100])
def test_orthogonal_inputs_are_rounded_to_nearest(k):
    w, x = draw(k, 5), jnp.eye(k) * jnp.linspace(0.5, 2.0, k)[:, None]
    spec = Spec(integer(3))
    got, _ = gptq(dense, {"w": w}, [(x,)], {"w": spec})
    np.testing.assert_array_equal(got["w"], nearest(w, spec))


SPECS = {
    "int3": Spec(integer(3)),
    "uint4 groups": Spec(integer(4, symmetric=False), group=16),
    "ragged": Spec(integer(4), group=12),
    "tensor": Spec(integer(4), axis=None),
    "clipped": Spec(integer(3), calibrate=mse()),
    "nf4": Spec(formats.nf4(), group=16),
    "mxfp4": Spec(formats.mxfp4()),
    "nvfp4": Spec(formats.nvfp4()),
    "float4": Spec(formats.float4_e2m1()),
    "pot": Spec(formats.power_of_two(4)),
    "fixed": Spec(formats.fixed_point(2, 1)),
    "ternary": Spec(formats.ternary()),
    "binary": Spec(formats.binary()),
    "kmeans": Spec(formats.k_means(2)),
    "tiles": Spec(integer(4), block=(8, 8)),
}


@pytest.mark.broad
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "how", [{}, {"act_order": True}, {"groups": "current"}, {"sweeps": 2}], ids=str
)
def test_no_column_is_worse_than_rounded_to_nearest_and_the_result_packs(name, how):
    w, x, spec = draw(40, 6), correlated(50, 40), SPECS[name]
    params, state = gptq(dense, {"w": w}, [(x,)], {"w": spec}, **how)
    mine, plain = losses(w, params["w"], x), losses(w, nearest(w, spec), x)
    assert (mine <= plain * (1 + 1e-4) + 1e-9).all() and mine.sum() < 0.95 * plain.sum()
    comp = recipe({"w": spec})
    np.testing.assert_array_equal(comp.apply(params, state)["w"], params["w"])
    packed = comp.pack(params, state)
    np.testing.assert_array_equal(core.unpack(packed)["w"], params["w"])
    assert core.packed_bytes(packed) == core.packed_bytes(comp.pack({"w": w}, comp.init({"w": w})))


def test_sweeps_of_coordinate_descent_never_make_it_worse():
    w, x, spec = draw(48, 8), correlated(64, 48), {"w": Spec(integer(3))}
    found = [losses(w, gptq(dense, {"w": w}, [(x,)], spec, sweeps=n)[0]["w"], x) for n in (0, 1, 4)]
    assert (found[1] <= found[0] * (1 + 1e-5)).all() and (found[2] <= found[1] * (1 + 1e-5)).all()
    assert found[2].sum() < found[0].sum()


def test_all_roundings_of_small_matrices():
    # Five weights of eight levels: all 8^5 choices can be tried.
    levels = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 5, indexing="ij"), -1).reshape(-1, 5)
    total = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    for seed in range(8):
        w, x = draw(5, 1, seed=seed), correlated(16, 5, seed=10 * seed)
        scale = float(jnp.max(jnp.abs(w))) / 3
        best = losses(w, (levels * scale).T, x).min()
        got = losses(w, gptq(dense, {"w": w}, [(x,)], {"w": Spec(integer(3))})[0]["w"], x)[0]
        plain = losses(w, nearest(w, Spec(integer(3))), x)[0]
        assert best <= got + 1e-6 and got <= plain + 1e-6
        for name, loss in zip(total, (best, got, plain), strict=True):
            total[name] += loss
    assert total["gptq"] < 0.5 * (total["best"] + total["nearest"])


def test_masked_weights_stay_zero_and_the_rest_makes_up_for_them():
    w, x = draw(32, 6), correlated(64, 32)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, w.shape)
    spec = {"w": Spec(integer(4, symmetric=False))}
    params, state = gptq(dense, {"w": w}, [(x,)], spec, masks={"w": mask})
    assert not np.asarray(params["w"])[~np.asarray(mask)].any()
    plain = jnp.where(mask, nearest(w, spec["w"]), 0.0)
    assert losses(w, params["w"], x).sum() < 0.8 * losses(w, plain, x).sum()


def test_inputs_that_never_come_are_rounded_to_nearest():
    w, x = draw(16, 4), correlated(40, 16).at[:, jnp.array([3, 9])].set(0.0)
    params, _ = gptq(dense, {"w": w}, [(x,)], {"w": Spec(integer(4))})
    rounded = nearest(w, Spec(integer(4)))
    np.testing.assert_array_equal(params["w"][jnp.array([3, 9])], rounded[jnp.array([3, 9])])
    with pytest.warns(UserWarning, match="not positive definite with damping 0; trying ten times"):
        with pytest.raises(ValueError, match="w: X.T X has no Cholesky factor at any damping"):
            gptq(dense, {"w": w}, [(correlated(3, 16),)], {"w": Spec(integer(4))}, damping=0.0)


def test_half_precision_leaves():
    w, x = draw(32, 6).astype(jnp.bfloat16), correlated(64, 32)
    fn = lambda p, x: x @ p["w"].astype(jnp.float32)
    spec = Spec(integer(4), group=16)
    params, state = gptq(fn, {"w": w}, [(x,)], {"w": spec})
    assert params["w"].dtype == jnp.bfloat16
    view = recipe({"w": spec}).apply(params, state)["w"]
    np.testing.assert_array_equal(view, params["w"])
    assert losses(w, view, x).sum() < losses(w, nearest(w, spec), x).sum()


def network(params, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    for name, groups in (("stem", 1), ("depthwise", 6), ("point", 1)):
        w = params[name]
        x = lax.conv_general_dilated(
            x, w["kernel"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        x = jax.nn.relu(x + w["bias"].reshape(1, 1, 1, -1))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


def network_params():
    conv = {"stem": (3, 3, 2, 6), "depthwise": (3, 3, 1, 6), "point": (1, 1, 6, 8)}
    shapes: dict[str, tuple[int, ...]] = {**conv, "head": (8, 4)}
    return {
        name: {
            "kernel": draw(*shape, seed=i) / np.prod(shape[:-1]) ** 0.5,
            "bias": 0.1 * draw(shape[-1], seed=10 + i),
        }
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("inputs", ["float", "quantized"])
@pytest.mark.parametrize("method", [gptq, adaround], ids=lambda m: m.__name__)
def test_whole_networks(method, inputs):
    params, data = network_params(), [(draw(6, 7, 7, 2, seed=s),) for s in (20, 21)]
    spec = {".*kernel": Spec(integer(3))}
    plain, state = ptq.round_to_nearest(network, params, data, spec)
    rounded = recipe(spec).apply(plain, state)
    settings = {"steps": 300} if method is adaround else {"layer_at_a_time": inputs == "float"}
    got, state = method(network, params, data, spec, inputs=inputs, **settings)
    view = recipe(spec).apply(got, state)
    off = lambda p, batch: float(jnp.sum((network(p, *batch) - network(params, *batch)) ** 2))
    distance = lambda p: sum(off(p, batch) for batch in data)
    assert distance(view) < 0.7 * distance(rounded)
    np.testing.assert_array_equal(got["stem"]["bias"], params["stem"]["bias"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_adaround_rounds_down_or_up_and_never_for_the_worse(symmetric):
    w, x = draw(32, 8), correlated(64, 32)
    grid = integer(3, symmetric=symmetric)
    spec = Spec(grid)
    params, _ = adaround(dense, {"w": w}, [(x,)], {"w": spec}, steps=400)
    q = qparams_of(w, spec.format, formats.granularity(-1))
    steps = np.asarray(w / q.scale)
    zero = 0 if symmetric else np.asarray(q.zero_point, int)
    low, high = np.asarray(grid.bounds)[:, None] - zero
    codes = np.asarray(params["w"] / q.scale).round()
    down, up = (np.clip(f(steps), low, high) for f in (np.floor, lambda s: np.floor(s) + 1))
    assert ((codes == down) | (codes == up)).all() and (codes != np.round(steps)).any()
    mine, plain = losses(w, params["w"], x), losses(w, nearest(w, spec), x)
    assert (mine <= plain * (1 + 1e-5)).all() and mine.sum() < 0.7 * plain.sum()


def test_adaround_starts_from_the_weights_and_stays_at_nearest_for_orthogonal_inputs():
    from jaxcompress.quantize.ptq.adaptive_rounding import rectified, start

    fraction = jnp.linspace(0.0, 0.999, 40)
    np.testing.assert_allclose(rectified(start(fraction)), fraction, atol=1e-6)
    w = draw(16, 4)
    params, _ = adaround(dense, {"w": w}, [(jnp.eye(16),)], {"w": Spec(integer(4))}, steps=200)
    np.testing.assert_array_equal(params["w"], nearest(w, Spec(integer(4))))
    with pytest.raises(TypeError, match="AdaRound needs uniform steps, .* got 'nf4'"):
        adaround(dense, {"w": w}, [(jnp.eye(16),)], {"w": Spec(formats.nf4())})


@pytest.mark.parametrize(
    "spec", [Spec(integer(3, symmetric=False), group=16), Spec(integer(3))], ids=str
)
def test_hqq_lowers_the_norm_of_the_errors(spec):
    w = jax.random.t(jax.random.key(0), 4.0, (40, 6))
    x = draw(4, 40)
    params, state = hqq(dense, {"w": w}, [(x,)], {"w": spec})
    np.testing.assert_array_equal(params["w"], w)
    norm = lambda view: (np.abs(np.asarray(view - w, np.float64)) ** 0.7).sum()
    comp = recipe({"w": spec})
    assert norm(comp.apply(params, state)["w"]) < norm(nearest(w, spec))
    np.testing.assert_array_equal(
        core.unpack(comp.pack(params, state))["w"], comp.apply(params, state)["w"]
    )
    with pytest.raises(TypeError, match="w: HQQ fits .* got 'mxfp4'"):
        hqq(dense, {"w": w}, [(x,)], {"w": Spec(formats.mxfp4())})


def test_bias_correction_removes_the_mean_error():
    params, data = network_params(), [(draw(6, 7, 7, 2, seed=s),) for s in (20, 21)]
    spec = {".*kernel": Spec(integer(3))}
    got, state = ptq.correct_bias(network, params, data, spec, inputs="quantized")
    view = recipe(spec).apply(got, state)
    mean = lambda p: np.mean([np.asarray(network(p, *batch), np.float64) for batch in data], (0, 1))
    np.testing.assert_allclose(mean(view), mean(params), atol=1e-6)
    plain = recipe(spec).apply(*ptq.round_to_nearest(network, params, data, spec))
    assert np.abs(mean(plain) - mean(params)).max() > 1e-3
    # Weights alone: the first layer's mean is exact, whatever the others do.
    got, _ = ptq.correct_bias(network, params, data, spec)
    x = jnp.concatenate([batch[0] for batch in data])
    conv = lambda w: np.asarray(
        lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        np.float64,
    ).mean((0, 1, 2))
    stem = nearest(params["stem"]["kernel"], spec[".*kernel"])
    shift = np.asarray(got["stem"]["bias"] - params["stem"]["bias"], np.float64)
    np.testing.assert_allclose(conv(stem) + shift, conv(params["stem"]["kernel"]), atol=1e-6)


def test_reconstruction_brings_the_outputs_of_the_whole_network_back():
    params, data = network_params(), [(draw(6, 7, 7, 2, seed=s),) for s in (20, 21)]
    spec = {".*kernel": Spec(integer(3))}
    comp = recipe(spec)
    off = lambda view: sum(
        float(squared_error(network(view, *batch), network(params, *batch))) for batch in data
    )
    start = gptq(network, params, data, spec)
    got, state = ptq.reconstruct(
        network, params, data, spec, quantized=start, epochs=30, learning_rate=1e-3
    )
    assert off(comp.apply(got, state)) < 0.7 * off(comp.apply(*start))
    np.testing.assert_array_equal(
        jax.tree.leaves(core.unpack(comp.pack(got, state)))[0],
        jax.tree.leaves(comp.apply(got, state))[0],
    )
    both, moved = ptq.reconstruct(
        network, params, data, spec, quantized=start, epochs=30, learning_rate=1e-3, scales=True
    )
    assert off(comp.apply(both, moved)) < off(comp.apply(got, state))
    pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True)
    assert all((a > 0).all() and (a != b).any() for a, b in pairs)
    np.testing.assert_array_equal(
        jax.tree.leaves(core.unpack(comp.pack(both, moved)))[0],
        jax.tree.leaves(comp.apply(both, moved))[0],
    )
    # A step size that can only harm leaves the start.
    same, _ = ptq.reconstruct(
        network, params, data, spec, quantized=start, epochs=1, learning_rate=1e3
    )
    jax.tree.map(np.testing.assert_array_equal, same, start[0])


def test_leaves_that_are_no_floats_stay_in_reconstruction():
    fn = lambda p, x: x @ p["w"] * p["step"].astype(jnp.float32)
    params = {"w": draw(8, 4), "step": jnp.array(2), "key": jax.random.key(0)}
    data, spec = [(draw(5, 8),)], {"w": Spec(integer(3))}
    got, _ = ptq.reconstruct(fn, params, data, spec, epochs=2, learning_rate=1e-3)
    assert got["step"] == 2 and got["key"] == params["key"]


def test_a_tied_weight_is_rounded_once():
    fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T
    w, x = draw(12, 8), draw(20, 12)
    with pytest.warns(UserWarning, match="to nearest, .*: w .'w', 'w#1' sum over different axes"):
        params, state = gptq(fn, {"w": w}, [(x,)], {"w": Spec(integer(4))})
    view = recipe({"w": Spec(integer(4))}).apply(params, state)
    np.testing.assert_array_equal(view["w"], params["w"])
    np.testing.assert_array_equal(view["w"], nearest(w, Spec(integer(4))))


def test_errors_name_what_is_wrong():
    w, x = draw(8, 4), draw(5, 8)
    with pytest.raises(TypeError, match="spec must map regular expressions on paths to Spec"):
        gptq(dense, {"w": w}, [(x,)], Spec(integer(4)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="spec: 'w' must be a Spec, got Integer"):
        gptq(dense, {"w": w}, [(x,)], {"w": integer(4)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="format must be a format"):
        Spec("int4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="calibrate must be a Calibrator such as .*, got 'mse'"):
        Spec(integer(4), calibrate="mse")  # type: ignore
    with pytest.raises(ValueError, match="rule 'kernel' matches no parameter; nearest: 'w'"):
        gptq(dense, {"w": w}, [(x,)], {"kernel": Spec(integer(4))})
    with pytest.raises(ValueError, match="data is empty"):
        gptq(dense, {"w": w}, [], {"w": Spec(integer(4))})
    with pytest.raises(ValueError, match="its rules take the weight of no layer; layers: .'w'"):
        fn = lambda p, x: x @ p["w"] + p["b"][None]
        gptq(fn, {"w": w, "b": jnp.ones(4)}, [(x,)], {"b": Spec(integer(4))})
    with pytest.raises(ValueError, match="groups must be 'static' or 'current', got 'none'"):
        gptq(dense, {"w": w}, [(x,)], {"w": Spec(integer(4))}, groups="none")
    with pytest.raises(ValueError, match="inputs must be 'float' or 'quantized', got 'both'"):
        gptq(dense, {"w": w}, [(x,)], {"w": Spec(integer(4))}, inputs="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of its layers has a bias"):
        ptq.correct_bias(dense, {"w": w}, [(x,)], {"w": Spec(integer(4))})
    with pytest.warns(UserWarning, match="rounded only, since no contraction takes them.*: table"):
        fn = lambda p, x: p["table"][x] @ p["w"]
        params = {"w": w, "table": draw(6, 8)}
        gptq(fn, params, [(jnp.arange(6),)], {".*": Spec(integer(4))})


def test_layers_of_one_shape_compile_once():
    compiled = []

    def count(event: str, duration_secs: float, **unused) -> None:
        del duration_secs, unused
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        spec = {"w": Spec(integer(4))}
        for seed in range(3):
            w, x = draw(24, 6, seed=seed), correlated(40, 24, seed=seed)
            gptq(dense, {"w": w}, [(x,)], spec)
            compiled.append(seed)
        assert compiled[compiled.index(1) :] == [1, 2]
    finally:
        jax.monitoring.clear_event_listeners()
