"""Widths by what the network loses: against all combinations, and within the limit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.graph.coupling.dependency_graph import axes
from jaxcompress.prune.channels.choose import group_macs
from jaxcompress.search import Infeasible, WidthChoice, kl, narrow

pytestmark = pytest.mark.broad

RNG = np.random.default_rng(0)
SIZES = {"a": 5, "b": 6, "c": 4}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def blocks(p, x):
    """Residual blocks: the MACs of their inner widths add up."""
    for name in SIZES:
        x = x + jax.nn.relu(x @ p[name]["up"]) @ p[name]["down"]
    return x


def chain(p, x):
    """Layers that lose inputs and outputs: the MACs are products of widths."""
    for name in SIZES:
        x = jax.nn.relu(x @ p[name])
    return x @ p["out"]


BLOCKS = {n: {"up": normal(8, k), "down": 0.7 * normal(k, 8)} for n, k in SIZES.items()}
CHAIN = {"a": normal(8, 12), "b": normal(12, 10), "c": normal(10, 8), "out": normal(8, 5)}
X = normal(64, 8) * 3
BATCHES = [(X[:32],), (X[32:],)]


def of(found):
    return [name for name in found.groups if found.groups[name].size in SIZES.values()]


def test_losses_are_those_of_the_fitted_network_and_the_sum_is_least():
    found = axes(blocks, BLOCKS, X[:1])
    choice = WidthChoice(found, blocks, BLOCKS, BATCHES, of=of(found))
    widths = {name: list(losses) for name, losses in choice.losses.items()}
    assert [sorted(found) for found in widths.values()] == [
        list(range(1, size + 1)) for size in SIZES.values()
    ]
    name = next(iter(widths))
    order = np.argsort(
        np.asarray(jc.prune.group_obs(found, blocks, BLOCKS, BATCHES, of=[name])[name])
    )
    masks = jc.prune.group_masks(found, {name: np.isin(np.arange(5), order[-2:])})
    fitted, _ = jc.prune.sparse_gpt(
        blocks, BLOCKS, BATCHES, {"a/down": 0.0}, masks=masks, sweeps=100
    )
    measured = np.mean([float(kl(blocks(fitted, x), blocks(BLOCKS, x), None)) for (x,) in BATCHES])
    assert choice.losses[name][2] == pytest.approx(measured, rel=0.02)

    def sums(limit):
        for picks in itertools.product(*widths.values()):
            kept = {
                n: np.arange(found.groups[n].size) < k for n, k in zip(widths, picks, strict=True)
            }
            if group_macs(found, kept) <= limit * group_macs(found, {}):
                yield sum(choice.losses[n][k] for n, k in zip(widths, picks, strict=True))

    for share in (0.3, 0.5, 0.7, 1.0):
        kept = choice.best(share, candidates=1)
        got = sum(choice.losses[n][int(stays.sum())] for n, stays in kept.items())
        assert got == pytest.approx(min(sums(share)), abs=1e-7)
        assert group_macs(found, kept) <= share * group_macs(found, {})


def test_measured_together_no_candidate_is_better():
    found = axes(blocks, BLOCKS, X[:1])
    choice = WidthChoice(found, blocks, BLOCKS, BATCHES, of=of(found))

    def true(kept):
        return choice._true({name: str(int(stays.sum())) for name, stays in kept.items()})

    assert true(choice.best(0.5, candidates=16)) <= true(choice.best(0.5, candidates=1))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_products_of_widths_stay_within_the_limit(share):
    found = axes(chain, CHAIN, X[:1])
    names = list(found.groups)
    small = narrow(chain, CHAIN, BATCHES, share, allocation="loss", round_to=2)
    macs = group_macs(found, dict(zip(names, _kept(found, small.params), strict=True)))
    assert 0.6 * share < macs / group_macs(found, {}) <= share
    widths = [small.params[name].shape[1] for name in "abc"]
    assert all(width % 2 == 0 for width in widths)
    y = small.fn(small.params, X)
    assert y.shape == (64, 5) and bool(jnp.isfinite(y).all())


def _kept(found, params):
    for name, group in found.groups.items():
        yield np.arange(group.size) < params[name.split("[")[0]].shape[1]


def test_what_cannot_be_is_named():
    found = axes(chain, CHAIN, X[:1])
    choice = WidthChoice(found, chain, CHAIN, BATCHES, of=list(found.groups), levels=2)
    with pytest.raises(Infeasible, match="of them are left at least"):
        choice.best(0.05)
    with pytest.raises(ValueError, match=r"macs must be in \(0, 1\], got 0"):
        choice.best(0)
    with pytest.raises(ValueError, match='allocation must be "uniform" or "loss"'):
        narrow(chain, CHAIN, BATCHES, 0.5, allocation="global")
