"""A kernel of one's own, declared: every pass knows it."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import Primitive

import jaxcompress as jc
from jaxcompress.cost.estimation import counts
from jaxcompress.formats import integer
from jaxcompress.graph.scaling.migration import absorbable
from jaxcompress.prune.channels.smaller_networks import shrink
from jaxcompress.quantize import Spec, ptq


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _kernel(body, shape):
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    return pl.pallas_call(body, out_shape=out, interpret=True)


def product_of_mine(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]


def tanh_of_mine(x_ref, out_ref):
    out_ref[...] = jnp.tanh(x_ref[...])


def slope_of_mine(x_ref, out_ref):
    out_ref[...] = jnp.where(x_ref[...] > 0, x_ref[...], 0.1 * x_ref[...])


def unheard_of(x_ref, out_ref):
    out_ref[...] = jnp.tanh(x_ref[...])


jc.graph.declare("product_of_mine", contracts=((1,), (0,)))
jc.graph.declare("tanh_of_mine", like="tanh")
jc.graph.declare("slope_of_mine", kind="elementwise", degree=1)

PARAMS = {"up": normal(0, 6, 8), "down": normal(1, 8, 5)}
X = normal(2, 32, 6)


def network(p, x, middle=tanh_of_mine):
    matmul = lambda a, b: _kernel(product_of_mine, (a.shape[0], b.shape[1]))(a, b)
    h = matmul(x, p["up"])
    return matmul(_kernel(middle, h.shape)(h), p["down"])


def plain(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


def test_it_is_traced_and_costed_like_what_it_is_declared():
    graph, want = (jc.graph.trace(fn, PARAMS, X) for fn in (network, plain))
    assert [(s.name, s.macs) for s in graph.sites] == [(s.name, s.macs) for s in want.sites]
    assert not graph.unentered
    assert counts(network, PARAMS, X) == counts(plain, PARAMS, X)


def test_a_kernel_without_declaration_stays_unentered():
    fn = lambda p, x: _kernel(unheard_of, (32, 8))(x @ p["up"]) @ p["down"]
    assert jc.graph.axes(fn, PARAMS, X).unknown == ("pallas_call",)


def test_the_kernel_itself_is_evaluated_and_visited():
    seen = jc.graph.walk(network, lambda tap, h, n: (h, n + 1))
    out, states = jax.jit(seen)({"up": jnp.int32(0), "down": jnp.int32(0)}, PARAMS, X)
    np.testing.assert_array_equal(out, jax.jit(network)(PARAMS, X))
    assert {k: int(v) for k, v in states.items()} == {"up": 1, "down": 1}
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(seen)({}, PARAMS, X).eqns]
    assert names == ["pallas_call"] * 3


def test_gptq_quantizes_its_weight_as_that_of_the_plain_product():
    spec = {"down": Spec(integer(3))}
    recipe = ptq.recipe(spec)
    views = []
    for fn in (network, plain):
        new, state = ptq.gptq(fn, PARAMS, [(X,)], spec)
        views.append(recipe.apply(new, state)["down"])
    np.testing.assert_allclose(*views, atol=1e-6)
    nearest = recipe.apply(PARAMS, recipe.init(PARAMS))["down"]
    assert not np.array_equal(views[0], nearest)


def test_channels_of_it_are_cut():
    groups = jc.graph.axes(network, PARAMS, X).groups
    (name,) = groups
    keep = np.arange(8) % 3 != 0
    small, params, report = shrink(network, PARAMS, {name: keep}, X)
    assert report.shapes == {"up": (6, 5), "down": (5, 5)}
    masked = {"up": PARAMS["up"] * jnp.asarray(keep[None], jnp.float32), "down": PARAMS["down"]}
    np.testing.assert_allclose(small(params, X), plain(masked, X), rtol=1e-5, atol=1e-5)


def test_scales_pass_what_is_homogeneous():
    fn = lambda p, x: network(p, x, middle=slope_of_mine)
    (group,) = absorbable(fn, PARAMS, X).groups
    assert group.layers == ("down",)
    assert not absorbable(network, PARAMS, X).groups


def test_a_primitive_of_ones_own_needs_no_kernel():
    mine = Primitive("a_primitive_of_mine")
    mine.def_impl(lambda x: 2 * x)
    mine.def_abstract_eval(lambda x: x)
    fn = lambda p, x: mine.bind(x @ p["up"]) @ p["down"]
    assert jc.graph.axes(fn, PARAMS, X).unknown == ("a_primitive_of_mine",)
    jc.graph.declare("a_primitive_of_mine", kind="elementwise", degree=1, work="one")
    assert list(jc.graph.axes(fn, PARAMS, X).groups) == ["up[1]"]
    assert counts(fn, PARAMS, X).unruled == ()


def test_saying_it_again_changes_nothing_and_something_else_is_refused():
    jc.graph.declare("tanh_of_mine", like="tanh")
    with pytest.raises(ValueError, match="declared as something else"):
        jc.graph.declare("tanh_of_mine", like="abs")
    with pytest.raises(ValueError, match="JAX has a primitive of this name"):
        jc.graph.declare("transpose", like="tanh")
    with pytest.raises(ValueError, match="one of kind, like and contracts"):
        jc.graph.declare("nothing_said")
    with pytest.raises(ValueError, match="without parameters"):
        jc.graph.declare("like_a_scan", like="scan")
    with pytest.raises(ValueError, match="needs parameters"):
        jc.graph.declare("moves", kind="move")
    with pytest.raises(ValueError, match="as many axes"):
        jc.graph.declare("odd", contracts=((1,), (0, 1)))


def test_the_lines_of_the_readme_run():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = [c for c in re.findall(r"```py\n(.*?)```", readme, re.S) if "my_matmul" in c]
    names = {"jc": jc}
    exec(compile(code, "README.md", "exec"), names)
    fn = lambda p, x: _kernel(names["my_matmul"], (32, 8))(x, p["up"])
    assert [site.name for site in jc.graph.trace(fn, PARAMS, X).sites] == ["up"]
