"""Groups that `axes` calls exact: the small network is the masked one, whatever computes in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress.graph.coupling.dependency_graph import axes
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.smaller_networks import shrink
from jaxcompress.prune.masking.mask_state import apply_masks

RNG = np.random.default_rng(0)


def uniform(*shape):
    return jnp.asarray(RNG.uniform(0.2, 0.6, shape), jnp.float32)


PARAMS = {"v": uniform(3, 4), "g": uniform(4), "w": uniform(4, 2)}
X = uniform(5, 3)
KEEP = np.array([True, False, True, True])

UNARY = """abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2
expm1 floor is_finite lgamma log log1p logistic neg reciprocal round rsqrt sign sin sinh sqrt square
tan tanh""".split()
BINARY = "add atan2 div max min mul nextafter pow rem sub eq ge lt ne".split()


def floats(y):
    return y.astype(jnp.float32)


def holds(fn, params=PARAMS, x=X, name="v[1]", keep=KEEP):
    """The reason; without one the small network must give what the masked one does."""
    found = axes(fn, params, x)
    group = found.groups[name]
    if not group.inexact:
        masked = apply_masks(params, group_masks(found, {name: keep}))
        small = shrink(fn, params, {name: keep}, x, axes=found)
        want = np.asarray(fn(masked, x))
        assert np.isfinite(want).all()
        np.testing.assert_allclose(small.fn(small.params, x), want, rtol=1e-5, atol=1e-6)
    return group.inexact


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_operand(op):
    of = getattr(lax, op)
    holds(lambda p, x: floats(of(x @ p["v"])) @ p["w"])
    # A factor that is finite at zero leaves the zero beside it.
    why = holds(lambda p, x: ((x @ p["v"]) * floats(of(p["g"]))[None]) @ p["w"])
    finite = np.isfinite(np.asarray(floats(of(jnp.zeros(())))))
    assert (why == "") == finite, why
    if not finite:
        assert op.replace("reciprocal", "integer_pow") in why and "'g'" in why


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("other", ["g", 0.0, 1.0, -1.5, 2.0])
def test_functions_of_two_operands(op, other):
    of = lambda a, b: floats(getattr(lax, op)(*jnp.broadcast_arrays(a, b)))
    second = lambda p: p["g"][None] if other == "g" else jnp.full((1, 4), other, jnp.float32)
    bases = {
        "of the channel": lambda p, x: of(x @ p["v"], second(p)),
        "the other way round": lambda p, x: of(jnp.broadcast_to(second(p), (5, 4)), x @ p["v"]),
        "a factor": lambda p, x: (x @ p["v"]) * of(p["g"][None], second(p)),
        "a divisor": lambda p, x: (x @ p["v"]) / of(p["g"][None], second(p)),
    }
    for base in bases.values():
        dense = base(PARAMS, X)
        if bool(jnp.all(jnp.isfinite(dense))):
            holds(lambda p, x, base=base: base(p, x) @ p["w"])


def norm(v, eps=0.0):
    return jnp.sqrt(jnp.sum(v * v, 0, keepdims=True) + eps)


def standard(v, eps):
    centred = v - jnp.mean(v, 0, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, 0, keepdims=True) + eps)


def row(p, name="g"):
    return p[name][None]


EXACT: dict[str, Any] = {
    "weight normalization with an epsilon": lambda p, x: (
        x @ (p["v"] * row(p) / norm(p["v"], 1e-6)) @ p["w"]
    ),
    "a guarded quotient": lambda p, x: x @ (p["v"] / jnp.where(row(p) == 0, 1, row(p))) @ p["w"],
    "a quotient that is not selected": lambda p, x: (
        jnp.where(row(p) > 0, x @ p["v"] / row(p), 0) @ p["w"]
    ),
    "standardized weights": lambda p, x: x @ standard(p["v"], 1e-5) @ p["w"],
    "an exponential of a logarithm": lambda p, x: x @ p["v"] @ (jnp.exp(jnp.log(p["w"]))),
    "a softmax with masked logits": lambda p, x: (
        jax.nn.softmax(jnp.log(x @ p["v"]) + row(p), axis=-1) @ p["w"]
    ),
    "sigmoid less what it is at zero": lambda p, x: (
        (jax.nn.sigmoid(x @ p["v"]) - 0.5) @ p["w"] + jnp.tanh(x @ p["v"]) @ p["w"]
    ),
    "a root mean square": lambda p, x: (
        (h := x @ p["v"]) * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True)) @ p["w"]
    ),
    "a product with ones": lambda p, x: jnp.prod(jnp.exp(x @ p["v"]), -1),
    "largest pooled": lambda p, x: (
        lax.reduce_window((x @ p["v"])[None], -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "VALID")[0]
        @ p["w"]
    ),
    "attention that leaves out what -inf marks": lambda p, x: (
        jax.nn.softmax(jnp.where(jnp.tri(5) > 0, x @ x.T, -jnp.inf)) @ (x @ p["v"]) @ p["w"]
    ),
    "attention of the channels themselves": lambda p, x: (
        (h := x @ p["v"]),
        jax.nn.softmax(h @ h.T + jnp.where(jnp.tri(5) > 0, 0.0, -jnp.inf * 1.0)) @ h @ p["w"],
    )[1],
    "padded with zeros": lambda p, x: (jnp.pad(x @ p["v"], ((1, 1), (0, 0))) @ p["w"]).sum(0),
}
INEXACT: dict[str, tuple[Any, str]] = {
    "weight normalization": (lambda p, x: x @ (p["v"] * row(p) / norm(p["v"])) @ p["w"], "div"),
    "normalized columns": (lambda p, x: x @ (p["v"] * lax.rsqrt(norm(p["v"]))) @ p["w"], "rsqrt"),
    "a quotient": (lambda p, x: (x @ p["v"] / row(p)) @ p["w"], "div"),
    "a logarithm": (lambda p, x: ((x @ p["v"]) * jnp.log(row(p))) @ p["w"], "log"),
    "expm1 over its argument": (
        lambda p, x: ((x @ p["v"]) * ((jnp.exp(row(p)) - 1) / row(p))) @ p["w"],
        "div",
    ),
    "a divisor that is zero at zero": (
        lambda p, x: ((x @ p["v"]) / (jnp.exp(row(p)) - 1)) @ p["w"],
        "div",
    ),
    "a negative power": (lambda p, x: ((x @ p["v"]) * row(p) ** -2) @ p["w"], "integer_pow"),
    "a root in a divisor": (lambda p, x: ((x @ p["v"]) * row(p) ** -0.5) @ p["w"], "pow"),
    "a remainder": (lambda p, x: lax.rem(x @ p["v"], row(p) + 0 * x[:, :1]) @ p["w"], "rem"),
    "zero to the power of zero": (lambda p, x: ((x @ p["v"]) ** row(p)).sum(-1), "reduce_sum"),
    "standardized without an epsilon": (
        lambda p, x: x @ standard(p["v"], 0.0) @ p["w"],
        "rsqrt",
    ),
    "a channel over its norm over the batch": (
        lambda p, x: (x @ p["v"]) / norm(x @ p["v"]) @ p["w"],
        "div",
    ),
    "padded with ones": (
        lambda p, x: (
            jnp.pad(x @ p["v"], ((1, 1), (0, 0)), constant_values=1.0).sum(-1)
        ),
        "reduce_sum",
    ),
    "infinity in the program": (lambda p, x: ((x @ p["v"]) * jnp.inf) @ p["w"], "mul"),
    "the angle of zero": (
        lambda p, x: lax.atan2(x @ p["v"], -jnp.ones((5, 4))).sum(-1),
        "reduce_sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    assert holds(EXACT[name]) == ""


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_and_why(name):
    fn, what = INEXACT[name]
    why = holds(fn)
    assert what in why
    with pytest.raises(ValueError, match=r"group 'v\[1\]' cannot be cut without a trace"):
        shrink(fn, PARAMS, {"v[1]": KEEP}, X)
    # Without the channel nothing is divided by zero.
    small = shrink(fn, PARAMS, {"v[1]": KEEP}, X, allow_inexact=True)
    if name != "infinity in the program":
        assert np.isfinite(np.asarray(small.fn(small.params, X))).all()


def test_the_place_is_named():
    @jax.jit
    def scaled(h, g):
        with jax.named_scope("scaling"):
            return h / g

    def fn(p, x):
        with jax.named_scope("block"):
            return scaled(x @ p["v"], row(p)) @ p["w"]

    assert "div of what is masked in 'v' at 'block/scaling' is nan" in holds(fn)


def test_loops_and_branches_keep_a_nan():
    def loop(p, x):
        h, _ = lax.scan(lambda h, _: (h / row(p), None), x @ p["v"], None, length=2)
        return h @ p["w"]

    def branch(p, x):
        one, other = (lambda h: h / row(p)), (lambda h: h * row(p))
        return lax.cond(x[0, 0] > 0, one, other, x @ p["v"]) @ p["w"]

    assert "div" in holds(loop) and "div" in holds(branch)


def test_a_layer_of_zeros_that_divides_by_its_norm_does_not_pass_on():
    def fn(p, x, eps):
        step = lambda h, w: (h + jnp.tanh(h @ (w / (norm(w) + eps))), None)
        return lax.scan(step, x, p["layers"])[0]

    params = {"layers": uniform(3, 4, 4)}
    layers = lambda eps: axes(lambda p, x: fn(p, x, eps), params, uniform(2, 4)).layers["layers[0]"]
    assert layers(0.0).inexact == "a layer of zeros changes what it passes on"
    assert layers(1e-3).inexact == ""


def test_convolutions_with_normalized_kernels():
    def fn(p, x):
        kernel = p["k"] / jnp.sqrt(jnp.sum(p["k"] ** 2, (0, 1, 2), keepdims=True) + p["eps"])
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.mean(jax.nn.relu(y), (1, 2)) @ p["w"]

    params = {"k": uniform(3, 3, 2, 4), "w": uniform(4, 2), "eps": jnp.float32(1e-5)}
    x = uniform(1, 4, 4, 2)
    assert holds(fn, params, x, "k[3]") == ""
    plain = lambda p, x: fn({**p, "eps": 0.0}, x)
    assert "'k' is nan" in holds(plain, params, x, "k[3]")


def test_inside_a_function_that_is_traced():
    def traced(x):
        return x * len(axes(EXACT["standardized weights"], PARAMS, X).groups["v[1]"].inexact)

    assert float(jax.jit(traced)(jnp.float32(1.0))) == 0


def test_what_froze_the_axes_is_named():
    def fn(p, x):
        return jnp.real(jnp.fft.fft(x @ p["v"])) @ p["w"]

    with pytest.raises(ValueError, match=r"there are none \(without a rule: fft; frozen: v\[0\]"):
        used = {"v": PARAMS["v"], "w": PARAMS["w"]}
        jc.search.narrow(fn, used, [(X,)], 0.5)
    with pytest.raises(ValueError, match=r"no group 'v\[1\]'; nearest: .*without a rule: fft"):
        shrink(fn, PARAMS, {"v[1]": KEEP}, X)


def test_a_forward_with_a_state_is_said_to_need_it():
    def forward(params, state, x):
        return x @ params["v"] + state

    act = jc.quantize.activations(forward, jc.formats.integer(8))
    grids = act.grids(act.observe(act.init(PARAMS, 0.0, X), PARAMS, 0.0, X))
    with pytest.raises(TypeError, match=r"forward\(params, state, x\) was given params and 1 inp"):
        act.apply(grids, PARAMS, X)
