"""What made a checkpoint, a cache or a state: another maker is refused, and named."""

import copy
import os
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distill import cached_outputs
from jaxcompress.formats import integer
from jaxcompress.graph.fingerprint import Unidentified, of_function
from jaxcompress.graph.identity import describe
from jaxcompress.train import Checkpoints, fit

IMAGES = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
LABELS = np.arange(12) % 3
SCALE = 1.0  # a global that a network reads


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return SCALE * x @ params["w"]


def run(
    *, bits=4, sparsity=0.0, rate=0.1, steps=10, temperature=2.0, momentum=0.9, seed=0, size=4,
    images=IMAGES, teacher_seed=1, start=0, forward=network, sees="params", augment=None,
    tx: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `fit`: step, state, data, and what the teacher has."""
    recipe = jc.chain(
        jc.prune.magnitude(jc.prune.cubic(0.0, sparsity, start=0, end=5)),
        jc.by_path({"w": jc.quantize.weights(integer(bits), axis=-1)}),
    )
    tx = tx or optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=momentum)
    step = jc.train.make_step(
        jc.train.stateless(forward),
        tx,
        recipe=recipe,
        loss=jc.train.hinton_loss(temperature=temperature),
        teacher=network,
        recipe_sees=sees,
    )
    weights = lambda seed: {
        "w": jnp.asarray(np.random.default_rng(seed).normal(size=(6, 3)), jnp.float32)
    }
    state = jc.train.create(weights(start), recipe, tx)
    data = jc.train.batches((images, LABELS), size=size, seed=seed, augment=augment)
    return step, state, data, weights(teacher_seed)


def trained(directory, arguments, *, steps=3, **more):
    step, state, data, teacher = arguments
    kept = Checkpoints(directory, every=1, **more)
    return fit(step, state, data, steps=steps, teacher_params=teacher, checkpoints=kept)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with jax.numpy_dtype_promotion("standard"):
        return folder, trained(folder, run())


def louder(key, batch):
    return batch[0] + 0.1 * jax.random.normal(key, batch[0].shape), batch[1]


CHANGES = {
    "sparsity": (dict(sparsity=0.9), r"schedule.final: 0.0 there, 0.9 here"),
    "bits": (dict(bits=2), r"int4 \(axis \(-1,?\), group None\) there, int2"),
    "rate": (dict(rate=0.2), r"init_value: 0.1 there, 0.2 here"),
    "length of the schedule": (dict(steps=20), r"decay_steps: 10 there, 20 here"),
    "momentum": (dict(momentum=0.8), r"decay: 0.9 there, 0.8 here"),
    "temperature": (dict(temperature=3.0), r"temperature: 2.0 there, 3.0 here"),
    "what the recipe sees": (dict(sees="gradients"), r"'params' there, 'gradients' here"),
    "seed of the data": (dict(seed=1), r"data\S*seed: 0 there, 1 here"),
    "batch": (dict(size=3), r"data\S*size: 4 there, 3 here"),
    "one image": (dict(images=IMAGES + np.eye(12, 6, -6)[::-1].astype("f4") * 0.5), "data"),
    "augmentation": (dict(augment=louder), r"louder"),
    "teacher": (dict(teacher_seed=2), r"teacher_params: \w+ there"),
    "start": (dict(start=3), r"start.params: \w+ there"),
    "code": (dict(forward=lambda p, x: x @ p["w"] * 1.0), r"forward.apply_fn: network"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_run_is_refused_and_stays_as_it_is(saved, change):
    folder, _ = saved
    different, message = CHANGES[change]
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=f"step 3 is of another.*{message}"):
        trained(folder, run(**different), steps=5)
    assert sorted(os.listdir(folder)) == before


def test_the_same_run_built_again_goes_on(saved, monkeypatch):
    folder, state = saved
    again = trained(folder, run())
    np.testing.assert_array_equal(again.params["w"], state.params["w"])
    # Its data by another function; its state from the checkpoint.
    step, fresh, data, teacher = run()
    around = lambda at: data(at)
    assert int(trained(folder, (step, again, around, teacher)).step) == 3
    assert int(trained(folder, (step, fresh, around, teacher)).step) == 3
    wrong = lambda at: data(at + 1)
    with pytest.raises(ValueError, match="data's first batch|another run: the batch of step 2"):
        trained(folder, (step, fresh, wrong, teacher))
    monkeypatch.setattr("test_identity.SCALE", 2.0)
    with pytest.raises(ValueError, match=r"SCALE: 1.0 there, 2.0 here"):
        trained(folder, run())


def test_what_cannot_be_identified_is_not_resumed_unless_it_is_named(tmp_path):
    def host(lines):
        read = lambda: np.float32(len(list(lines)))
        return lambda p, x: (
            network(p, x)
            + jax.pure_callback(
                read, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential"
            )
        )

    def arguments():
        step, state, data, teacher = run()
        tx = optax.sgd(0.1)
        opaque = host(iter([1, 2]))
        loss = lambda outputs, labels, known, step: (jnp.mean((outputs - known) ** 2), {})
        forward = jc.train.stateless(network)
        step = jc.train.make_step(forward, tx, teacher=opaque, loss=loss)
        return step, jc.train.create(state.params, jc.identity(), tx), data, teacher

    with pytest.warns(UserWarning, match="not be resumed: .*list_iterator.*about"):
        trained(tmp_path / "a", arguments(), steps=1)
    with (
        pytest.warns(UserWarning, match="not be resumed"),
        pytest.raises(ValueError, match="cannot be identified.*say what it is in Checkpoints"),
    ):
        trained(tmp_path / "a", arguments(), steps=2)
    named = {"about": {"teacher": "lines 1 and 2"}}
    trained(tmp_path / "b", arguments(), steps=1, **named)
    assert int(trained(tmp_path / "b", arguments(), steps=2, **named).step) == 2


MAKERS = {
    "weights": lambda bits: jc.quantize.weights(integer(bits), axis=-1),
    "lsq": lambda bits: jc.quantize.lsq(bits, axis=-1),
    "lsq+": lambda bits: jc.quantize.lsq_plus(bits, axis=-1),
    "ema": lambda bits: jc.quantize.ema_ranges(integer(bits), axis=-1),
    "dorefa": lambda bits: jc.quantize.dorefa(bits),
    "a2q": lambda bits: jc.quantize.a2q(bits, accumulator_bits=16, input_bits=8),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("nest", [lambda c: c, lambda c: jc.chain(jc.prune.magnitude(0.5), c),
                                  lambda c: jc.by_path({"w": c})])  # fmt: skip
def test_a_state_of_another_width_is_refused(maker, nest):
    params = {"w": jnp.asarray(IMAGES)}
    four, eight = (nest(MAKERS[maker](bits)) for bits in (4, 8))
    state = four.init(params)
    for call in (eight.apply, eight.update, eight.pack):
        with pytest.raises(ValueError, match=r"made for .*4.*stores .*8.*take the compressor"):
            call(params, state)
    renewed = jax.jit(four.update)(params, state)
    assert jax.tree.structure(renewed) == jax.tree.structure(state)
    assert jc.packed_bytes(four.pack(params, renewed)) < jc.packed_bytes(
        eight.pack(params, eight.init(params))
    )


def test_a_checkpoint_of_another_width_is_not_restored(saved):
    folder, state = saved
    kept = Checkpoints(folder, every=1)
    np.testing.assert_array_equal(jc.train.restore(kept, run()[1]).params["w"], state.params["w"])
    with pytest.raises(ValueError, match=r"int4 \(axis.*there, int2 .*here"):
        jc.train.restore(kept, run(bits=2)[1])


def offset_teacher(offset):
    """Through the host: what it adds is in no jaxpr."""
    add = lambda y: np.asarray(y) + np.float32(offset)
    return lambda p, x: jax.pure_callback(
        add, jax.ShapeDtypeStruct((len(x), 3), jnp.float32), x @ p["w"], vmap_method="sequential"
    )


def test_two_teachers_on_the_host_are_two(tmp_path):
    params = {"w": np.zeros((6, 3), np.float32)}
    found = [cached_outputs(tmp_path, offset_teacher(n), params, IMAGES)([0]) for n in (8, 12, 8)]
    assert [float(rows[0, 0]) for rows in found] == [8.0, 12.0, 8.0]
    assert cached_outputs(tmp_path, offset_teacher(12), params, IMAGES).computed == ()


def test_a_teacher_that_cannot_be_identified_is_computed_each_time(tmp_path):
    def counting(numbers):
        add = lambda y: np.asarray(y) + np.float32(next(numbers))
        return lambda p, x: jax.pure_callback(
            add, jax.ShapeDtypeStruct((len(x), 3), jnp.float32), x @ p["w"],
            vmap_method="sequential",
        )  # fmt: skip

    params = {"w": np.zeros((6, 3), np.float32)}
    with pytest.raises(Unidentified, match="pure_callback"):
        of_function(counting(iter([8])), params, IMAGES)
    for value in (8, 12):
        with pytest.warns(UserWarning, match="cannot be identified.*computed again"):
            found = cached_outputs(tmp_path, counting(iter([value])), params, IMAGES)
        assert float(found([0])[0, 0]) == value and found.computed == (0,)
    assert not list(tmp_path.glob("*.npy"))


def test_a_flipped_bit_in_the_cache_is_seen(tmp_path):
    params = {"w": np.ones((6, 3), np.float32)}
    teacher = lambda p, x: x @ p["w"]
    file = cached_outputs(tmp_path, teacher, params, IMAGES).files[0]
    whole = file.read_bytes()
    for place in (len(whole) // 2, len(whole) - 12, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="delete it to compute it again"):
            cached_outputs(tmp_path, teacher, params, IMAGES)


def test_describe_sees_numbers_arrays_and_code_but_not_places():
    def made(factor, array, code):
        holder = {"inner": [lambda x: factor * x, {"table": array}], "code": code}
        return lambda x: holder["inner"][0](x)

    one = made(0.5, np.arange(3.0), lambda x: x + 1)
    assert describe(one).rows == describe(made(0.5, np.arange(3.0), lambda x: x + 1)).rows
    others = [
        made(0.25, np.arange(3.0), lambda x: x + 1),
        made(0.5, np.arange(1.0, 4.0), lambda x: x + 1),
        made(0.5, np.arange(3.0, dtype=np.float32), lambda x: x + 1),
        made(0.5, np.arange(3.0), lambda x: x + 2),
        made(0.5, np.arange(3.0), np.sin),
    ]
    rows = [tuple(describe(f).rows.items()) for f in (one, *others)]
    assert len(set(rows)) == len(rows)
    mesh = jax.make_mesh((1,), ("data",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert not describe(placed).rows
    with open(os.devnull) as file:
        assert describe(lambda: file).unidentified


def test_a_compressor_says_why_it_cannot_be_pickled_and_the_rest_can():
    recipe = jc.quantize.weights(integer(4), axis=-1)
    with pytest.raises(TypeError, match="a Compressor cannot be pickled.*function of a module"):
        pickle.dumps(recipe)
    assert copy.deepcopy(recipe) is recipe and copy.copy(recipe) is recipe
    params = {"w": jnp.asarray(IMAGES)}
    state = recipe.init(params)
    again = pickle.loads(pickle.dumps((params, state, recipe.pack(params, state))))
    np.testing.assert_array_equal(jc.unpack(again[2])["w"], recipe.apply(params, again[1])["w"])
