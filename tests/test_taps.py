"""Feature taps of Linen and NNX networks, against the modules called one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width, name="dense")(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = Block(8, name="block_0")(x)
        shared = Block(8, name="block_1")
        x = nn.BatchNorm(use_running_average=not train, name="norm")(shared(shared(x)))
        return nn.Dense(3, name="head")(x)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def net():
    x = jax.random.normal(jax.random.key(1), (5, 4))
    return Net(), Net().init(jax.random.key(0), x), x


def test_linen_outputs_are_those_of_the_modules(net):
    module, variables, x = net
    outputs, features = jc.distill.linen_features(module.apply, r"block_\d|block_\d/dense")(
        variables, x
    )
    np.testing.assert_array_equal(outputs, module.apply(variables, x))
    assert list(features) == [
        "block_0", "block_0/dense", "block_1", "block_1#1", "block_1/dense", "block_1/dense#1",
    ]  # fmt: skip
    dense = lambda name, x: x @ variables["params"][name]["dense"]["kernel"]  # biases are zero
    y = x
    for name, key in (("block_0", "block_0"), ("block_1", "block_1"), ("block_1", "block_1#1")):
        y = dense(name, y)
        inner = key.replace(name, f"{name}/dense")
        np.testing.assert_allclose(features[inner], y, rtol=1e-5, atol=1e-6)
        y = jax.nn.relu(y)
        np.testing.assert_allclose(features[key], y, rtol=1e-5, atol=1e-6)
    _, whole = jc.distill.linen_features(module.apply, "")(variables, x)
    np.testing.assert_array_equal(whole[""], outputs)


def test_under_jit_grad_vmap_and_with_model_state(net):
    module, variables, x = net
    forward = lambda variables, x: module.apply(variables, x, train=True, mutable=["batch_stats"])
    tapped = jc.distill.linen_features(forward, "block_1/dense")
    (logits, state), features = jax.jit(tapped)(variables, x)
    expected, expected_state = forward(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, expected_state
    )

    def loss(variables):
        return jnp.sum(tapped(variables, x)[1]["block_1/dense"] ** 2)

    grads = jax.grad(loss)(variables)["params"]
    assert jnp.any(grads["block_0"]["dense"]["kernel"] != 0)
    assert not jnp.any(grads["head"]["kernel"])  # behind the tap
    plain = jc.distill.linen_features(module.apply, "block_0")
    _, mapped = jax.vmap(plain, in_axes=(None, 0))(variables, x[:, None])
    _, batch = plain(variables, x)
    np.testing.assert_allclose(mapped["block_0"][:, 0], batch["block_0"], rtol=1e-5, atol=1e-6)
    assert features.keys() == {"block_1/dense", "block_1/dense#1"}


def test_unused_features_cost_nothing(net):
    module, variables, x = net
    tapped = jc.distill.linen_features(module.apply, ".*")
    plain = jax.jit(module.apply).lower(variables, x).as_text()
    unused = jax.jit(lambda variables, x: tapped(variables, x)[0]).lower(variables, x).as_text()
    operations = lambda text: [line.split(" loc")[0] for line in text.splitlines()[1:]]
    assert operations(unused) == operations(plain)


def test_nnx_outputs_and_the_model_as_it_was():
    model, x = Pair(nnx.Rngs(0)), jnp.ones((3, 4))
    graphdef, params = nnx.split(model)
    tapped = jc.distill.nnx_features(lambda model, x: model(x), r"layers/\d")
    outputs, features = jax.jit(lambda p, x: tapped(nnx.merge(graphdef, p), x))(params, x)
    first = model.layers[0](x)
    np.testing.assert_allclose(features["layers/0"], first, rtol=1e-6)
    np.testing.assert_allclose(features["layers/1"], model.layers[1](nnx.relu(first)), rtol=1e-6)
    np.testing.assert_allclose(outputs, model(x), rtol=1e-6)
    tapped(model, x)
    assert type(model.layers[0]) is nnx.Linear and nnx.split(model)[0] == graphdef
    with pytest.raises(ValueError, match="no module; nearest: 'layers/"):
        jc.distill.nnx_features(lambda model, x: model(x), "layer")(model, x)
    assert type(model.head) is nnx.Linear


def test_bad_patterns(net):
    module, variables, x = net
    with pytest.raises(ValueError, match="not a regular expression"):
        jc.distill.linen_features(module.apply, "block_(")
    with pytest.raises(ValueError, match="nearest: 'block_"):
        jc.distill.linen_features(module.apply, "blok_0")(variables, x)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return body(Block(4, name="block"), x, None)[0]

    variables = Scanned().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="inside a scan"):
        jc.distill.linen_features(Scanned().apply, "block.*")(variables, x)


def test_a_tapped_network_trains_with_a_feature_loss(net):
    module, variables, x = net
    tapped = jc.distill.linen_features(module.apply, "block_0/dense")
    params, stats = variables["params"], variables["batch_stats"]
    forward = lambda params, stats, x: (tapped({"params": params, "batch_stats": stats}, x), stats)
    teacher = lambda params, x: tapped({"params": params, "batch_stats": stats}, x)

    def loss(outputs, labels, known, step):
        (logits, features), (_, other) = outputs, known
        del labels, step, logits
        return jc.distill.fitnets(features["block_0/dense"], other["block_0/dense"]), {}

    tx = optax.sgd(0.2, momentum=0.9)
    step = jc.train.make_step(forward, tx, recipe=jc.identity(), loss=loss, teacher=teacher)
    state = jc.train.create(params, jc.identity(), tx, model_state=stats)
    other = module.init(jax.random.key(7), x)["params"]
    losses = []
    for _ in range(30):
        state, metrics = step(state, other, (x, jnp.zeros(5, int)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0], losses
