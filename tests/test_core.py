"""Path rules, combinators, packed leaves, and the layering of the package."""

import ast
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _trees import bits_equal, small_tree
from flax import nnx

import jaxcompress as jc
from jaxcompress.core import leaves_with_paths, match_rules
from jaxcompress.formats import integer

weights = jc.quantize.weights


def test_paths_of_an_nnx_state_have_no_value_suffix():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert sorted(path for path, _ in leaves_with_paths(state)) == ["bias", "kernel"]


def test_nnx_and_lists_go_through_a_recipe():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    comp = jc.by_path({"kernel": weights(integer(8), axis=-1)}, default=jc.identity())
    for params in (state, [jnp.ones((2, 2)), {"kernel": jnp.ones((2, 3))}]):
        if isinstance(params, list):
            comp = jc.by_path({"1/kernel": weights(integer(8))}, default=jc.identity())
        s = comp.init(params)
        assert bits_equal(jc.unpack(comp.pack(params, s)), comp.apply(params, s))


def test_one_array_is_a_tree():
    w = jnp.array([[0.7, -0.2], [0.1, 0.35]])
    comp = jc.chain(jc.prune.magnitude(0.5), weights(integer(4)))
    s = comp.init(w)
    np.testing.assert_allclose(comp.apply(w, s), [[0.7, 0.0], [0.0, 0.4]], rtol=1e-6)


def test_first_match_wins_and_the_narrow_rule_must_come_first():
    paths = ["head/kernel", "body/kernel"]
    matched = match_rules({"head/.*": 0, ".*kernel": 1}, paths)
    assert matched == {"head/kernel": "head/.*", "body/kernel": ".*kernel"}
    with pytest.raises(ValueError, match="earlier rules take all it matches.*narrower rule first"):
        match_rules({".*": 0, "head/.*": 1}, paths)


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"Dense.*": weights(integer(4))}, "'Dense.*' matches no parameter; nearest: 'dense/"),
        ({"[": weights(integer(4))}, r"rule '\[' is not a regular expression"),
        ({"dense/kernel": weights(integer(4), axis=3)}, r"dense/kernel: axis 3 is out of range"),
    ],
)
def test_rule_errors_name_rule_and_path(rules, message):
    with pytest.raises(ValueError, match=message):
        jc.by_path(rules, default=jc.identity()).init(small_tree())


def test_uncovered_weights_are_listed():
    comp = jc.by_path({"dense/.*": weights(integer(4))})
    with pytest.warns(UserWarning, match="no rule covers these weights.*conv/kernel, empty"):
        comp.init(small_tree())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jc.by_path({"dense/.*": weights(integer(4))}, default=jc.identity()).init(small_tree())


def test_a_nan_is_refused_with_its_path():
    params = small_tree()
    params["conv"]["kernel"] = params["conv"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    for comp in (weights(integer(8)), jc.prune.magnitude(0.5)):
        with pytest.raises(ValueError, match="^conv/kernel: .*NaN"):
            comp.init(params)


def test_an_unknown_label_is_an_error():
    comp = jc.partition({"a": "left", "b": "right"}, {"left": jc.identity()})
    with pytest.raises(ValueError, match="label 'right' of 'b' has no compressor"):
        comp.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_masked_int4_is_a_bitmask_and_the_kept_codes():
    w = jnp.zeros((4, 8)).at[1, 3].set(7.0).at[2, 5].set(-3.0)
    comp = jc.chain(jc.prune.magnitude(30 / 32), weights(integer(4)))
    leaf = comp.pack(w, comp.init(w))
    assert isinstance(leaf, jc.Masked) and leaf.nnz == 2 and leaf.density == 2 / 32
    np.testing.assert_array_equal(leaf.bitmask, [0, 8, 32, 0])
    np.testing.assert_array_equal(leaf.values.codes, [0x7 | 0xD << 4])  # 7, -3 in two's complement
    assert jc.packed_bytes(leaf) == 4 + 1 + 4 == leaf.bits_per_weight * 32 / 8


def test_a_mask_that_does_not_pay_is_not_stored():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
    comp = jc.chain(jc.prune.magnitude(0.05), weights(integer(8)))
    leaf = comp.pack(w, comp.init(w))
    assert isinstance(leaf, jc.QTensor) and jc.packed_bytes(leaf) == 16 * 16 + 4


def test_pack_of_a_mask_under_jit_is_a_clear_error():
    comp = jc.prune.magnitude(0.5)
    w = jnp.ones((4, 4))
    with pytest.raises(TypeError, match="call it outside jit"):
        jax.jit(comp.pack)(w, comp.init(w))


def test_pack_of_a_quantizer_has_the_bytes_of_its_abstract_evaluation():
    params = small_tree()
    comp = weights(integer(3), axis=-1, group=5)
    state = comp.init(params)
    abstract = jax.eval_shape(comp.pack, params, state)
    assert jc.packed_bytes(abstract) == jc.packed_bytes(comp.pack(params, state))


def test_vmapped_compressor_equals_a_loop():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)
    comp = jc.chain(jc.prune.magnitude(0.5), weights(integer(4), axis=-1))
    state = jax.vmap(comp.init)(stack)
    views = jax.vmap(comp.apply)(stack, state)
    for w, view in zip(stack, views, strict=True):
        np.testing.assert_array_equal(view, comp.apply(w, comp.init(w)))


LEVELS = [
    {"formats"},
    {"core"},
    {"graph"},
    {"quantize", "prune", "distill"},
    {"cost"},
    {"train"},
    {"search"},
    {"export"},
]


def test_imports_point_down():
    root = Path(jc.__file__).parent
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for file in root.rglob("*.py"):
        own = file.relative_to(root).parts[0]
        if own not in level:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "jaxcompress" and len(parts) > 1 and parts[1] != own:
                    assert level[parts[1]] < level[own], f"{file} imports {name}"
                    # The cost model reads packed specs; it never imports a method.
                    assert not (own == "cost" and parts[1] in LEVELS[3]), f"{file} imports {name}"
