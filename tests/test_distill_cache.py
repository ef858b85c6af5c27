"""The cache of a teacher's outputs: exact, keyed by all that matters, whole or absent."""

import os
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import distill
from jaxcompress.distill import cached_outputs
from jaxcompress.graph import fingerprint

pytestmark = pytest.mark.broad

INPUTS = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
PARAMS = {"w": np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)}


def teacher(params, inputs):
    return jnp.tanh(inputs @ params["w"]) * 5


def noise(key, inputs):
    return inputs + 0.1 * jax.random.normal(key, inputs.shape)


def cached(directory, fn: Any = teacher, params=PARAMS, inputs: Any = INPUTS, **more):
    return cached_outputs(directory, fn, params, inputs, batch_size=4, **more)


def test_float32_is_exact_in_any_order_and_the_second_time_nothing_is_computed(tmp_path):
    first = cached(tmp_path)
    assert first.computed == (0,)
    jitted = jax.jit(teacher)
    padded = np.concatenate([INPUTS, INPUTS[8:9]])
    live = np.concatenate([jitted(PARAMS, padded[i : i + 4]) for i in (0, 4, 8)])[:11]
    order = np.array([10, 0, 3, 3])
    np.testing.assert_array_equal(first(order), live[order])
    assert first(order).dtype == np.float32
    exact = 5 * np.tanh(INPUTS.astype(np.float64) @ PARAMS["w"].astype(np.float64))
    np.testing.assert_allclose(first(np.arange(11)), exact, rtol=1e-5, atol=1e-5)

    calls = []

    def counted(params, inputs):
        jax.debug.callback(lambda: calls.append(1))
        return teacher(params, inputs)

    again = cached(tmp_path)
    assert again.computed == () and isinstance(again._rows[0], np.memmap)
    np.testing.assert_array_equal(again(order), live[order])
    one = cached(tmp_path / "counted", counted)
    jax.effects_barrier()
    before = len(calls)
    assert before == 3 and one.computed == (0,)
    assert cached(tmp_path / "counted", counted).computed == ()
    jax.effects_barrier()
    assert len(calls) == before


def test_whatever_changes_the_outputs_is_noticed(tmp_path):
    assert cached(tmp_path).computed == (0,)
    other = {"w": PARAMS["w"].copy()}
    other["w"][2, 3] = np.nextafter(other["w"][2, 3], np.float32(9))
    row = INPUTS.copy()
    row[10, 0] += 1
    steeper = lambda p, x: jnp.tanh(x @ p["w"]) * 6
    offset = jnp.arange(7.0)[None]
    shifted = lambda p, x: teacher(p, x) + offset
    again = lambda p, x: teacher(p, x) + (offset + 1)
    recipe = jc.quantize.weights(jc.formats.integer(4), axis=-1)
    state = recipe.init({"w": jnp.asarray(PARAMS["w"])})
    quantized = lambda p: recipe.apply(p, state)
    louder = lambda k, x: noise(k, x) * 2
    changes = [
        cached(tmp_path, params=other),
        cached(tmp_path, inputs=row),
        cached(tmp_path, inputs=INPUTS[::-1]),
        cached(tmp_path, steeper),
        cached(tmp_path, shifted),
        cached(tmp_path, again),
        cached(tmp_path, view=quantized),
        cached(tmp_path, augment=noise),
        cached(tmp_path, augment=noise, seed=1),
        cached(tmp_path, augment=louder),
        cached(tmp_path, storage=distill.Dense("float16")),
        cached(tmp_path, storage=distill.TopK(2)),
    ]
    assert all(found.computed == (0,) for found in changes)
    assert len({found.files for found in changes}) == len(changes)
    view = recipe.apply({"w": jnp.asarray(PARAMS["w"])}, state)
    np.testing.assert_allclose(changes[6](np.arange(11)), teacher(view, INPUTS), rtol=1e-6)
    # The same computation under another name is the same.
    renamed = lambda weights, x: teacher(weights, x)
    assert cached(tmp_path, renamed).computed == ()


def test_outputs_of_an_epoch_are_those_of_the_inputs_the_student_sees(tmp_path):
    found = cached(tmp_path, augment=noise, seed=3, epochs=2)
    assert found.computed == (0, 1)
    order = np.array([7, 2, 9])  # another batch than the cache's
    for epoch in range(2):
        key = jax.random.key(3)
        seen = distill.augment_examples(noise, key, epoch, order, INPUTS[order])
        np.testing.assert_allclose(
            found(order, epoch=epoch), teacher(PARAMS, seen), rtol=1e-5, atol=1e-6
        )
    assert np.any(found(order, epoch=0) != found(order, epoch=1))
    assert cached(tmp_path, augment=noise, seed=3, epochs=3).computed == (2,)


def test_cached_outputs_teach_in_the_loop_as_the_live_teacher_does(tmp_path):
    labels = np.arange(11, dtype=np.int32) % 7
    found = cached(tmp_path, augment=noise, seed=3, epochs=2)
    numbered = jc.train.batches((np.arange(11, dtype=np.int32), INPUTS, labels), size=4, seed=0)

    def batch_at(step):
        numbers, inputs, target = numbered(step)
        epoch = step // numbered.steps_per_epoch % 2
        seen = distill.augment_examples(noise, jax.random.key(3), epoch, numbers, inputs)
        return {"x": seen, "teacher": found(numbers, epoch=epoch)}, target

    def trained(known):
        tx = optax.sgd(0.1)
        student = jc.train.stateless(lambda params, inputs: inputs["x"] @ params["w"])
        step = jc.train.make_step(student, tx, teacher=known)
        start = {"w": jnp.zeros((6, 7))}
        state = jc.train.create(start, jc.identity(), tx)
        return jc.train.fit(step, state, batch_at, steps=5, teacher_params=PARAMS).params["w"]

    live = trained(lambda params, inputs: teacher(params, inputs["x"]))
    np.testing.assert_allclose(
        trained(lambda params, inputs: inputs["teacher"]), live, rtol=1e-5, atol=1e-6
    )


def test_float16_rounds_once_and_refuses_what_it_cannot_hold(tmp_path):
    full = cached(tmp_path)(np.arange(11))
    half = cached(tmp_path, storage=distill.Dense("float16"))(np.arange(11))
    np.testing.assert_array_equal(half, full.astype(np.float16))
    large = lambda p, x: teacher(p, x) * 1e5
    with pytest.raises(ValueError, match="beyond float16, 65504; store float32"):
        cached(tmp_path, large, storage=distill.Dense("float16"))
    hidden = lambda p, x: teacher(p, x).at[:, 0].set(-jnp.inf).astype(jnp.bfloat16)
    kept = cached(tmp_path, hidden)(np.arange(2))
    assert np.all(np.isneginf(kept[:, 0])) and np.all(np.isfinite(kept[:, 1:]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_storage_gives_the_top_k_loss_of_the_whole_logits(tmp_path, temperature):
    full = cached(tmp_path)(np.arange(11))
    student = jnp.asarray(np.random.default_rng(5).normal(size=(11, 7)), jnp.float32)
    for k in (1, 3, 7):
        storage = distill.TopK(k, temperature=temperature)
        stored = cached(tmp_path, storage=storage)(np.arange(11))
        losses = [
            distill.top_k_kd(student, jnp.asarray(z), k=k, temperature=temperature)
            for z in (full, stored)
        ]
        np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
        best = np.argsort(-full, axis=1)[:, :k]
        np.testing.assert_array_equal(
            np.take_along_axis(stored, best, 1), np.take_along_axis(full, best, 1)
        )
    lone = np.array([[1.0, -np.inf, -np.inf]], np.float32)
    storage = distill.TopK(1)
    np.testing.assert_array_equal(storage.decode(storage.encode(lone), (3,)), lone)


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
import test_distill_cache as t
from jaxcompress.distill.teachers import output_cache as cache
compute, done = cache._batch, []
def batch(*args):
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*args)
cache._batch = batch
t.cached(sys.argv[1])
"""


def test_a_run_killed_half_way_leaves_no_file_and_the_next_one_computes_all(tmp_path):
    here = os.path.dirname(__file__)
    run = [sys.executable, "-c", KILLED, str(tmp_path), here]
    killed = subprocess.run(run, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("[!.]*"))
    found = cached(tmp_path)
    assert found.computed == (0,) and found(np.arange(11)).shape == (11, 7)

    bad = lambda p, x: jnp.where(x[:, :1] == INPUTS[9, 0], jnp.nan, teacher(p, x))
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match="output of example 9 is NaN"):
        cached(tmp_path, bad)
    assert set(tmp_path.iterdir()) == before


def test_a_damaged_file_is_refused(tmp_path):
    file = cached(tmp_path).files[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="delete it to compute it again"):
        cached(tmp_path)


def test_errors_name_the_argument(tmp_path):
    found = cached(tmp_path)
    with pytest.raises(IndexError, match="indices must be 0 to 10, got 0 to 11"):
        found([0, 11])
    with pytest.raises(IndexError, match="integers"):
        found([0.5])
    with pytest.raises(IndexError, match="epoch must be 0 to 0, got 1"):
        found([0], epoch=1)
    with pytest.raises(ValueError, match="without augment"):
        cached(tmp_path, epochs=2)
    with pytest.raises(ValueError, match="same number of examples"):
        cached(tmp_path, inputs=(INPUTS, INPUTS[:3]))
    with pytest.raises(ValueError, match="same number of examples"):
        cached(tmp_path, inputs=INPUTS[:0])
    with pytest.raises(TypeError, match="one floating point array"):
        cached(tmp_path, lambda p, x: (teacher(p, x),))
    with pytest.raises(ValueError, match=r"\[examples, ...\]"):
        cached(tmp_path, lambda p, x: teacher(p, x).sum())
    with pytest.raises(ValueError, match="k=8: outputs must be"):
        cached(tmp_path, storage=distill.TopK(8))
    with pytest.raises(ValueError, match="temperature above 0"):
        distill.TopK(1, temperature=0.0)
    with pytest.raises(ValueError, match='"float32" or "float16"'):
        distill.Dense("int8")


def test_the_fingerprint_of_a_function_is_that_of_another_process():
    code = (
        "import jax.numpy as jnp, jax, numpy as np\n"
        "from jaxcompress.graph import fingerprint as f\n"
        "print(f.of_function(lambda x: jax.nn.relu(x) @ jnp.eye(3), np.ones((2, 3), 'f4')))"
    )
    own = fingerprint.of_function(
        lambda x: jax.nn.relu(x) @ jnp.eye(3), np.ones((2, 3), np.float32)
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == own
