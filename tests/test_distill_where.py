"""Masks and labels out of range: every loss counts what it is told to, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import distill
from jaxcompress.train import cross_entropy, hinton_loss

RNG = np.random.default_rng(0)
N, KEEP = 5, np.array([1, 0, 1, 1, 0], bool)
LOGITS = [jnp.asarray(RNG.normal(size=(N, 4)), jnp.float32) for _ in range(2)]
MAPS = [jnp.asarray(RNG.normal(size=(N, 3, 3, 2)), jnp.float32) for _ in range(2)]
LABELS = jnp.asarray([1, 3, 0, 2, 2])
IGNORED = jnp.where(jnp.asarray(KEEP), LABELS, -100)

labelled = lambda loss: lambda s, t, **how: loss(s, t, LABELS[: len(s)], **how)
by_layer = lambda s, t, **how: distill.overhaul([s], [t], [jnp.full(2, -1.0)], **how)
variance = distill.vid_variance(2)

SEPARABLE = {
    "kd": (distill.kd, LOGITS),
    "top_k_kd": (functools.partial(distill.top_k_kd, k=2), LOGITS),
    "dkd": (labelled(distill.dkd), LOGITS),
    "nkd": (labelled(distill.nkd), LOGITS),
    "reverse_kd": (distill.reverse_kd, LOGITS),
    "skew_kd": (distill.skew_kd, LOGITS),
    "reverse_skew_kd": (distill.reverse_skew_kd, LOGITS),
    "generalized_jsd": (distill.generalized_jsd, LOGITS),
    "fitnets": (distill.fitnets, MAPS),
    "attention_transfer": (distill.attention_transfer, MAPS),
    "vid": (lambda s, t, **how: distill.vid(s, t, variance, **how), MAPS),
    "hierarchical_context": (distill.hierarchical_context, MAPS),
    "overhaul": (by_layer, MAPS),
}
RELATIONAL = {
    "dist": (distill.dist, LOGITS),
    "similarity_preserving": (distill.similarity_preserving, MAPS),
    "rkd_distance": (distill.rkd_distance, MAPS),
    "rkd_angle": (distill.rkd_angle, MAPS),
    "pkt": (distill.pkt, MAPS),
    "cckd": (distill.cckd, MAPS),
    "cckd_bilinear": (distill.cckd_bilinear, MAPS),
}


def spoiled(arrays):
    # what does not count may hold anything
    return [x.at[jnp.asarray(~KEEP)].set(jnp.nan) for x in arrays]


@pytest.mark.parametrize("name", SEPARABLE | RELATIONAL)
def test_what_where_leaves_out_has_no_influence(name):
    loss, arrays = (SEPARABLE | RELATIONAL)[name]
    masked = jax.jit(jax.value_and_grad(lambda s, t, m: loss(s, t, where=m)))
    value, grad = masked(*spoiled(arrays), jnp.asarray(KEEP))
    if name in SEPARABLE:
        each = np.asarray(loss(*arrays, per_example=True), np.float64)
        want = np.sum(each * KEEP) / np.sum(KEEP)
        alone = loss(*spoiled(arrays), where=jnp.asarray(KEEP), per_example=True)
        np.testing.assert_allclose(alone, np.where(KEEP, each, 0.0), rtol=1e-5, atol=1e-7)
    else:  # relations among those that count alone
        want = loss(*(x[KEEP] for x in arrays))
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-6)
    assert np.isfinite(grad).all() and not np.any(np.asarray(grad)[~KEEP])
    assert np.any(np.asarray(grad)[KEEP])
    none, grad = masked(*arrays, jnp.zeros(N, bool))
    assert float(none) == 0.0 and not np.any(grad)
    with pytest.raises(ValueError, match=r"where must be a mask of shape \(5,\), got \(4,\)"):
        loss(*arrays, where=jnp.ones(4))


def cross_entropy_alone(s, t, labels, **how):
    del t
    return cross_entropy(s, labels, **how)


def hinton(s, t, labels, **how):
    return hinton_loss(**how)(s, labels, t, jnp.int32(0))[0]


def mutual(s, t, labels, **how):
    loss = distill.mutual_loss(cross_entropy, **how)
    return loss(jnp.stack([s, t]), labels, None, jnp.int32(0))[0]


@pytest.mark.parametrize("loss", [distill.dkd, distill.nkd, cross_entropy_alone, hinton, mutual])
def test_labels_out_of_range(loss):
    kept = [x[KEEP] for x in LOGITS]
    ignoring = jax.value_and_grad(lambda s, t: loss(s, t, IGNORED, ignore_label=-100))
    value, grad = ignoring(*spoiled(LOGITS) if loss is not mutual else LOGITS)
    np.testing.assert_allclose(value, loss(*kept, LABELS[KEEP]), rtol=1e-5)
    assert not np.any(np.asarray(grad)[~KEEP])
    for wrong in (-100, -1, 4):
        value = loss(*LOGITS, LABELS.at[2].set(wrong))
        assert np.isnan(value)
        still = loss(*LOGITS, IGNORED.at[2].set(wrong), ignore_label=-100)
        assert np.isnan(still) or wrong == -100


def test_cross_entropy_by_the_definition():
    z = np.asarray(LOGITS[0], np.float64)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(N), np.asarray(LABELS)]
    got = cross_entropy(LOGITS[0], IGNORED, ignore_label=-100)
    np.testing.assert_allclose(got, nll[KEEP].mean(), rtol=1e-6)
    soft = jax.nn.one_hot(LABELS, 4)
    got = cross_entropy(LOGITS[0], soft, where=jnp.asarray(KEEP))
    np.testing.assert_allclose(got, nll[KEEP].mean(), rtol=1e-6)


def test_crd_leaves_the_memories_of_what_does_not_count():
    projections, memory = distill.crd_init(jax.random.key(0), *MAPS, examples=8, width=4)
    indices, negatives = jnp.arange(N), jnp.tile(jnp.arange(5, 8), (N, 1))
    run = lambda arrays, rows, **how: distill.crd(
        arrays[0], arrays[1], indices[rows], negatives[rows], projections, memory, **how
    )
    got, new = run(spoiled(MAPS), slice(None), where=jnp.asarray(KEEP))
    want, alone = run([x[KEEP] for x in MAPS], KEEP)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(new, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
