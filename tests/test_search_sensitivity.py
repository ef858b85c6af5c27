"""Sensitivities against one evaluation per configuration, and their cache."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from experiments.models import digits
from jaxcompress.search import kl, sensitivity

BITS = (2, 4, 8)
WEIGHTS = {f"int{b}": jc.quantize.weights(jc.formats.integer(b), axis=-1) for b in BITS}
ACTIVATIONS = {f"uint{b}": jc.formats.integer(b, symmetric=False) for b in BITS}


@pytest.fixture(scope="module")
def network():
    model = digits.DigitsCNN(features=(4, 8), hidden=16)
    rng = np.random.default_rng(0)
    batches = [(jnp.asarray(rng.random((8, 8, 8, 1)), jnp.float32),) for _ in range(2)]
    labels = [jnp.asarray(rng.integers(0, 10, 8)) for _ in range(2)]
    params = model.init(jax.random.key(0), batches[0][0])["params"]
    return digits.apply_fn(model), params, batches, labels


METRICS = {"kl": kl, "loss": lambda outputs, _, labels: jc.train.cross_entropy(outputs, labels)}


@pytest.fixture(scope="module")
def swept(network):
    apply_fn, params, batches, labels = network
    return sensitivity(
        apply_fn, params, batches, weights=WEIGHTS, activations=ACTIVATIONS, targets=labels,
        metrics=METRICS,
    )  # fmt: skip


def means(network, fn):
    _, _, batches, labels = network
    found = []
    for (x,), y in zip(batches, labels, strict=True):
        out, reference = (np.asarray(f(x), np.float64) for f in (fn, clean(network)))
        logs = [o - np.log(np.exp(o).sum(-1, keepdims=True)) for o in (out, reference)]
        divergence = np.mean(np.sum(np.exp(logs[1]) * (logs[1] - logs[0]), -1))
        found.append((divergence, -np.mean(logs[0][np.arange(len(y)), y])))
    return np.mean(found, 0)


def clean(network):
    apply_fn, params, *_ = network
    return lambda x: apply_fn(params, x)


def close(found, expected):
    np.testing.assert_allclose([found["kl"], found["loss"]], expected, rtol=2e-4, atol=2e-6)


def test_the_network_as_it_was(network, swept):
    close(swept.base, means(network, clean(network)))
    assert abs(swept.base["kl"]) < 1e-6


@pytest.mark.parametrize("option", WEIGHTS)
def test_weights_one_by_one(network, swept, option):
    apply_fn, params, *_ = network
    kernels = [path for path, w in jc.core.leaves_with_paths(params) if w.ndim > 1]
    assert list(swept.weights) == kernels == sorted(kernels)
    for site in kernels:
        recipe = jc.by_path({site: WEIGHTS[option]}, default=jc.identity())
        view = recipe.apply(params, recipe.update(params, recipe.init(params)))
        close(swept.weights[site][option], means(network, lambda x, v=view: apply_fn(v, x)))


@pytest.mark.parametrize("option", ACTIVATIONS)
def test_activations_one_by_one(network, swept, option):
    apply_fn, params, batches, _ = network
    for site in swept.activations:
        act = jc.quantize.activations(apply_fn, ACTIVATIONS[option], sites=site)
        grids = jc.quantize.calibrate_activations(act, params, batches)
        close(
            swept.activations[site][option],
            means(network, lambda x, g=grids, a=act: a.apply(g, params, x)),
        )


def test_fewer_bits_hurt_more(swept):
    for kind, names in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
        for options in swept.increase("kl", kind).values():
            worst, *_, best = (options[name] for name in names)
            assert worst > 3 * best
    with pytest.raises(ValueError, match="'top1' was not measured; there are \\['kl', 'loss'\\]"):
        swept.increase("top1")


def test_two_programs(network):
    apply_fn, params, batches, _ = network
    compiled = []
    jax.clear_caches()
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sensitivity(apply_fn, params, batches, weights=WEIGHTS, activations=ACTIVATIONS)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 2


def test_a_stopped_sweep_goes_on(network, swept, tmp_path):
    apply_fn, params, batches, labels = network
    file = tmp_path / "sweep.json"
    given: Any = dict(weights=WEIGHTS, targets=labels, metrics=METRICS, cache=file)

    class Stopped(Exception):
        pass

    def only(jobs):
        for number, job in enumerate(jobs):
            if number == 5:
                raise Stopped
            yield job

    with pytest.raises(Stopped):
        sensitivity(apply_fn, params, batches, **given, progress=only)
    assert len(json.loads(file.read_text())["values"]) == 6
    left = []
    found = sensitivity(
        apply_fn,
        params,
        batches,
        **given,
        progress=lambda jobs: [left.append(j) or j for j in jobs],
    )
    assert len(left) == 4 * 3 - 5
    for site, options in found.weights.items():
        for option, values in options.items():
            close(values, [swept.weights[site][option][name] for name in ("kl", "loss")])
    other = jax.tree.map(lambda w: w + 1, params)
    with pytest.raises(ValueError, match="of another function, other parameters"):
        sensitivity(apply_fn, other, batches, **given)


def test_layers_of_a_scan_and_zero_size():
    params = {"stack": jax.random.normal(jax.random.key(0), (3, 4, 4)), "head": jnp.ones((4, 2))}

    def fn(p, x):
        body = lambda x, w: (jax.nn.relu(x @ w), None)
        return jax.lax.scan(body, x, p["stack"])[0] @ p["head"]

    batches = [(jax.random.normal(jax.random.key(1), (16, 4)),)]
    found = sensitivity(fn, params, batches, weights=WEIGHTS, activations=ACTIVATIONS)
    assert set(found.weights) == set(found.activations) == {"stack", "head"}
    act = jc.quantize.activations(fn, ACTIVATIONS["uint4"], sites="stack")
    grids = jc.quantize.calibrate_activations(act, params, batches)
    out, reference = act.apply(grids, params, *batches[0]), fn(params, *batches[0])
    expected = jc.distill.kd(out, reference, temperature=1.0)
    np.testing.assert_allclose(found.activations["stack"]["uint4"]["kl"], expected, rtol=1e-4)


def test_bad_input(network):
    apply_fn, params, batches, labels = network
    with pytest.raises(ValueError, match="give options"):
        sensitivity(apply_fn, params, batches)
    with pytest.raises(ValueError, match="no batch|at least one"):
        sensitivity(apply_fn, params, [], weights=WEIGHTS)
    with pytest.raises(ValueError, match="number 1 has the shapes"):
        sensitivity(apply_fn, params, [batches[0], (batches[1][0][:4],)], weights=WEIGHTS)
    with pytest.raises(ValueError, match="targets: 1 for 2 batches"):
        sensitivity(apply_fn, params, batches, weights=WEIGHTS, targets=labels[:1])
    with pytest.raises(ValueError, match="matches no contraction; nearest: conv1/kernel"):
        sensitivity(apply_fn, params, batches, weights=WEIGHTS, sites="conv1")


def test_many_sites_at_once_and_weights_as_a_tree(network):
    apply_fn, params, batches, _ = network
    view = WEIGHTS["int4"].apply(params, WEIGHTS["int4"].init(params))
    evaluator = jc.search.Evaluator(
        apply_fn, params, batches, weights={"ready": view, **WEIGHTS}, activations=ACTIVATIONS
    )
    assert evaluator.options == (("ready", *WEIGHTS), tuple(ACTIVATIONS))

    def everywhere(name: str) -> dict[str, str]:
        return {site: name for site in evaluator.sites[0]}  # noqa: C420

    mixed = everywhere("int2") | {"linear/kernel": "int8"}
    taps = {"conv2/kernel": "uint4"}
    recipe = jc.by_path({"linear/kernel": WEIGHTS["int8"], ".*kernel": WEIGHTS["int2"]},
                        default=jc.identity())  # fmt: skip
    mixed_view = recipe.apply(params, recipe.update(params, recipe.init(params)))
    act = jc.quantize.activations(apply_fn, ACTIVATIONS["uint4"], sites="conv2/kernel")
    grids = jc.quantize.calibrate_activations(act, params, batches)
    expected = means(network, lambda x: act.apply(grids, mixed_view, x))[0]
    np.testing.assert_allclose(evaluator.measure(mixed, taps)["kl"], expected, rtol=1e-4)
    same = [evaluator.measure(everywhere(name))["kl"] for name in ("ready", "int4")]
    np.testing.assert_allclose(*same, rtol=1e-6)
    with pytest.raises(ValueError, match="no site 'conv3/kernel'; nearest: conv"):
        evaluator.measure({"conv3/kernel": "int2"})
    with pytest.raises(ValueError, match="has no option 'int3'"):
        evaluator.measure({"conv1/kernel": "int3"})
    with pytest.raises(ValueError, match="leaf 'conv1/bias' must be"):
        wrong = jax.tree.map(lambda w: w[..., :2], params)
        jc.search.Evaluator(apply_fn, params, batches, weights={"wrong": wrong})
