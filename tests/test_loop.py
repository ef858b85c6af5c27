"""The loop: log, evaluation, checkpoints, exact resume, errors, one compile, no transfers."""

import json
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.train import Checkpoints, augment, fit
from jaxcompress.train.train_checkpoint import opened


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    x = x.reshape(len(x), -1)
    return jax.nn.relu(x @ params["hidden"]) @ params["head"]


def params_of(width, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (16, width), "head": (width, 4)}
    return {k: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def everything():
    """Pruning by a schedule, quantized weights and activations, a teacher, accumulation, EMA."""
    schedule = jc.prune.cubic(0.0, 0.6, start=1, end=6)
    recipe = jc.chain(
        jc.prune.magnitude(schedule, scope="global"),
        jc.by_path({".*": jc.quantize.weights(jc.formats.integer(8), axis=-1)}),
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 12))
    tx = jc.prune.masked_optimizer(optax.MultiSteps(optimizer, 2))  # type: ignore
    act = jc.quantize.activations(network, jc.formats.integer(8, symmetric=False))
    images = np.random.default_rng(1).normal(size=(64, 4, 4, 1)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 4, 64)
    step = jc.train.make_step(
        jc.train.stateless(network),
        tx,
        recipe=recipe,
        loss=jc.train.hinton_loss(
            temperature=optax.linear_schedule(6.0, 2.0, 12),
            kd_weight=optax.linear_schedule(0.5, 0.9, 12),
            ce_weight=optax.linear_schedule(0.5, 0.1, 12),
        ),
        teacher=network,
        activations=act,
        ema_decay=0.9,
    )
    statistics = act.init(params_of(8), images[:8])

    def state():
        return jc.train.create(params_of(8), recipe, tx, activations=statistics, with_ema=True)

    data = jc.train.batches(
        (images, labels),
        size=16,
        seed=0,
        augment=augment.on_inputs(lambda k, x: augment.random_crop(k, x, padding=1)),
    )
    return step, state, data, params_of(32, seed=5)


@pytest.fixture(scope="module")
def composed():
    with jax.numpy_dtype_promotion("standard"):
        return everything()


def linear(learning_rate=0.1, optimizer=optax.sgd):
    """The cheapest step there is: one matrix."""
    tx = optimizer(learning_rate)
    step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p["w"]), tx)
    data = (np.eye(6, 3, dtype=np.float32), np.arange(6) % 2)
    state = lambda: jc.train.create({"w": jnp.zeros((3, 2))}, jc.identity(), tx)
    return step, state, jc.train.batches(data, size=2, seed=0)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(composed, tmp_path):
    step, state, data, teacher = composed
    accuracy = lambda state: {"accuracy": (network(state.ema, data(0)[0]).argmax(-1) == 1).mean()}

    def run(name, batch_at=data):
        return fit(
            step,
            state(),
            batch_at,
            steps=12,
            teacher_params=teacher,
            log=tmp_path / f"{name}.jsonl",
            fetch_every=3,
            evaluate=accuracy,
            evaluate_every=4,
            checkpoints=Checkpoints(tmp_path / name, every=5, about={"seed": 0}),
        )

    whole = run("whole")
    assert step._cache_size() == 1
    rows = jc.train.read_log(tmp_path / "whole.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in rows if "eval_accuracy" in r] == [4, 8, 12]

    def ends(step):
        if step == 8:
            raise KeyboardInterrupt
        return data(step)

    # Rows behind the checkpoint of step 5, one of them torn, as a killed process leaves them.
    with pytest.raises(KeyboardInterrupt):
        run("pieces", ends)
    log = tmp_path / "pieces.jsonl"
    assert [row["step"] for row in jc.train.read_log(log)] == [1, 2, 3, 4, 4, 5, 6]
    with log.open("ab") as file:
        file.write(b'{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    pieces = run("pieces")
    same(whole, pieces)
    assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path / "pieces")) == ["10", "12"]
    found = jc.train.restore(Checkpoints(tmp_path / "pieces", about={"seed": 0}), state())
    same(found, whole)
    # A finished run that is started again does nothing.
    same(run("pieces"), whole)
    assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_loop_compiles_the_step_once_and_transfers_nothing_in_secret(composed, tmp_path):
    step, state, data, teacher = composed
    compiled = []
    fit(step, state(), data, steps=2, teacher_params=teacher, log=tmp_path / "log")
    begun = state()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            compiled.append(event) if "backend_compile" in event else None
        )
    )
    with jax.transfer_guard("disallow"):
        done = fit(
            step,
            begun,
            data,
            steps=9,
            teacher_params=teacher,
            log=tmp_path / "log",
            checkpoints=Checkpoints(tmp_path / "saved", every=4),
        )
    # Temperature, loss weights, sparsity, masks and learning rate changed; only the check of the
    # state is new.
    assert len(compiled) <= 1 and step._cache_size() == 1 and int(done.step) == 9


def test_one_program_trains_at_any_number_of_bits():
    _, _, data = linear()
    tx, start = optax.sgd(0.1), {"w": params_of(2)["head"].reshape(4, 2)[:3]}
    batch = data(0)

    def trained(bits):
        recipe = jc.quantize.weights(jc.formats.integer(bits), axis=-1)
        step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p["w"]), tx, recipe=recipe)
        state, _ = step(jc.train.create(start, recipe, tx), (), batch)
        return recipe.apply(state.params, recipe.update(state.params, state.compress))["w"]

    any_bits: Any = jax.jit(trained)
    for bits in (2, 4, 8):
        np.testing.assert_allclose(any_bits(jnp.int32(bits)), trained(bits), rtol=1e-6)
    assert any_bits._cache_size() == 1


def test_accumulated_gradients_are_those_of_the_large_batch():
    step, state, _ = linear(optimizer=lambda rate: optax.MultiSteps(optax.sgd(rate), 2))
    whole, big_state, _ = linear()
    x, y = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 2
    halves = lambda n: (x[4 * (n % 2) :][:4], y[4 * (n % 2) :][:4])
    small = fit(step, state(), halves, steps=6)
    large = fit(whole, big_state(), lambda _: (x, y), steps=3)
    np.testing.assert_allclose(small.params["w"], large.params["w"], rtol=1e-5, atol=1e-7)


def test_the_average_of_the_params():
    tx = optax.sgd(0.1)
    step = jc.train.make_step(jc.train.stateless(lambda p, x: x @ p["w"]), tx, ema_decay=0.5)
    state = jc.train.create({"w": jnp.zeros((3, 2))}, jc.identity(), tx, with_ema=True)
    _, _, data = linear()
    seen = []
    record = lambda state: seen.append(np.asarray(state.params["w"], np.float64)) or {}
    done = fit(step, state, data, steps=4, evaluate=record, evaluate_every=1)
    expected = np.zeros((3, 2))
    for w in seen:
        expected = 0.5 * expected + 0.5 * w
    np.testing.assert_allclose(done.ema["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_training_stops_at_nan_and_keeps_the_last_good_checkpoint(bad, tmp_path):
    step, state, data = linear()

    def poisoned(n):
        x, y = data(n)
        return x + (np.float32(bad) if n == 6 else np.float32(0)), y

    settings = Checkpoints(tmp_path / "saved", every=2)
    log = tmp_path / "log.jsonl"
    with pytest.raises(FloatingPointError) as error:
        fit(step, state(), poisoned, steps=20, log=log, checkpoints=settings)
    message = (
        f"step 7: cross_entropy is nan; the last good checkpoint is step 6 in {tmp_path / 'saved'}"
    )
    assert str(error.value) == message
    assert [row["step"] for row in jc.train.read_log(log)] == [1, 2, 3, 4, 5, 6]
    good = jc.train.restore(settings, state())
    same(good, fit(*linear()[:1], state(), data, steps=6))
    with pytest.raises(FloatingPointError, match="^step 7: .* is nan; no checkpoint is kept"):
        fit(step, state(), poisoned, steps=20)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    # The loss is finite, its gradient is not.
    step, state, data = linear(learning_rate=np.inf)
    settings = Checkpoints(tmp_path / "saved", every=1)
    with pytest.raises(FloatingPointError, match="^step 1: params/w of the state is not finite"):
        fit(step, state(), data, steps=3, checkpoints=settings)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step None; there: \[\]"):
        jc.train.restore(settings, state())


def test_an_evaluation_that_is_not_finite_stops_too(tmp_path):
    step, state, data = linear()
    with pytest.raises(FloatingPointError, match="step 2: eval_error is inf"):
        fit(step, state(), data, steps=4, evaluate=lambda s: {"error": 1e999}, evaluate_every=2)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    step, state, data = linear()
    settings = Checkpoints(tmp_path, about={"seed": 0, "widths": (1, 2)})
    fit(step, state(), data, steps=2, checkpoints=settings)
    fit(step, state(), data, steps=2, checkpoints=settings)

    def resume(state, about=settings.about):
        fit(step, state, data, steps=3, checkpoints=Checkpoints(tmp_path, about=about))

    place = f"checkpoint {tmp_path}, step 2 is of another "
    with pytest.raises(ValueError, match=f"{place}run: seed was 0, is 1"):
        resume(state(), {"seed": 1, "widths": [1, 2]})
    with pytest.raises(ValueError, match="run: widths was .*, is None"):
        resume(state(), {"seed": 0})
    adam = jc.train.create({"w": jnp.zeros((3, 2))}, jc.identity(), optax.adam(0.1))
    with pytest.raises(ValueError, match="it lacks opt/0/count, opt/0/mu/params/w, opt/0/nu"):
        resume(adam)
    recipe = jc.prune.magnitude(0.5)
    masked = jc.train.create({"w": jnp.zeros((3, 2))}, recipe, optax.sgd(0.1))
    with pytest.raises(ValueError, match="recipe, optimizer or network: it lacks compress/buffers"):
        resume(masked)
    wide = jc.train.create({"w": jnp.zeros((3, 4))}, jc.identity(), optax.sgd(0.1))
    message = r"differ: params/w \(float32\[3, 2\] there, float32\[3, 4\] here\)"
    with pytest.raises(ValueError, match=message):
        resume(wide)
    named = jc.train.create({"v": jnp.zeros((3, 2))}, jc.identity(), optax.sgd(0.1))
    with pytest.raises(ValueError, match="it lacks params/v; it has params/w"):
        resume(named)


def test_every_kind_of_leaf_comes_back(tmp_path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    tree = {
        "split": jax.device_put(jnp.arange(16.0), split),
        "half": jnp.ones((2, 1), jnp.bfloat16),
        "codes": jnp.arange(-3, 3, dtype=jnp.int4),
        "mask": jnp.array(True),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(3),
        "a/b": {"": jnp.full((), -jnp.inf)},
        "a": {"b/": jnp.zeros((), jnp.uint8)},
    }
    settings = Checkpoints(tmp_path)
    with opened(settings) as saver:
        saver.save(1, tree)
    like = jax.tree.map(lambda x: x if x.dtype == tree["key"].dtype else x + x, tree)
    found: Any = jc.train.restore(settings, like)
    assert found.pop("key") == tree.pop("key")
    same(found, tree)
    assert found["split"].sharding == split and not found["half"].committed


def test_progress_sees_every_step(composed, capsys, monkeypatch):
    step, state, data = linear()
    seen = []
    fit(
        step,
        state(),
        data,
        steps=3,
        progress=lambda steps: map(lambda n: seen.append(n) or n, steps),
    )
    assert seen == [1, 2, 3]
    fit(step, state(), data, steps=2, progress=jc.train.progress_bar("a bar"))
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(
        ImportError, match=r"needs rich: pip install \"jaxcompress\[experiments\]\""
    ):
        jc.train.progress_bar()


def test_rows_between_are_left_out_but_checked(tmp_path):
    step, state, data = linear()
    log = tmp_path / "deep" / "log.jsonl"
    fit(step, state(), data, steps=7, log=log, log_every=3)
    assert [row["step"] for row in jc.train.read_log(log)] == [3, 6]
    lines = log.read_text().splitlines()
    assert list(json.loads(lines[0])) == ["step", "cross_entropy", "loss"]


@pytest.mark.parametrize(
    "text", ["important notes\n", '{"loss": 1}\n', "[1]\n", '{"step": 1}\nx\n']
)
def test_a_file_that_is_no_log_is_not_overwritten(text, tmp_path):
    step, state, data = linear()
    log = tmp_path / "log"
    log.write_text(text)
    with pytest.raises(ValueError, match="line [12] is no row of a log of fit"):
        fit(step, state(), data, steps=1, log=log)
    assert log.read_text() == text


def test_what_the_loop_refuses(tmp_path):
    step, state, data = linear()
    for name in ("log_every", "fetch_every", "evaluate_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            fit(step, state(), data, steps=1, **{name: 0})  # type: ignore
    with pytest.raises(ValueError, match="must be at least 1, got every=0, keep=2"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="about must be JSON: "):
        Checkpoints(tmp_path, about={"x": object()})
    with pytest.raises(ValueError, match=r"metric 'eval_x' must be a scalar, got shape \[2\]"):
        fit(step, state(), data, steps=1, evaluate=lambda s: {"x": np.ones(2)})
    with pytest.raises(FileNotFoundError, match="no checkpoints: .*nowhere does not exist"):
        jc.train.restore(Checkpoints(tmp_path / "nowhere"), state())
    assert fit(step, state(), data, steps=0).step == 0
