"""What a change does not reach is not computed again, and nothing else is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.graph import walk
from jaxcompress.graph.tracing import trace_program
from jaxcompress.search import Evaluator
from jaxcompress.search.sensitivities import evaluator
from jaxcompress.search.sensitivities.reuse import Reuse, reuse

pytestmark = pytest.mark.broad

INT2 = {"int2": jc.quantize.weights(jc.formats.integer(2), axis=-1)}
UINT2 = {"uint2": jc.formats.integer(2, symmetric=False)}


def network(params, ids):
    """Two branches from one table, which is the last layer too; a scan; a product of both."""
    x = params["table"][ids]
    left = jnp.tanh(x @ params["left"])
    right = jnp.tanh(x @ params["right"])
    right = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), right, params["layers"])[0]
    scores = left @ right.T
    return scores @ jnp.tanh(left + right) @ params["table"].T


@pytest.fixture(scope="module")
def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape) / 3
    params = {
        "table": normal(keys[0], 10, 6),
        "left": normal(keys[1], 6, 6),
        "right": normal(keys[2], 6, 6),
        "layers": normal(keys[3], 2, 6, 6),
    }
    ids = np.random.default_rng(0).integers(0, 10, (3, 5))
    return params, [(jnp.asarray(part),) for part in ids]


def test_what_depends_on_what(setting):
    params, batches = setting
    found = reuse(trace_program(network, params, *batches[0]), 3)
    last = {"table"}
    pair = next(name for name in found.kept if name.endswith("/lhs"))
    assert {"left", "right", pair} < set(found.kept) and "layers" not in found.kept
    after = set(found.kept) - {"left", "right"}
    assert found.by_leaf["left"] == after | {"left"}
    assert found.by_leaf["right"] == found.by_leaf["layers"] | {"right"} == after | {"right"}
    # The table is looked up before everything, and multiplied at the end.
    assert found.by_leaf["table"] == set(found.kept)
    assert found.by_tap["table"] == last
    assert found.stale(["left"], ["table"])["right"] is False
    assert found.stale((), ()) == dict.fromkeys(found.kept, False)


def test_bytes_are_bounded_and_conditionals_refused(setting):
    params, batches = setting
    program = trace_program(network, params, *batches[0])
    everything = reuse(program, 3).kept
    size = lambda out: 3 * out.size * 4
    some = reuse(program, 3, limit_bytes=sum(map(size, everything.values())) - 1).kept
    assert 0 < len(some) < len(everything)
    assert reuse(program, 3, limit_bytes=0).kept == {}
    either = lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p, lambda x: x, x)
    assert reuse(trace_program(either, jnp.eye(2), jnp.ones((2, 2))), 1) == Reuse({}, {}, {})


def test_every_measure_is_as_without(setting, monkeypatch):
    params, batches = setting
    make = lambda: Evaluator(network, params, batches, weights=INT2, activations=UINT2)
    kept = make()
    monkeypatch.setattr(evaluator, "reuse", lambda *args: Reuse({}, {}, {}))
    plain = make()
    choices = [({site: "int2"}, {}) for site in kept.sites[0]]
    choices += [({}, {tap: "uint2"}) for tap in kept.sites[1]]
    choices += [({}, {}), ({"left": "int2"}, {"table": "uint2"})]
    for weights, activations in choices:
        found, want = (e.measure(weights, activations)["kl"] for e in (kept, plain))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7, err_msg=str(weights))
        if weights or activations:
            assert want > 1e-5, (weights, activations)


def test_around_stands_for_the_contraction(setting):
    params, batches = setting
    seen = []

    def doubled(tap, compute, operands, state):
        seen.append(tap.name)
        return [2 * y for y in compute(operands)], state + 1

    walked = walk(network, lambda tap, x, state: (x, state), around=doubled)
    out, states = walked({"left": jnp.int32(0)}, params, *batches[0])
    twice = params | {"left": 2 * params["left"]}
    np.testing.assert_allclose(out, network(twice, *batches[0]), rtol=1e-5)
    assert seen == ["left"] and states["left"] == 1
