"""Exact selection: the masks are those of a stable descending argsort, at any size and sharding."""

import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.core.numerics.counting import count_true, order_bits
from jaxcompress.core.numerics.top_k import keep_count, top_k_mask, top_k_masks

jitted_masks = jax.jit(top_k_masks)
SPECIALS = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45], np.float32)


def argsort_masks(leaves, keep):
    """The oracle: NumPy, float64, a stable sort of the concatenated scores."""
    flat = np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in leaves])
    order = np.argsort(-np.where(np.isnan(flat), -np.inf, flat), kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    parts = np.split(mask, np.cumsum([x.size for x in leaves])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]


def assert_same(masks, expected):
    for mask, wanted in zip(masks, expected, strict=True):
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(np.asarray(mask), wanted)


def test_by_hand():
    scores = {"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([[2.0], [5.0]])}
    masks = top_k_masks(scores, 3)  # 5, 3, and of the two 2s the one in the earlier leaf
    assert masks["a"].tolist() == [True, False, True]
    assert masks["b"].tolist() == [[False], [True]]
    assert top_k_mask(jnp.array([-0.0, 0.0, -1.0]), 1).tolist() == [True, False, False]
    nans_last = top_k_mask(jnp.array([np.nan, -np.inf, -1.0, np.nan]), 3)
    assert nans_last.tolist() == [True, True, True, False]


@pytest.mark.parametrize("values", ["normal", "specials", "ties"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool"])
def test_equals_a_stable_argsort(dtype, values):
    rng = np.random.default_rng(0)
    draw = {
        "normal": lambda shape: rng.standard_normal(shape) * 50,
        "specials": lambda shape: rng.choice(SPECIALS, shape),
        "ties": lambda shape: rng.integers(0, 3, shape),
    }[values]
    floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    leaves = []
    for shape in ((31, 7), (), (0, 4), (2, 3, 5), (200,)):
        drawn = np.asarray(draw(shape), np.float32)
        if not floating:
            drawn = np.clip(np.nan_to_num(drawn), 0 if dtype[0] != "i" else -128, 127)
        with np.errstate(over="ignore"):
            leaves.append(jnp.asarray(drawn).astype(dtype))
    total = sum(x.size for x in leaves)
    for keep in (0, 1, 2, total // 3, total // 2, total - 1, total, *rng.integers(0, total, 5)):
        assert_same(jitted_masks(leaves, jnp.int32(keep)), argsort_masks(leaves, keep))


def test_leaves_of_different_floats_compare_by_value():
    rng = np.random.default_rng(1)
    leaves = [
        jnp.asarray(rng.standard_normal(50).round(1), dtype)
        for dtype in (np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn)
    ]
    assert_same(top_k_masks(leaves, 77), argsort_masks(leaves, 77))


def test_many_elements_and_many_ties():
    rng = np.random.default_rng(2)
    leaves = [jnp.asarray(rng.standard_normal((300, 1000)).astype(np.float32)), jnp.ones(2**17)]
    for keep in (1, 1000, 100_000, 431_071):
        assert_same(jitted_masks(leaves, jnp.int32(keep)), argsort_masks(leaves, keep))
    first = np.asarray(top_k_mask(jnp.zeros((7, 3001)), 12_345))
    assert first.ravel()[:12_345].all() and first.sum() == 12_345


def test_order_of_scores_is_all_that_counts():
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.permutation(np.linspace(-3, 3, 1001)).astype(np.float32))
    mask = np.asarray(top_k_mask(scores, 400))
    np.testing.assert_array_equal(np.asarray(top_k_mask(jnp.exp(scores), 400)), mask)
    shuffle = rng.permutation(1001)
    np.testing.assert_array_equal(np.asarray(top_k_mask(scores[shuffle], 400)), mask[shuffle])


def test_order_bits_puts_nan_below_everything():
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        values = jnp.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf]).astype(dtype)
        order = np.asarray(order_bits(values)).astype(np.int64)
        assert (np.diff(order)[[0, 1, 3, 4]] > 0).all() and order[2] == order[3]
        nans = jnp.array([np.nan, -np.nan]).astype(dtype)
        assert np.asarray(order_bits(nans)).max() < order[0]


def test_vmap_over_keep_and_over_scores():
    rng = np.random.default_rng(4)
    scores = jnp.asarray(rng.integers(0, 5, (6, 10, 4)).astype(np.float32))
    keeps = jnp.array([0, 1, 7, 20, 39, 40])
    both = jax.jit(jax.vmap(top_k_mask))(scores, keeps)
    for row, mask, keep in zip(scores, both, keeps, strict=True):
        assert_same([mask], argsort_masks([row], int(keep)))
    by_keep = jax.vmap(top_k_mask, (None, 0))(scores[0], keeps)
    assert by_keep.sum((1, 2)).tolist() == keeps.tolist()
    assert_same([by_keep[3]], argsort_masks([scores[0]], 20))
    by_scores = jax.vmap(top_k_mask, (0, None))(scores, 7)
    assert_same([by_scores[2]], [np.asarray(both[2])])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "specs",
    [("a", "b"), (None, "b"), (("a", "b"), None)],
    ids=["both_axes", "second_axis", "first_axis"],
)
def test_sharded_scores(kind, specs):
    """Same masks and shardings; between devices go sums of counts, and nothing is gathered."""
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(5)
    leaves = [rng.integers(0, 9, shape).astype(np.float32) for shape in ((64, 48), (8, 640))]
    sharding = NamedSharding(mesh, PartitionSpec(*specs))
    sharded = [jax.device_put(x, sharding) for x in leaves]
    compiled = jitted_masks.lower(sharded, jnp.int32(5)).compile()
    for keep in (1, 1234, 8000):
        masks = compiled(sharded, jnp.int32(keep))
        assert_same(masks, argsort_masks(leaves, keep))
        assert all(mask.sharding.is_equivalent_to(sharding, 2) for mask in masks)
    hlo = str(compiled.as_text())
    assert not re.search(r" (all-gather|all-to-all|collective-permute|sort)(-start)?\(", hlo)
    moved = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", hlo)
    assert moved, "the counts of the devices must be joined"
    assert not any(re.findall(r"\[([\d,]+)\]", " ".join(moved))), "more than scalars"


def test_one_pass_and_a_pass_each_count_alike():
    predicates = [np.random.default_rng(7).random((5, 8, 3)) < p for p in (0.2, 0.5, 1.0)]
    wanted = [int(p.sum()) for p in predicates]
    for one_pass in (True, False, None):
        counts = jax.jit(functools.partial(count_true, one_pass=one_pass))(predicates)
        assert [int(n) for n in counts] == wanted


def test_no_sort_and_one_compilation():
    scores = {"w": jnp.arange(12.0).reshape(3, 4)}
    primitives = str(jax.make_jaxpr(top_k_masks)(scores, jnp.int32(3)))
    assert "while" in primitives
    assert not re.search(r"\b(sort|top_k|cumsum|concatenate|scatter|gather)\b", primitives)
    traced = []
    fresh = jax.jit(lambda s, k: (traced.append(k), top_k_masks(s, k))[1])
    for keep in range(5):
        assert int(fresh(scores, jnp.int32(keep))["w"].sum()) == keep
    assert len(traced) == 1


def test_gradient_flows_around_the_mask():
    loss = lambda w: jnp.sum(jnp.where(top_k_mask(jnp.abs(w), 2), w * w, np.float32(0)))
    assert jax.grad(loss)(jnp.array([3.0, -1.0, -2.0])).tolist() == [6.0, 0.0, -4.0]


def test_float64_and_int64():
    with jax.enable_x64(True):
        close = jnp.array([1.0, 1.0 + 1e-15, 1.0 - 1e-15, np.nan, 5e-324], np.float64)
        assert top_k_mask(close, 1).tolist() == [False, True, False, False, False]
        assert top_k_mask(close, 4).tolist() == [True, True, True, False, True]
        assert top_k_mask(jnp.array([2**40, 2**40 + 1]), jnp.int64(1)).tolist() == [False, True]


def test_empty_trees_and_clipped_keep():
    assert top_k_masks({}, 0) == {}
    assert top_k_mask(jnp.zeros((0, 3)), 0).shape == (0, 3)
    assert bool(top_k_mask(jnp.float32(2), 1)) and not top_k_mask(jnp.float32(2), 0)
    assert int(top_k_mask(jnp.arange(5.0), jnp.int32(9)).sum()) == 5
    assert int(top_k_mask(jnp.arange(300.0), jnp.int8(100)).sum()) == 100


@pytest.mark.parametrize("size", [0, 1, 6, 255, 2**24 + 1, 123_456_789, 2**31 - 1])
def test_keep_count_is_exact(size):
    rng = np.random.default_rng(6)
    edges = [0, 1, 0.5, 0.25, 0.75, 0.9, 2**-32, 3 * 2**-33, 2**-31, 1 - 2**-24, 1e-30, 1e-40]
    ties = (2 * rng.integers(0, 2**12, 40) + 1) * 2.0**-13  # halves appear at even sizes
    sparsities = np.concatenate([edges, ties, rng.random(200)]).astype(np.float32)
    exact = [round((1 - Fraction(float(s))) * size) for s in sparsities]
    assert [keep_count(size, float(s)) for s in sparsities] == exact
    traced = jax.jit(keep_count, static_argnums=0)(size, jnp.asarray(sparsities))
    assert traced.dtype == np.int32 and np.asarray(traced).tolist() == exact


def test_keep_count_of_odd_inputs():
    out = keep_count(100, jnp.array([-0.5, 2.0, np.nan, np.inf, -0.0]))
    assert np.asarray(out).tolist() == [100, 0, 100, 0, 100]
    assert int(keep_count(10, jnp.bfloat16(0.5))) == 5
    assert [keep_count(n, 0.5) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]  # half to even
    assert keep_count(10, np.float32(0.25)) == 8 and keep_count(15, Fraction(9, 10)) == 2


def test_errors():
    scores = jnp.arange(4.0)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 4\].*got 5"):
        top_k_mask(scores, 5)
    with pytest.raises(TypeError, match="keep must be an integer.*keep_count"):
        top_k_mask(scores, 0.5)
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\): use jax.vmap"):
        top_k_mask(scores, jnp.array([1, 2]))
    with pytest.raises(TypeError, match="'b' are int32, the other leaves float32"):
        top_k_masks({"a": scores, "b": jnp.arange(4)}, 2)
    with pytest.raises(TypeError, match="'c/w' are complex"):
        top_k_masks({"c": {"w": jnp.ones(2, np.complex64)}}, 1)
    half = jax.ShapeDtypeStruct((2**30,), np.float32)
    with pytest.raises(ValueError, match=r"2147483648 elements.*2\*\*31 - 1"):
        jax.eval_shape(lambda s: top_k_masks(s, 1), [half, half])
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        keep_count(10, 1.5)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got nan"):
        keep_count(10, float("nan"))
    with pytest.raises(ValueError, match=r"size must be in \[0, 2\*\*31 - 1\], got 2147483648"):
        keep_count(2**31, 0.5)
