"""Ensembles, moving averages, generations, assistants and peers, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import distill, train

pytestmark = pytest.mark.broad


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def members(seed=0):
    return np.random.default_rng(seed).normal(size=(3, 4, 5)) * 3


def linear(params, inputs):
    return inputs @ params["w"]


def weights(seed, scale=1.0):
    drawn = np.random.default_rng(seed).normal(size=(6, 5)) * scale
    return {"w": jnp.asarray(drawn, jnp.float32)}


def batch():
    rng = np.random.default_rng(9)
    return jnp.asarray(rng.normal(size=(8, 6)), jnp.float32), jnp.arange(8) % 5


def test_averaging_rules_equal_float64():
    z = members()
    given = jnp.asarray(z, jnp.float32)
    np.testing.assert_allclose(distill.average_logits(given), z.mean(0), rtol=1e-5, atol=1e-6)
    for t in (1.0, 4.0):
        mean = np.exp(log_softmax(z / t)).mean(0)
        found = distill.average_probabilities(given, temperature=t)
        np.testing.assert_allclose(found, t * np.log(mean), rtol=1e-5, atol=1e-6)
    product = np.exp(log_softmax(z)).prod(0)
    expected = np.log(product / product.sum(-1, keepdims=True))
    np.testing.assert_allclose(distill.product_of_experts(given), expected, rtol=1e-5, atol=1e-5)
    # The normalized geometric mean is the softmax of the mean logits.
    geometric = log_softmax(log_softmax(z).mean(0))
    np.testing.assert_allclose(log_softmax(distill.average_logits(given)), geometric, atol=1e-5)


def test_the_gradient_to_mean_probabilities_is_the_mean_of_gradients_and_kl_is_below():
    z = jnp.asarray(members(1), jnp.float32)
    student = jnp.asarray(members(2)[0], jnp.float32)
    loss = jax.value_and_grad(lambda s, t: distill.kd(s, t, temperature=2.0))
    joint, grad = loss(student, distill.average_probabilities(z, temperature=2.0))
    each, grads = jax.vmap(loss, in_axes=(None, 0))(student, z)
    np.testing.assert_allclose(grad, jnp.mean(grads, axis=0), atol=2e-6)
    assert float(joint) < float(jnp.mean(each))


@pytest.mark.parametrize(
    "rule", [distill.average_logits, distill.average_probabilities, distill.product_of_experts]
)
def test_rules_on_degenerate_logits_give_finite_losses(rule):
    for dtype in (jnp.float32, jnp.bfloat16):
        masked = jnp.array([[[1.0, 2.0, -jnp.inf]], [[400.0, -400.0, -jnp.inf]]], dtype)
        found = rule(masked)
        assert found.dtype == jnp.float32 and found.shape == (1, 3)
        value, grad = jax.value_and_grad(distill.kd)(jnp.zeros((1, 3)), found)
        assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(grad)))
        np.testing.assert_allclose(jax.nn.softmax(found)[0, 2], 0.0, atol=1e-30)
    same = jnp.ones((2, 1, 3))
    np.testing.assert_allclose(jax.nn.softmax(rule(same)), 1 / 3, rtol=1e-6)


def test_a_stacked_ensemble_teaches_through_the_train_step_like_separate_networks():
    inputs, labels = batch()
    params = [weights(seed) for seed in range(3)]
    stacked = distill.stack_members(*params)
    rule = distill.average_probabilities
    teacher = distill.ensemble(linear, combine=rule)
    separate = distill.ensemble_of(linear, linear, linear, combine=rule)
    np.testing.assert_allclose(
        teacher(stacked, inputs), separate(params, inputs), rtol=1e-5, atol=1e-5
    )
    tx = optax.sgd(0.1)
    step = train.make_step(train.stateless(linear), tx, teacher=teacher)
    state = train.create(weights(7), jc.identity(), tx)
    state, metrics = step(state, stacked, (inputs, labels))
    z = np.stack([np.asarray(inputs, np.float64) @ np.asarray(p["w"], np.float64) for p in params])
    mean = np.log(np.exp(log_softmax(z)).mean(0))
    lt = log_softmax(mean / 4)
    ls = log_softmax(np.asarray(inputs, np.float64) @ np.asarray(weights(7)["w"], np.float64) / 4)
    expected = 16 * (np.exp(lt) * (lt - ls)).sum(-1).mean()
    np.testing.assert_allclose(metrics["kd"], expected, rtol=1e-5)


def test_the_mean_teacher_is_the_average_of_the_steps_before():
    inputs, labels = batch()
    tx = optax.sgd(0.5)
    inner = train.make_step(train.stateless(linear), tx, teacher=linear, ema_decay=0.75)
    step = distill.mean_teacher(inner)
    state = train.create(weights(0), jc.identity(), tx, with_ema=True)
    average = np.asarray(state.ema["w"], np.float64)
    for _ in range(3):
        before = np.asarray(state.params["w"], np.float64)
        x = np.asarray(inputs, np.float64)
        lt, ls = log_softmax(x @ average / 4), log_softmax(x @ before / 4)
        state, metrics = step(state, (), (inputs, labels))
        expected = 16 * (np.exp(lt) * (lt - ls)).sum(-1).mean()
        np.testing.assert_allclose(metrics["kd"], expected, rtol=1e-4, atol=1e-6)
        average = 0.75 * average + 0.25 * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5, atol=1e-6)
    assert inner._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(ValueError, match=r"pass \(\) as teacher_params"):
        step(state, weights(1), (inputs, labels))
    with pytest.raises(ValueError, match="with_ema=True"):
        step(train.create(weights(0), jc.identity(), tx), (), (inputs, labels))


def test_mutual_kd_equals_float64_and_peers_get_no_gradient():
    z = members(3)
    given = jnp.asarray(z, jnp.float32)
    log_p = log_softmax(z / 2)
    kl = lambda t, s: 4 * (np.exp(t) * (t - s)).sum(-1).mean()
    expected = [sum(kl(log_p[j], log_p[i]) for j in range(3) if j != i) / 2 for i in range(3)]
    np.testing.assert_allclose(distill.mutual_kd(given, temperature=2.0), expected, rtol=1e-5)
    jacobian = jax.jacobian(distill.mutual_kd)(given)
    for i in range(3):
        for j in range(3):
            assert (i == j) == bool(np.any(np.asarray(jacobian[i, j])))
    swapped = distill.mutual_kd(given[::-1])[::-1]
    np.testing.assert_allclose(swapped, distill.mutual_kd(given), rtol=1e-6)


def test_students_of_one_step_move_as_each_would_with_its_peers_held():
    inputs, labels = batch()
    tx = optax.sgd(0.1)
    params = weights(1), weights(2)
    loss = distill.mutual_loss(train.cross_entropy, kd_weight=optax.constant_schedule(0.5))
    stacked = train.make_step(distill.stacked_students(train.stateless(linear)), tx, loss=loss)
    state, metrics = stacked(
        train.create(distill.stack_members(*params), jc.identity(), tx), (), (inputs, labels)
    )
    x, y = np.asarray(inputs, np.float64), np.eye(5)[np.asarray(labels)]
    p = [np.exp(log_softmax(x @ np.asarray(w["w"], np.float64))) for w in params]
    for i in range(2):
        gradient = x.T @ (p[i] - y + 0.5 * (p[i] - p[1 - i])) / 8
        moved = np.asarray(params[i]["w"], np.float64) - 0.1 * gradient
        np.testing.assert_allclose(state.params["w"][i], moved, rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"loss", "task", "mutual_kd"}
    forward = train.stateless(linear)
    step = train.make_step(distill.joint_students(forward, forward), tx, loss=loss)
    joint, again = step(train.create(params, jc.identity(), tx), (), (inputs, labels))
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-6)
    for i in range(2):
        np.testing.assert_allclose(joint.params[i]["w"], state.params["w"][i], rtol=1e-6, atol=1e-7)


def test_generations_and_assistants_hand_the_last_network_on():
    seen = []

    def generation(number, teacher):
        seen.append(teacher)
        return weights(number)

    found = distill.born_again(generation, generations=3)
    assert seen[0] is None and seen[1] is found[0] and seen[2] is found[1]
    assert distill.stack_members(*found)["w"].shape == (3, 6, 5)
    big = distill.Teacher(linear, weights(0))
    shrink = lambda teacher: distill.Teacher(teacher.apply, {"w": teacher.params["w"] / 2})
    middle, student = distill.teacher_assistants(big, shrink, shrink)
    np.testing.assert_array_equal(middle.params["w"], big.params["w"] / 2)
    np.testing.assert_array_equal(student.params["w"], big.params["w"] / 4)


def test_errors_name_the_argument_and_the_path():
    z = jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="w: float32.2, 5. in member 1"):
        distill.stack_members({"w": jnp.ones((3, 5))}, {"w": jnp.ones((2, 5))})
    with pytest.raises(ValueError, match="member 1 has other leaves"):
        distill.stack_members({"w": z}, {"v": z})
    with pytest.raises(ValueError, match="one member at least"):
        distill.stack_members()
    with pytest.raises(ValueError, match=r"\[members, ..., classes\]"):
        distill.average_logits(jnp.zeros(5))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distill.average_probabilities(z, temperature=0.0)
    with pytest.raises(ValueError, match="one teacher at least"):
        distill.ensemble_of()
    with pytest.raises(ValueError, match="2 members for 1 teachers"):
        distill.ensemble_of(linear)((weights(0), weights(1)), z)
    narrow = lambda params, inputs: inputs @ params["w"][:, :2]
    with pytest.raises(ValueError, match="one shape"):
        distill.ensemble_of(linear, narrow)((weights(0), weights(1)), jnp.ones((2, 6)))
    with pytest.raises(ValueError, match="students >= 2"):
        distill.mutual_kd(z[:1])
    with pytest.raises(ValueError, match="two students or more"):
        distill.joint_students(linear)
    with pytest.raises(ValueError, match="generations must be at least 1"):
        distill.born_again(lambda g, t: t, generations=0)
    with pytest.raises(ValueError, match="one trainer at least"):
        distill.teacher_assistants(distill.Teacher(linear, ()))
    with pytest.raises(TypeError, match="trainer 0 must return Teacher"):
        wrong = lambda teacher: teacher.params
        distill.teacher_assistants(distill.Teacher(linear, ()), wrong)  # pyright: ignore
