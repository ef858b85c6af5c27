"""N:M, blocks, channels and heads: counts, brute force, edges."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.prune.masking.given_masks import masks_of_scores
from jaxcompress.prune.masking.magnitudes import magnitude
from jaxcompress.prune.masking.n_to_m import n_m
from jaxcompress.prune.masking.schedules import linear
from jaxcompress.prune.masking.structures import block, channel, head, unstructured

pytestmark = pytest.mark.broad


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def all_nm(scores, pattern):
    choose = jax.jit(lambda s: masks_of_scores(s, structure=pattern, min_ndim=1))
    return np.asarray(choose(scores))


@pytest.mark.parametrize("n, m", [(2, 4), (3, 5)])
def test_n_m_keeps_the_best_of_all_patterns(n, m):
    scores = normal(3, 4 * m, 2)
    mask = all_nm(scores, n_m(n, m))
    groups = np.moveaxis(np.asarray(scores), 1, 2).reshape(-1, m)
    kept = np.moveaxis(mask, 1, 2).reshape(-1, m)
    assert np.all(kept.sum(1) == n)
    patterns = np.array(list(itertools.combinations(range(m), n)))
    best = groups[:, patterns].sum(2).max(1)
    np.testing.assert_allclose(np.where(kept, groups, 0).sum(1), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, -2, 2])
@pytest.mark.parametrize("length", [1, 7])
def test_n_m_of_a_ragged_group_keeps_its_share_on_any_axis(axis, length):
    shape = [3, 2, 5]
    shape[axis] = length
    mask = np.moveaxis(all_nm(jnp.abs(normal(*shape)), n_m(2, 4, axis=axis)), axis, 0)
    for start in range(0, length, 4):
        size = min(4, length - start)
        assert np.all(mask[start : start + size].sum(0) == math.ceil(2 * size / 4))


def test_n_m_ties_keep_the_lower_index_and_nan_and_signs_are_ordered():
    ties = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, -0.0, -1.0, -1.0, 3.0, 3.0])
    assert all_nm(ties, n_m(2, 4, axis=0)).astype(int).tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    odd = jnp.array([jnp.nan, -jnp.inf, -5.0, -4.0, jnp.nan, -jnp.inf, jnp.nan, -1.0])
    pattern = n_m(2, 4, axis=0)
    mask = pattern.expand(jnp.zeros(2, bool), odd)
    assert mask.astype(int).tolist() == [0, 0, 1, 1, 1, 0, 0, 1]


def test_n_m_is_idempotent_and_packs_as_such():
    w = normal(16, 8)
    comp = magnitude(structure=n_m(2, 4))
    state = comp.init(w)
    view = comp.apply(w, state)
    np.testing.assert_array_equal(comp.init(view).buffers.masks, state.buffers.masks)
    packed = comp.pack(w, state)
    # a bit per weight is 16 bytes; two bits for each of those kept as many
    assert jc.packed_bytes(packed) <= 64 * 4 + 16
    np.testing.assert_array_equal(jc.unpack(packed), view)


def test_a_schedule_of_n_m_is_the_share_of_groups_and_the_cheapest_go_first():
    w = normal(40, 5)
    comp = magnitude(linear(0.0, 1.0, end=4), structure=n_m(2, 4))
    update, state = jax.jit(comp.update), comp.init(w)
    groups = np.abs(np.asarray(w)).reshape(10, 4, 5)
    lost = np.sort(groups, axis=1)[:, :2].sum(1)
    for step in range(1, 5):
        state = update(w, state)
        kept = np.asarray(state.buffers.masks).reshape(10, 4, 5).sum(1)
        done = kept == 2
        assert done.sum() == round(50 * step / 4) and np.all(done | (kept == 4))
        assert step == 4 or lost[done].max() < lost[~done].min()


def test_weights_of_a_unit_add_up():
    # everything that may go, and for N:M what stays in every group
    shape = (7, 10)
    cases = [(unstructured(), 0), (block((3, 4)), 0), (channel(-2), 0), (head(5), 0)]
    for structure, stays in [*cases, (n_m(2, 4, axis=-1), 7 * 5), (n_m(1, 3), 10 * 3)]:
        units = jax.eval_shape(structure.pool, jnp.ones(shape)).shape
        assert np.broadcast_to(structure.weights(shape), units).sum() == 70 - stays


def test_blocks_are_means_of_what_they_hold():
    scores = jnp.abs(normal(2, 7, 10))
    pooled = np.asarray(block((3, 4)).pool(scores))
    assert pooled.shape == (2, 3, 3)
    for a, i, j in np.ndindex(pooled.shape):
        want = np.mean(
            np.asarray(scores)[a, 3 * i : 3 * i + 3, 4 * j : 4 * j + 4], dtype=np.float64
        )
        np.testing.assert_allclose(pooled[a, i, j], want, rtol=1e-6)
    units = jnp.asarray(np.random.default_rng(1).random(pooled.shape) < 0.5)
    want = np.asarray(units).repeat(3, 1)[:, :7].repeat(4, 2)[:, :, :10]
    np.testing.assert_array_equal(block((3, 4)).expand(units, scores), want)


def test_an_edge_block_is_not_the_smaller_for_being_short():
    scores = jnp.ones((4, 5)).at[:, 4].set(2.0)
    mask = masks_of_scores(scores, 0.75, structure=block((2, 4)))  # one of four blocks stays
    assert np.asarray(mask).astype(int).tolist() == [[0, 0, 0, 0, 1]] * 2 + [[0] * 5] * 2


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_by_their_means_with_an_exact_count(axis):
    scores = jnp.abs(normal(6, 9, 8))
    mask = np.moveaxis(np.asarray(masks_of_scores(scores, 0.3, structure=channel(axis))), axis, 0)
    n = mask.shape[0]
    flat = mask.reshape(n, -1)
    assert np.all(flat.all(1) == flat.any(1)) and flat.all(1).sum() == round(0.7 * n)
    means = np.moveaxis(np.asarray(scores, float), axis, 0).reshape(n, -1).mean(1)
    assert means[flat.all(1)].min() > means[~flat.all(1)].max()


def test_heads_are_consecutive():
    scores = jnp.abs(normal(3, 12))
    mask = np.asarray(masks_of_scores(scores, 0.5, structure=head(4)))
    heads = mask.reshape(3, 4, 3)
    whole = heads.all(axis=(0, 2))
    assert np.all(whole == heads.any(axis=(0, 2))) and whole.sum() == 2
    means = np.asarray(scores, float).reshape(3, 4, 3).mean(axis=(0, 2))
    assert means[whole].min() > means[~whole].max()


@pytest.mark.parametrize(
    "structure", [n_m(2, 4), block((4, 4)), channel(-1), head(2)], ids=lambda s: type(s).__name__
)
def test_empty_leaves_and_small_dtypes(structure):
    empty = magnitude(0.5, structure=structure)
    for shape in [(0, 4), (4, 0)]:
        state = jax.eval_shape(empty.init, jnp.zeros(shape))
        assert state.buffers.masks.shape == shape
    w = normal(8, 8).astype(jnp.bfloat16)
    want = masks_of_scores(jnp.abs(w.astype(jnp.float32)), 0.5, structure=structure)
    np.testing.assert_array_equal(empty.init(w).buffers.masks, want)


@pytest.mark.parametrize(
    "structure", [n_m(2, 4), block((4, 4)), channel(-1)], ids=lambda s: type(s).__name__
)
def test_masks_are_the_same_on_eight_devices(structure):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    scores = jnp.abs(normal(32, 16))
    choose = jax.jit(lambda s: masks_of_scores(s, 0.5, structure=structure))
    placed = jax.device_put(scores, NamedSharding(mesh, PartitionSpec("d", None)))
    np.testing.assert_array_equal(choose(placed), choose(scores))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: n_m(5, 4), "n_m needs 0 < n <= m, got n=5, m=4"),
        (lambda: block(()), "block needs sizes of at least 1"),
        (lambda: block((4, 0)), "block needs sizes of at least 1"),
        (lambda: head(0), "at least 1 head, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "structure, message",
    [
        (n_m(2, 4, axis=2), r"a/w: n_m: axis 2 is none of an array of shape \(6, 9\)"),
        (channel(-3), "a/w: channel: axis -3 is none"),
        (block((2, 2, 2)), r"a/w: block\(2, 2, 2\) needs 3 axes, got shape \(6, 9\)"),
        (head(4), r"a/w: an axis of 9 \(axis -1 of \(6, 9\)\) does not divide into 4 heads"),
    ],
)
def test_errors_name_the_leaf(structure, message):
    with pytest.raises(ValueError, match=message):
        magnitude(0.5, structure=structure).init({"a": {"w": jnp.ones((6, 9))}})


def test_a_structure_that_fixes_its_share_takes_none_or_that_one():
    w = normal(8, 3)
    for comp in (magnitude(structure=n_m(2, 4)), magnitude(0.5, structure=n_m(2, 4))):
        kept = np.asarray(comp.init(w).buffers.masks).reshape(2, 4, 3).sum(1)
        assert (kept == 2).all()
    kept = np.asarray(masks_of_scores(jnp.abs(w), 0.75, structure=n_m(1, 4)))
    assert (kept.reshape(2, 4, 3).sum(1) == 1).all()
    for wrong in (0.25, 1.0, 0.0):
        with pytest.raises(ValueError, match="contradicts NM.n=2, m=4, .* makes 0.5 of the"):
            magnitude(wrong, structure=n_m(2, 4))
    with pytest.raises(ValueError, match="sparsity must be given: this structure fixes no share"):
        magnitude(structure=block((2, 2)))
