"""graph.walk: the identity bit for bit, states, control flow, derivative rules, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _models import equinox_mlp, nnx_cnn, resnet20, transformer
from _trees import bits_equal
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxcompress.graph import compat, trace, walk

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)) * 0.4, jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)


def see(tap, x, peak):
    """Changes nothing; keeps the running maximum of |x|."""
    return x, jnp.maximum(peak, jnp.abs(x).max())


def double(tap, x, state):
    return 2 * x, state


def zeros(fn, *args):
    return {tap.name: jnp.zeros(tap.site.loops) for tap in trace(fn, *args).taps}


def assert_identity(fn, params, x, *, reverse=True):
    """Values and gradients of the walked function are those of `fn`; returns the states."""
    states, walked = zeros(fn, params, x), walk(fn, see)
    assert states

    def loss(params, x):
        return jnp.sum(jnp.square(fn(params, x)))

    def walked_loss(params, x, states):
        out, states = walked(states, params, x)
        return jnp.sum(jnp.square(out)), states

    out, new = jax.jit(walked)(states, params, x)
    assert bits_equal(out, jax.jit(fn)(params, x))
    assert all((np.asarray(s) > 0).any() for s in new.values())
    if reverse:
        expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
        grad = jax.jit(jax.value_and_grad(walked_loss, (0, 1), has_aux=True))
        (value, again), grads = grad(params, x, states)
        assert bits_equal((value, grads), expected)
        assert bits_equal(again, new)
    return new


@pytest.mark.parametrize("remat", [True, False])
def test_identity_on_a_scanned_transformer_with_a_state_per_layer(remat):
    model = transformer(layers=3, remat=remat)
    states = assert_identity(*model)
    # The same by hand: one layer at a time, the maximum of what enters `up` of each.
    one, x, peaks = transformer(layers=1, remat=False), model.x, []
    for i in range(3):
        layer = jax.tree.map(lambda p, i=i: p[i : i + 1], model.params)
        x, seen = walk(one.apply, see)(zeros(one.apply, layer, x), layer, x)
        peaks.append(seen["layers/up"][0])
    np.testing.assert_allclose(states["layers/up"], np.stack(peaks), rtol=1e-5)
    assert len(set(np.asarray(states["layers/up"]).tolist())) == 3


def test_identity_on_resnet20():
    assert_identity(*resnet20(size=16, width=8))


@pytest.mark.parametrize("model", [nnx_cnn, equinox_mlp])
def test_identity_on_nnx_and_equinox(model):
    assert_identity(*model())


@jax.custom_jvp
def jvp_rule(w, x):
    return jnp.tanh(x @ w)


@jvp_rule.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return jvp_rule(w, x), 3.0 * (dx @ w) + x @ dw  # not the true derivative


@jax.custom_vjp
def vjp_rule(w, x):
    return jnp.floor(x @ w)


vjp_rule.defvjp(lambda w, x: (vjp_rule(w, x), (w, x)), lambda r, g: (r[1].T @ g, 5.0 * g @ r[0].T))


def in_cond(w, x):
    return lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ w), lambda x: x @ w @ w, x)


def in_switch(w, x):
    branches = [lambda x: x, lambda x: x @ w, lambda x: x @ w @ w]
    return lax.switch(1 + (x[0, 0] > 9).astype(jnp.int32), branches, x)


def in_map(w, x):
    return lax.map(lambda row: jax.nn.silu(row @ w), x)


def in_nested_scan(w, x):
    def outer(x, scale):
        step = jax.checkpoint(lambda x, _: (vjp_rule(w, x) + jvp_rule(w, x), None))
        return lax.scan(step, x * scale, None, length=2)[0], x.sum()

    x, sums = lax.scan(outer, x, jnp.array([1.0, 0.5, 2.0]), reverse=True)
    return x + sums.sum()


def in_jit(w, x):
    @jax.jit
    def layer(x, times):
        return jax.nn.relu(x @ w) * times

    return layer(layer(x, 1), 3.0)


@pytest.mark.parametrize(
    "fn", [in_cond, in_switch, in_map, in_nested_scan, in_jit, jvp_rule, vjp_rule]
)
def test_identity_in_control_flow_and_custom_rules(fn):
    apply = lambda p, x: fn(p["w"], x)
    if fn in (in_cond, in_switch):  # only one branch runs
        states, walked = zeros(apply, {"w": W}, X), walk(apply, see)
        grad = lambda f: jax.jit(jax.grad(lambda w, x: jnp.sum(f(w, x) ** 2), (0, 1)))
        again = lambda w, x: walked(states, {"w": w}, x)[0]
        assert bits_equal(grad(again)(W, X), grad(fn)(W, X))
        assert bits_equal(jax.jit(again)(W, X), jax.jit(fn)(W, X))
    else:
        assert_identity(apply, {"w": W}, X)


def test_cond_updates_the_states_of_the_branch_that_ran():
    apply = lambda p, x: in_cond(p["w"], x)
    states = zeros(apply, {"w": W}, X)
    assert list(states) == ["w", "w#1", "w#2"]  # the false branch comes first, with two sites
    for sign, ran in ((1.0, ["w#2"]), (-1.0, ["w", "w#1"])):
        x = X.at[0, 0].set(sign)
        _, new = jax.jit(walk(apply, see))(states, {"w": W}, x)
        assert [name for name in new if new[name] > 0] == ran


def test_while_carries_states_through_test_and_body():
    def apply(p, x):
        norm = lambda x: jnp.sum(x @ p["test"])
        return lax.while_loop(
            lambda x: norm(x) < 50.0, lambda x: jnp.abs(x @ p["w"]) + jnp.abs(x) + 1.0, x
        )

    params = {"w": W, "test": jnp.eye(4)}
    assert_identity(apply, params, X, reverse=False)
    count = walk(apply, lambda tap, x, n: (x, n + 1))
    _, seen = jax.jit(count)({"w": jnp.int32(0), "test": jnp.int32(0)}, params, X)
    assert seen["test"] == seen["w"] + 1 > 2  # the test runs once more than the body


def test_remat_keeps_its_policy_and_unvisited_code_its_equations():
    policy = jax.checkpoint_policies.dots_saveable
    again = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy, prevent_cse=False)
    fn = lambda p, x: lax.map(lambda row: row @ p["b"], again(p["a"], x))
    params = {"a": W, "b": W}
    walked = lambda p, x: walk(fn, see)({"a": jnp.float32(0)}, p, x)[0]
    expected, found = (jax.make_jaxpr(f)(params, X).jaxpr.eqns for f in (fn, walked))
    assert [e.primitive.name for e in found] == [e.primitive.name for e in expected]
    remat, original = found[0], expected[0]
    assert remat.primitive.name in compat.REMAT
    assert compat.remat_options(remat.params) == compat.remat_options(original.params)
    assert found[1].params["jaxpr"] is expected[1].params["jaxpr"]


def test_a_visit_changes_what_enters():
    fn = lambda p, x: jnp.einsum("td,sd->ts", x @ p["w"], x)
    params, expected = {"w": W}, (X @ W) @ X.T
    states = {tap.name: () for tap in trace(fn, params, X).taps}
    assert list(states) == ["w", "td,sd->ts/lhs", "td,sd->ts/rhs"]
    for name in states:
        out, _ = walk(fn, double)({name: ()}, params, X)
        np.testing.assert_allclose(out, 2 * expected, rtol=1e-6)
    out, _ = walk(fn, double)(states, params, X)
    np.testing.assert_allclose(out, 8 * expected, rtol=1e-6)
    assert bits_equal(walk(fn, double)({}, params, X)[0], fn(params, X))
    # One array on both sides, changed on one of them only.
    square = lambda _, x: x @ x
    out, _ = walk(square, double)({"dot_general/rhs": ()}, (), W)
    np.testing.assert_allclose(out, 2 * W @ W, rtol=1e-6)


@pytest.mark.parametrize("fn", [in_cond, in_map, in_nested_scan, in_jit, jvp_rule, vjp_rule])
def test_a_visit_of_zeros_silences_every_kind_of_body(fn):
    apply = lambda p, x: fn(p["w"], x)
    states = {name: () for name in zeros(apply, {"w": W}, X)}
    out, _ = jax.jit(walk(apply, lambda tap, x, s: (0 * x, s)))(states, {"w": W}, X)
    silent = jax.jit(apply)({"w": 0 * W}, X)
    np.testing.assert_array_equal(out, silent)


def test_the_authors_rule_stays_in_force_at_the_functions_own_arguments():
    out, vjp = jax.vjp(lambda w, x: walk(vjp_rule, double)({"dot_general": ()}, w, x)[0], W, X)
    np.testing.assert_array_equal(out, jnp.floor(2 * X @ W))
    dw, dx = vjp(jnp.ones_like(out))
    np.testing.assert_allclose(dw, X.T @ jnp.ones_like(out), rtol=1e-6)
    np.testing.assert_allclose(dx, 5 * jnp.ones_like(out) @ W.T, rtol=1e-6)
    walked = lambda w: walk(jvp_rule, double)({"dot_general": ()}, w, X)[0]
    _, tangent = jax.jvp(walked, (W,), (W,))
    np.testing.assert_allclose(tangent, X @ W, rtol=1e-6)


def test_states_have_gradients_outside_custom_rules_and_an_error_inside():
    scale = lambda tap, x, s: (x * s, s)
    loss = lambda fn: lambda s: walk(fn, scale)({"dot_general": s}, W, X)[0].sum()
    grad = jax.grad(loss(lambda w, x: jax.checkpoint(jnp.matmul)(x, w)))(jnp.float32(1.5))
    np.testing.assert_allclose(grad, (X @ W).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="state of 'dot_general' in custom_vjp_call 'vjp_rule'"):
        jax.grad(loss(vjp_rule))(jnp.float32(1.5))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.jit(jax.grad(loss(jvp_rule)))(jnp.float32(1.5))


def test_under_vmap_scan_and_closed_over_tracers():
    model = transformer(layers=2)
    states = zeros(*model)
    walked = walk(model.apply, see)
    batch = jnp.stack([model.x, 2 * model.x, -model.x])
    out, seen = jax.jit(jax.vmap(walked, in_axes=(None, None, 0)))(states, model.params, batch)
    np.testing.assert_allclose(
        out, jax.vmap(model.apply, (None, 0))(model.params, batch), rtol=2e-5
    )
    assert {s.shape for s in seen.values()} == {(3, 2)}

    def step(states, x):
        out, states = walked(states, model.params, x)
        return states, out

    last, _ = jax.jit(lambda s, b: lax.scan(step, s, b))(states, batch)
    for name, peak in seen.items():
        np.testing.assert_allclose(last[name], peak.max(0), rtol=1e-5)

    def closed_over(scale):
        fn = lambda w, x: scale * (x @ w)
        return walk(fn, see)({"dot_general": 0.0}, W, X)[0].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(closed_over))(2.0), (X @ W).sum(), rtol=1e-5)


def test_bfloat16_walks_on():
    model = nnx_cnn()
    low = lambda t: jax.tree.map(lambda p: p.astype(jnp.bfloat16), t)
    states = {name: jnp.bfloat16(0) for name in zeros(*model)}
    walked = jax.jit(walk(model.apply, see))
    out, _ = walked(states, low(model.params), low(model.x))
    assert out.dtype == jnp.bfloat16
    assert bits_equal(out, jax.jit(model.apply)(low(model.params), low(model.x)))


def test_a_second_call_traces_and_compiles_nothing():
    model, traced = equinox_mlp(), []

    def visit(tap, x, peak):
        traced.append(tap.name)
        return see(tap, x, peak)

    walked = jax.jit(walk(model.apply, visit))
    _, states = walked(zeros(*model), model.params, model.x)
    assert len(traced) == 3
    walked(states, model.params, 2 * model.x)
    assert len(traced) == 3


def test_sharded_arrays_keep_their_shardings():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    row, column = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("d", None), (None, "d")))
    x = jax.device_put(jnp.ones((16, 4)), row)
    w = jax.device_put(jnp.ones((4, 8)), column)
    inner = jax.jit(lambda x, w: x @ w, in_shardings=(row, column), out_shardings=column)
    fn = lambda w, x: inner(x, w)
    out, states = jax.jit(walk(fn, see))({"dot_general": jnp.float32(0)}, w, x)
    assert out.sharding.is_equivalent_to(column, 2) and states["dot_general"] == 1
    assert bits_equal(out, jax.jit(fn)(w, x))


def test_the_walked_function_traces_to_the_same_sites():
    model = transformer(layers=2)
    states = zeros(*model)
    again = trace(lambda p, x: walk(model.apply, see)(states, p, x), model.params, model.x)
    sites = trace(*model).sites
    assert [(s.name, s.calls, s.macs) for s in again.sites] == [
        (s.name, s.calls, s.macs) for s in sites
    ]


def test_errors_name_the_tap():
    model = transformer(layers=2)
    good = zeros(*model)

    def run(states, visit=see):
        return walk(model.apply, visit)(states, model.params, model.x)

    with pytest.raises(ValueError, match=r"'layers/quer' is no tap .* nearest: 'layers/query'"):
        run({"layers/quer": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"'layers/up' must have the leading axes \(2,\).*\(3,\)"):
        run({"layers/up": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"activation at 'layers/query' from float32\[2, 5, 8\]"):
        run(good, lambda tap, x, s: (x.astype(jnp.bfloat16), s))
    with pytest.raises(ValueError, match="structure of the state of 'layers/query'"):
        run(good, lambda tap, x, s: (x, (s, s)))
    with pytest.raises(ValueError, match=r"state of 'layers/up', leaf 'a', from float32\[\] to"):
        run({"layers/up": {"a": good["layers/up"]}}, lambda tap, x, s: (x, {"a": s["a"][None]}))
    with pytest.raises(ValueError, match=r"must return \(x, state\) at 'layers/query'"):
        run(good, lambda tap, x, s: x)


def test_what_cannot_be_entered_is_refused_by_name_and_left_alone_otherwise():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    part = PartitionSpec("d")

    def fn(p, x):
        with jax.named_scope("block"):
            local = lambda w, x: x @ w
            shard = jax.shard_map(local, mesh=mesh, in_specs=(part, part), out_specs=part)
            return shard(p["inner"], x) @ p["head"]

    params = {"inner": jnp.ones((4, 2)), "head": jnp.ones((2, 2))}
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="'inner' cannot be visited.*shard_map at 'block'"):
        walk(fn, see)({"inner": 0.0}, params, x)
    with pytest.raises(
        ValueError, match="'other' is no tap.*cannot reach: shard_map at 'block': inner"
    ):
        walk(fn, see)({"other": 0.0}, params, x)
    out, _ = jax.jit(walk(fn, double))({"head": ()}, params, x)
    np.testing.assert_array_equal(out, 2 * fn(params, x))
