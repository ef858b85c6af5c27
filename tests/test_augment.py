"""Batches and augmentation: functions of (seed, step), compared with NumPy written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.train import augment

pytestmark = pytest.mark.broad


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def along():
    return jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec("data"))


def pictures(n=16, dtype=np.float32):
    return np.random.default_rng(0).integers(1, 9, (n, 5, 6, 2)).astype(dtype)


def test_every_epoch_has_every_example_once_in_another_order_and_any_step_is_reached_at_once():
    data = {"x": np.arange(20.0, dtype=np.float32).reshape(10, 2), "y": np.arange(10)}
    at = jc.train.batches(data, size=5, seed=3)
    assert at.steps_per_epoch == 2
    epochs = [np.concatenate([at(2 * e)["y"], at(2 * e + 1)["y"]]) for e in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(10))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    fresh = jc.train.batches(data, size=5, seed=3)(5)
    np.testing.assert_array_equal(fresh["y"], at(5)["y"])
    np.testing.assert_array_equal(fresh["x"], data["x"][np.asarray(fresh["y"])])
    other = jc.train.batches(data, size=5, seed=4)
    assert not np.array_equal(np.concatenate([other(0)["y"], other(1)["y"]]), epochs[0])


def test_orders_are_uniform():
    at = jc.train.batches(np.arange(4), size=4, seed=0)
    counts = np.zeros((4, 4))
    epochs = 400
    for epoch in range(epochs):
        counts[np.arange(4), np.asarray(at(epoch))] += 1
    # Binomial(400, 1/4): mean 100, standard deviation 8.7.
    assert np.abs(counts - epochs / 4).max() < 4 * np.sqrt(epochs * 3 / 16)


def test_augmented_batches_depend_on_seed_and_step_alone_and_not_on_the_devices():
    images, labels = pictures(), np.arange(16)
    change = augment.on_inputs(lambda k, x: augment.random_crop(k, x, padding=1))
    single = jc.train.batches((images, labels), size=8, seed=1, augment=change)
    spread = jc.train.batches((images, labels), size=8, seed=1, augment=change, sharding=along())
    for at in (single, spread):
        at(0)
    with jax.transfer_guard("disallow"):
        one, many = single(5), spread(5)
    assert many[1].sharding.is_equivalent_to(along(), 1)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)
    key = jc.train.key_at(jax.random.key(1), "augment", 5)
    plain = jc.train.batches((images, labels), size=8, seed=1)(5)
    np.testing.assert_array_equal(one[0], change(key, plain)[0])
    again, later = single(5)[0], single(6)[0]
    np.testing.assert_array_equal(one[0], again)
    assert not np.array_equal(one[0], later)


@pytest.mark.parametrize(
    "data, size, sharding, message",
    [
        ({}, 2, None, "data holds no arrays"),
        ({"x": np.ones(3), "n": np.ones(())}, 2, None, "data: n is a scalar"),
        ({"x": np.ones(3), "y": np.ones(4)}, 2, None, "x has 3 examples, y has 4"),
        (np.ones(3), 4, None, "size must be 1 to 3, the number of examples, got 4"),
        (np.ones(3), 0, None, "size must be 1 to 3"),
        (np.ones(30), 12, "data", "size=12 does not divide over the devices"),
    ],
)
def test_bad_data_is_refused_before_training(data, size, sharding, message):
    with pytest.raises(ValueError, match=message):
        jc.train.batches(data, size=size, seed=0, sharding=along() if sharding else None)


def test_key_streams_do_not_meet():
    root = jax.random.key(0)
    keys = [
        jax.random.key_data(jc.train.key_at(root, name, step)).tolist()
        for name in ("augment", "dropout")
        for step in (0, 1)
    ]
    assert len({tuple(key) for key in keys}) == 4
    inside = jax.jit(lambda step: jc.train.key_at(root, "dropout", step))(jnp.uint32(1))
    assert jax.random.key_data(inside).tolist() == keys[3]


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, jnp.bfloat16])
def test_crops_are_windows_of_the_padded_image(dtype):
    images = pictures(dtype=dtype)
    out = np.asarray(augment.random_crop(jax.random.key(0), jnp.asarray(images), padding=2))
    assert out.dtype == images.dtype and out.shape == images.shape
    offsets = np.asarray(jax.random.randint(jax.random.key(0), (16, 2), 0, 5))
    assert set(offsets.ravel().tolist()) == {0, 1, 2, 3, 4}
    for image, window, (i, j) in zip(images, out, offsets, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        np.testing.assert_array_equal(window, padded[i : i + 5, j : j + 6])


def test_flips_mirror_half_of_the_images():
    images = pictures(256)
    out = np.asarray(augment.random_flip(jax.random.key(0), jnp.asarray(images)))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert ((out == images).all((1, 2, 3)) | mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 16  # four standard deviations


def test_mixup_is_its_equation_and_alpha_is_traced():
    images, labels = pictures(), np.arange(16) % 3
    mix: Any = jax.jit(
        lambda key, x, y, alpha: augment.mixup(key, x, y, alpha=alpha, num_classes=3)
    )
    x, y = mix(jax.random.key(0), images, labels, jnp.float32(0.4))
    hot = np.eye(3)[labels]
    t = np.asarray(jax.random.beta(jax.random.key(0), 0.4, 0.4, (16,)), np.float64)
    assert t.min() < 0.1 and t.max() > 0.9
    partner = (np.arange(16) - 1) % 16
    w = t[:, None, None, None]
    np.testing.assert_allclose(x, w * images + (1 - w) * images[partner], rtol=1e-6)
    expected = t[:, None] * hot + (1 - t[:, None]) * hot[partner]
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    same, hard = mix(jax.random.key(0), images, labels, jnp.float32(0.0))
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(hard, hot)
    assert mix._cache_size() == 1
    halves, soft = mix(jax.random.key(0), images.astype(jnp.bfloat16), y, jnp.float32(0.4))
    assert halves.dtype == jnp.bfloat16 and soft.dtype == jnp.float32
    np.testing.assert_allclose(soft.sum(-1), np.ones(16), rtol=1e-6)
    logits = np.random.default_rng(1).normal(size=(16, 3))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        jc.train.cross_entropy(jnp.asarray(logits, jnp.float32), y),
        -(expected * log_p).sum(-1).mean(),
        rtol=1e-6,
    )


def test_what_augmentation_refuses():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"random_crop: images must be \[B, H, W, C\], got .*8, 8"):
        augment.random_crop(key, jnp.ones((8, 8, 3)), padding=1)
    with pytest.raises(ValueError, match=r"random_flip: images must be \[B, H, W, C\]"):
        augment.random_flip(key, jnp.ones((8, 8)))
    with pytest.raises(ValueError, match="padding must be at least 0 pixels, got -1"):
        augment.random_crop(key, jnp.ones((1, 8, 8, 3)), padding=-1)
    with pytest.raises(TypeError, match="mixup: inputs must be floating point, got uint8"):
        augment.mixup(key, jnp.ones((2, 3), jnp.uint8), jnp.arange(2), alpha=1.0, num_classes=2)


def test_empty_batches_stay_empty():
    images = jnp.ones((0, 4, 4, 1))
    assert augment.random_flip(jax.random.key(0), images).shape == images.shape
    assert augment.random_crop(jax.random.key(0), images, padding=1).shape == images.shape
    x, y = augment.mixup(
        jax.random.key(0), images, jnp.zeros(0, jnp.int32), alpha=1.0, num_classes=2
    )
    assert x.shape == images.shape and y.shape == (0, 2)
