"""The train step: everything composed, one compile, exact zeros, learning, donation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxcompress as jc


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(5)(nn.relu(nn.Dense(self.width)(x)))


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def problem(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(32, 6, 6, 2)).astype(np.float32)
    labels = (images.mean((1, 2)) @ rng.normal(size=(2, 5))).argmax(-1)
    return images, labels


def composed(temperature: Any = 4.0, optimizer=None):
    images, labels = problem()
    teacher, student = Net(16), Net(8)
    teacher_params = teacher.init(jax.random.key(1), images)["params"]
    params = student.init(jax.random.key(2), images)["params"]
    apply_fn = lambda p, x: student.apply({"params": p}, x)
    recipe = jc.chain(
        jc.prune.magnitude(jc.prune.cubic(0.0, 0.6, start=1, end=6), scope="global"),
        jc.by_path(
            {".*kernel": jc.quantize.weights(jc.formats.integer(4), axis=-1)},
            default=jc.identity(),
        ),
    )
    act = jc.quantize.activations(apply_fn, jc.formats.integer(8, symmetric=False))
    tx = jc.prune.masked_optimizer(optimizer or optax.adamw(3e-3, weight_decay=0.01))
    step = jc.train.make_step(
        jc.train.stateless(apply_fn),
        tx,
        recipe=recipe,
        loss=jc.train.hinton_loss(temperature=temperature),
        teacher=lambda p, x: teacher.apply({"params": p}, x),
        activations=act,
        ema_decay=0.9,
    )
    state = jc.train.create(params, recipe, tx, activations=act.init(params, images), with_ema=True)
    return step, state, teacher_params, (images, labels), recipe


def test_all_composed_the_second_call_does_not_compile_and_zeros_are_exact():
    step, state, teacher_params, batch, recipe = composed(
        temperature=optax.linear_schedule(6.0, 2.0, 10)  # changes from step to step
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    batch = jax.device_put(batch)
    state, first = step(state, teacher_params, batch)
    before, losses = len(compiled), [first["loss"]]
    assert before > 0
    for _ in range(9):
        state, metrics = step(state, teacher_params, batch)
        losses.append(metrics["loss"])
        assert len(compiled) == before
    assert step._cache_size() == 1
    assert float(losses[-1]) < float(losses[0]) and set(metrics) == {"loss", "cross_entropy", "kd"}
    masks = jc.prune.masks(state.compress, state.params)
    kept = sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)
    total = sum(w.size for w in jax.tree.leaves(state.params) if w.ndim > 1)
    assert kept == round(0.4 * total)
    for mask, w in zip(jax.tree.leaves(masks), jax.tree.leaves(state.params), strict=True):
        assert not np.any(np.asarray(w)[~np.broadcast_to(np.asarray(mask), w.shape)])
    view = recipe.apply(state.params, state.compress)
    assert len(np.unique(np.asarray(view["Conv_0"]["kernel"])[..., 0])) <= 15
    assert int(state.step) == 10 and jc.prune.sparsity_of(view) >= 0.6


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_compiles_once_and_the_state_stays_where_it_lies(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    # One spec that ends in None, one that does not; the steps of LSQ and counters lie on no mesh.
    params = {
        "up": put(normal(16, 32), None, "model"),
        "down": put(normal(32, 8), "model", None),
        "bias": put(normal(8)),
    }
    batch = put(normal(64, 16), "data"), put(np.arange(64, dtype=np.int32) % 8, "data")
    out = NamedSharding(mesh, PartitionSpec("data", None)) if mesh.explicit_axes else None

    def network(p, x):
        h = jax.nn.relu(x @ p["up"])
        return jnp.einsum("bi,io->bo", h, p["down"], out_sharding=out) + p["bias"][None]

    rules = {"up|down": jc.quantize.lsq(4, axis=-1)}
    recipe = jc.chain(jc.prune.magnitude(0.5), jc.by_path(rules, default=jc.identity()))
    tx = jc.prune.masked_optimizer(optax.sgd(1e-2, momentum=0.9))
    step = jc.train.make_step(jc.train.stateless(network), tx, recipe=recipe, ema_decay=0.9)
    state = jc.train.create(params, recipe, tx, with_ema=True)
    for _ in range(3):
        state, _ = step(state, (), batch)
    assert step._cache_size() == 1
    for name, w in params.items():
        assert state.params[name].sharding.is_equivalent_to(w.sharding, w.ndim)
        assert state.ema[name].sharding.is_equivalent_to(w.sharding, w.ndim)


def test_the_step_runs_without_implicit_transfers():
    step, state, teacher_params, batch, _ = composed()
    batch = jax.device_put(batch)
    state, _ = step(state, teacher_params, batch)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, teacher_params, batch)
    assert np.isfinite(float(metrics["loss"]))


def test_the_state_is_donated_the_teacher_is_not_and_neither_are_the_callers_params():
    step, state, teacher_params, batch, _ = composed()
    old = jax.tree.leaves(state.params)[0]
    step(state, teacher_params, batch)
    assert old.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher_params))


def test_a_plain_step_is_one_step_of_sgd():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}
    x = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    labels = np.arange(8) % 3
    tx = optax.sgd(0.5)
    step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p["w"]), tx)
    state, metrics = step(jc.train.create(params, jc.identity(), tx), (), (x, labels))
    w = np.asarray(params["w"], np.float64)
    z = x @ w
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(metrics["loss"], -np.log(p[np.arange(8), labels]).mean(), rtol=1e-5)
    gradient = x.T @ (p - np.eye(3)[labels]) / 8
    np.testing.assert_allclose(state.params["w"], w - 0.5 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["outside", "inside", "multi_transform"])
def test_masks_reach_the_optimizer_through_optax_wrappers(order):
    sgd = optax.sgd(0.1, momentum=0.9)
    tx = {
        "outside": optax.MultiSteps(jc.prune.masked_optimizer(sgd), 2),
        "inside": jc.prune.masked_optimizer(optax.MultiSteps(sgd, 2)),  # type: ignore
        "multi_transform": optax.multi_transform(
            {"train": jc.prune.masked_optimizer(sgd), "keep": optax.set_to_zero()},
            jc.train.Trainable({"w": "train", "b": "keep"}, ()),  # type: ignore
        ),
    }[order]
    recipe = jc.prune.magnitude(0.5)
    params = {
        "w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
        "b": jnp.ones(3),
    }
    step = jc.train.make_step(
        jc.train.stateless(lambda p, x: x @ p["w"] + p["b"][None]), tx, recipe=recipe
    )
    state = jc.train.create(params, recipe, tx)
    for _ in range(4):
        state, _ = step(state, (), (np.ones((8, 4), np.float32), np.arange(8) % 3))
    masks = jc.prune.masks(state.compress, state.params)
    assert int(masks["w"].sum()) == 6 and not np.any(
        np.asarray(state.params["w"])[~np.asarray(masks["w"])]
    )


def test_a_state_that_does_not_fit_the_step_is_refused():
    tx = optax.sgd(0.1)
    fn = lambda p, x: x @ p["w"]
    params, batch = {"w": jnp.ones((2, 2))}, (np.ones((3, 2), np.float32), np.zeros(3, int))
    state = lambda: jc.train.create(params, jc.identity(), tx)
    forward = jc.train.stateless(fn)
    with pytest.raises(
        ValueError, match="ema_decay=0.9, but the state was created with with_ema=F"
    ):
        jc.train.make_step(forward, tx, ema_decay=0.9)(state(), (), batch)
    act = jc.quantize.activations(fn, jc.formats.integer(8))
    with pytest.raises(ValueError, match="the state has no statistics"):
        jc.train.make_step(forward, tx, activations=act)(state(), (), batch)
    with pytest.raises(ValueError, match="the state holds no masks"):
        jc.train.make_step(forward, tx, recipe=jc.prune.magnitude(0.5))(state(), (), batch)
    with pytest.raises(TypeError, match="params: seen: a gradient needs floating point arrays"):
        jc.train.create({"seen": jnp.arange(2)}, jc.identity(), tx)


def test_model_state_is_carried():
    def forward(params, seen, x):
        return x @ params["w"], seen + len(x)

    tx = optax.sgd(0.1)
    step = jc.train.make_step(forward, tx)
    params = {"w": jnp.zeros((2, 2))}
    state = jc.train.create(params, jc.identity(), tx, model_state=jnp.zeros((), jnp.int32))
    for _ in range(2):
        state, _ = step(state, (), (np.ones((3, 2), np.float32), np.zeros(3, int)))
    assert int(state.model_state) == 6


def test_sharded_batches_give_the_single_device_result():
    # Adam would make a whole step of the sign of a gradient near zero.
    step, state, teacher_params, (images, labels), _ = composed(optimizer=optax.sgd(0.1))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.device_put(jax.tree.map(np.array, state), everywhere)
    single, _ = step(state, teacher_params, (images, labels))
    teacher_params = jax.device_put(teacher_params, everywhere)
    many, _ = step(spread, teacher_params, jax.device_put((images, labels), along))
    for a, b in zip(jax.tree.leaves(single.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
