"""The published networks: their counts against the printed ones, and MLPerf Tiny's in inference."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import count as count_experiment
from experiments._report import run
from experiments.models.published import Figure, printed
from experiments.models.zoo import ZOO, DeepResNetCifar, Network

pytestmark = pytest.mark.broad

TINY_OUTPUTS = {"resnet8": 10, "ds_cnn": 12, "mobilenet_v1_025": 2, "autoencoder": 640}


def random_variables(network: Network, seed: int = 0):
    """Kernels that keep the size of activations, everything else in [0.5, 1.5]."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return rng.normal(0, math.sqrt(2 / fan_in), leaf.shape).astype(leaf.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.build().variables)


@pytest.mark.parametrize("name", ZOO)
def test_counts_are_the_published_ones(name):
    network = ZOO[name]
    macs, params, equal = count_experiment.count(network)
    assert equal, (macs, network.macs, params, network.params)


def test_counts_that_are_known_exactly():
    exact = {
        "resnet50": (4_089_184_256, 25_557_032),
        "resnet20_cifar": (40_551_040, 269_722),
        "resnet110_cifar": (252_887_680, 1_727_962),
        "mobilenet_v1": (568_740_352, 4_231_976),
    }
    assert {name: count_experiment.count(ZOO[name])[:2] for name in exact} == exact


def test_shapes_only():
    apply_fn, variables, inputs = ZOO["gpt2_small"].build()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables))
    assert jax.eval_shape(apply_fn, variables, *inputs).shape == (1, 1024, 50257)


@pytest.mark.parametrize("name", TINY_OUTPUTS)
def test_mlperf_tiny_networks_run(name):
    network = ZOO[name]
    x = np.random.default_rng(1).uniform(0, 1, (3, *network.inputs[0].shape[1:])).astype("float32")
    y = np.asarray(jax.jit(network.build().apply_fn)(random_variables(network), x))
    assert y.shape == (3, TINY_OUTPUTS[name]) and np.all(np.isfinite(y))
    if name != "autoencoder":
        np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-5)
    assert np.ptp(y, axis=0).max() > 0  # the inputs matter


def test_autoencoder_is_dense_then_batch_norm_then_relu():
    network = ZOO["autoencoder"]
    variables = random_variables(network)
    x = np.random.default_rng(1).normal(size=(2, 640)).astype("float32")
    got = network.build().apply_fn(variables, x)

    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    want = np.float64(x)
    for index in range(9):
        dense, norm, stat = params[f"dense{index}"], params[f"bn{index}"], stats[f"bn{index}"]
        want = want @ dense["kernel"] + dense["bias"] - stat["mean"]
        want = np.maximum(want / np.sqrt(stat["var"] + 1e-3) * norm["scale"] + norm["bias"], 0)
    want = want @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_printed_figures_allow_half_a_step():
    assert printed("25,557,032") == Figure(25_557_032, 1)
    assert printed("15.47 G") == Figure(15_470_000_000, 10_000_000)
    whole, rounded = printed("569"), printed("569 M")
    assert [whole.equals(n) for n in (568, 569, 570)] == [False, True, False]
    near = 568_499_999, 568_500_000, 569_500_001
    assert [rounded.equals(n) for n in near] == [False, True, False]
    for text in ("5.7", "5 K", "", ",5"):
        with pytest.raises(ValueError, match="a count must"):
            printed(text)


def test_cifar_depth_is_refused_unless_6_n_plus_2():
    image = ZOO["resnet20_cifar"].inputs
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 2, got 21"):
        jax.eval_shape(DeepResNetCifar(21).init, jax.random.key(0), *image)


def test_experiment_prints_the_row_and_fails_where_a_count_differs(capsys, monkeypatch):
    run(count_experiment.main, "count", argv=["--short", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["networks"] == row["networks_equal"] == 5
    assert (row["ds_cnn_macs"], row["ds_cnn_params"]) == (2_656_768, 23_756)

    wrong = dataclasses.replace(ZOO["ds_cnn"], macs="2,656,767")
    monkeypatch.setattr(count_experiment, "ZOO", {"ds_cnn": wrong})
    with pytest.raises(SystemExit) as stop:
        run(count_experiment.main, "count", argv=["--json"])
    assert stop.value.code == 2
    assert "error: not as published: DS-CNN" in capsys.readouterr().err
