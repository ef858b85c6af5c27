"""Meshes of explicit axes: what is fitted to data equals what one device gives."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import jaxcompress as jc
from jaxcompress.core.sharding.meshes import on_any_mesh

RULES = {".*": jc.quantize.Spec(jc.formats.integer(4))}


def network(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def small(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"a": normal(16, 32), "b": normal(32, 8)}, normal(64, 16)


def sharded(params, x):
    """Weights in parts along an axis that no product sums over, and rows of data."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    put = lambda w, *spec: jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))
    return {"a": put(params["a"], "d"), "b": put(params["b"], None, "d")}, put(x)


def _fitted(method):
    return lambda params, x: method(network, params, [(x,)], RULES)[0]


def _activations(calibrate):
    def run(params, x):
        quantizer = jc.quantize.activations(network, jc.formats.integer(8), calibrate=calibrate)
        grids = jc.quantize.calibrate_activations(quantizer, params, [(x,)])
        return quantizer.apply(grids, params, x)

    return run


def _shrunk(params, x):
    comp = jc.prune.magnitude(0.5, structure=jc.prune.channel(-1))
    masks = jc.prune.masks(comp.init(params), params)
    small_fn, small_params, _ = jc.prune.shrink(network, params, masks, (x,))
    return small_fn(small_params, x)


def _trained(params, x):
    recipe = jc.chain(jc.prune.magnitude(0.5), jc.quantize.weights(jc.formats.integer(8), axis=-1))
    tx = jc.prune.masked_optimizer(optax.sgd(1e-2))
    step = jc.train.make_step(jc.train.stateless(network), tx, recipe=recipe)
    state = jc.train.create(params, recipe, tx)
    for _ in range(2):
        state, _ = step(state, (), (x, jnp.arange(64) % 8))
    return state.params


def _exported(tmp_path):
    def run(params, x):
        comp = jc.quantize.weights(jc.formats.integer(8), axis=-1)
        packed = comp.pack(params, comp.init(params))
        jc.export.onnx(network, packed, x, path=tmp_path / "network.onnx")
        return np.frombuffer((tmp_path / "network.onnx").read_bytes(), np.uint8)

    return run


METHODS = {
    "gptq": _fitted(jc.quantize.gptq),
    "awq": _fitted(jc.quantize.awq),
    "wanda": lambda params, x: jc.prune.wanda(network, params, [(x,)], 0.5)[0],
    "apoz": lambda params, x: jc.prune.apoz(network, params, iter([(x[:32],), (x[32:],)])),
    "percentile": _activations(jc.quantize.percentile(99.0)),
    "kl": _activations(jc.quantize.kl()),
    "shrink": _shrunk,
    "train": _trained,
    "onnx": _exported,
}
BROAD = {"awq", "kl", "percentile", "wanda"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.broad] if n in BROAD else []) for n in METHODS]
)
def test_equal_to_one_device(name, tmp_path):
    run = METHODS[name](tmp_path) if name == "onnx" else METHODS[name]
    params, x = small()
    one, many = (jax.device_get(run(*given)) for given in ((params, x), sharded(params, x)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


@jax.custom_vjp
def _sine(x):
    return reshard(jnp.sin(x), PartitionSpec("d", None))


def _sine_backward(x, g):
    return (g * jnp.cos(reshard(x, PartitionSpec("d", None))),)


_sine.defvjp(lambda x: (_sine(x), x), _sine_backward)


def _said(params, x):  # relu(sin(x a)) b, with all ways to say where arrays lie
    h = jnp.dot(x, params["a"], out_sharding=PartitionSpec("d", None))
    h = reshard(jax.nn.relu(_sine(h)), PartitionSpec(None, "d"))
    b = jax.lax.with_sharding_constraint(params["b"], PartitionSpec(None, "d"))
    return jax.jit(lambda h, b: jnp.dot(h, b, out_sharding=PartitionSpec("d", None)))(h, b)


def _unsaid(params, x):
    return jax.nn.relu(jnp.sin(x @ params["a"])) @ params["b"]


def _loss(fn):
    return lambda params, x: jnp.mean(fn(params, x) ** 2)


def _shrunk_of(fn, params, x):
    comp = jc.prune.magnitude(0.5, structure=jc.prune.channel(-1))
    masks = jc.prune.masks(comp.init(params), params)
    smaller, new, _ = jc.prune.shrink(fn, params, masks, (x,))
    return smaller(new, x)


def _file_of(fn, params, x):
    with tempfile.TemporaryDirectory() as folder:
        jc.export.onnx(fn, params, x, path=f"{folder}/network.onnx")
        return np.frombuffer(Path(folder, "network.onnx").read_bytes(), np.uint8)


SAID = {
    "trace": lambda fn, params, x: [s.macs for s in jc.graph.trace(fn, params, x).sites],
    "gptq": lambda fn, params, x: jc.quantize.gptq(fn, params, [(x,)], RULES)[0],
    "wanda": lambda fn, params, x: jc.prune.wanda(fn, params, [(x,)], 0.5)[0],
    "shrink": _shrunk_of,
    "fisher": lambda fn, params, x: jc.prune.fisher_diagonal(_loss(fn), params, [(x,)]),
    "search": lambda fn, params, x: dict(
        jc.search.sensitivity(
            fn, params, [(x,)], weights={"int4": jc.quantize.weights(jc.formats.integer(4))}
        ).weights
    ),
    "onnx": _file_of,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("trace", "fisher", "onnx") else pytest.mark.broad)
        for n in SAID
    ],
)
def test_what_a_network_says_of_shardings_is_left_out(name):
    params, x = small()
    one = jax.device_get(SAID[name](_unsaid, params, x))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    put = lambda w, *spec: jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))
    placed = {"a": put(params["a"], None, "d"), "b": put(params["b"], "d")}
    with jax.set_mesh(mesh):
        many = jax.device_get(SAID[name](_said, placed, put(x, "d")))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_results_keep_the_types_of_what_they_belong_to():
    params, x = sharded(*small())
    types = lambda tree: [str(jax.typeof(w)) for w in jax.tree.leaves(tree)]
    same = on_any_mesh(lambda tree: {"mask": jax.tree.map(lambda w: w > 0, tree)})
    for run in (same, jax.jit(same)):
        assert types(run(params)) == ["bool[16@d,32]", "bool[32,8@d]"]
    with pytest.raises(Exception, match="(?i)shard"):  # what JAX says without it
        jnp.reshape(params["b"], (-1,))


def _uncovered(params, x):
    return jc.by_path({"a": jc.identity()}).init(params)


def _unfolded(params, x):
    return jc.quantize.fold_batch_norm(_normalized, params, [(x,)])


def _normalized(params, x):  # a norm whose input is read by others too
    h = x @ params["a"]
    return h + (h - params["m"][None]) * jax.lax.rsqrt(params["v"] + 1e-3)[None]


def _unequalized(params, x):
    odd = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]  # of no scale to move
    return jc.quantize.equalize(odd, params, [(x,)], RULES)


@pytest.mark.parametrize("run", [_uncovered, jax.jit(_uncovered), _unfolded, _unequalized])
def test_warnings_point_at_the_caller(run):
    params, x = small()
    if run is _unfolded:
        params |= {"m": jnp.ones(32), "v": jnp.ones(32)}
    with pytest.warns(UserWarning) as caught:
        run(params, x)
    assert {w.filename for w in caught} == {__file__}
