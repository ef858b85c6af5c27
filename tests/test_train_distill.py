"""Losses with a state of their own in the train step: projectors, memories, temperatures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import distill
from jaxcompress.core import CompressState

EXAMPLES, BATCH = 12, 6


def student(params, x):
    hidden = jax.nn.relu(x @ params["hidden"])
    return {"logits": hidden @ params["head"], "feature": hidden}


@pytest.fixture(scope="module")
def setup():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"hidden": array(5, 4), "head": array(4, 3)}
    teacher = {"hidden": array(5, 7), "head": array(7, 3)}
    x, labels = array(EXAMPLES, 5), jnp.asarray(rng.integers(0, 3, EXAMPLES), jnp.int32)
    return params, teacher, x, labels


def test_projector_temperature_and_memory_are_trained_and_kept(setup):
    params, teacher, x, labels = setup
    projector = distill.linear_projector(7)
    shapes = [jax.ShapeDtypeStruct((BATCH, width), jnp.float32) for width in (4, 7)]
    projections, memory = distill.crd_init(jax.random.key(1), *shapes, examples=EXAMPLES, width=3)
    learned = {
        "projector": projector.init(jax.random.key(0), shapes[0]),
        "theta": jnp.zeros(()),
        "crd": projections,
    }

    def loss(outputs, labels, known, step, *, distill: CompressState):
        classes, indices = labels
        negatives = jc.distill.crd_negatives(jax.random.key(2), indices, classes_of_all, count=4)
        own = distill.learned
        temperature = jc.distill.ctkd_temperature(own["theta"], weight=1.0)
        soft = jc.distill.kd(outputs["logits"], known["logits"], temperature=temperature)
        hint = jc.distill.fitnets(
            projector.apply(own["projector"], outputs["feature"]), known["feature"]
        )
        contrast, memory = jc.distill.crd(
            outputs["feature"], known["feature"], indices, negatives, own["crd"], distill.buffers
        )
        total = jc.train.cross_entropy(outputs["logits"], classes) + soft + hint + contrast
        return total, {"hint": hint, "temperature": temperature}, memory

    classes_of_all = labels
    tx = optax.sgd(0.05)
    state = jc.train.create(params, jc.identity(), tx, distill=CompressState(learned, memory))
    step = jc.train.make_step(jc.train.stateless(student), tx, teacher=student, loss=loss)
    indices = jnp.arange(BATCH)
    hints, temperatures = [], []
    for _ in range(20):
        state, metrics = step(state, teacher, (x[:BATCH], (labels[:BATCH], indices)))
        hints.append(float(metrics["hint"]))
        temperatures.append(float(metrics["temperature"]))
    assert hints[-1] < 0.8 * hints[0]
    # the gradient of theta is reversed: it moves towards the harder, larger loss
    assert temperatures[0] == 11.0 != temperatures[-1]
    new = state.distill.buffers
    assert bool(new.ready)
    assert (np.asarray(new.student[:BATCH]) != np.asarray(memory.student[:BATCH])).any(1).all()
    np.testing.assert_array_equal(new.student[BATCH:], memory.student[BATCH:])
    labelled = jc.train.label_learned(state.trainable)
    assert set(jax.tree.leaves(labelled.distill)) == {"params"}


def test_the_first_update_of_a_projector_is_that_of_its_gradient(setup):
    params, teacher, x, labels = setup
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(4, 7)), jnp.float32)

    def loss(outputs, labels, known, step, distill):
        error = outputs["feature"] @ distill.learned - known["feature"]
        return jnp.mean(jnp.square(error)), {}, distill.buffers + 1

    tx = optax.sgd(0.1)
    start = CompressState(kernel, jnp.int32(0))
    state = jc.train.create(params, jc.identity(), tx, distill=start)
    step = jc.train.make_step(jc.train.stateless(student), tx, teacher=student, loss=loss)
    state, _ = step(state, teacher, (x, labels))
    f64 = lambda a: np.asarray(a, np.float64)
    relu = lambda tree: np.maximum(f64(x) @ f64(tree["hidden"]), 0)
    own, known = relu(params), relu(teacher)
    gradient = 2 * own.T @ (own @ f64(kernel) - known) / known.size
    np.testing.assert_allclose(state.distill.learned, kernel - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert int(state.distill.buffers) == 1


def test_a_stateful_loss_needs_its_state(setup):
    params, _, x, labels = setup
    tx = optax.sgd(0.1)
    loss = lambda outputs, labels, known, step, distill: (outputs["logits"].sum(), {}, ())
    step = jc.train.make_step(jc.train.stateless(student), tx, loss=loss)
    with pytest.raises(ValueError, match="the loss is stateful.*distill=core.CompressState"):
        step(jc.train.create(params, jc.identity(), tx), (), (x, labels))
