"""Pruning that is trained: soft thresholds (STR) and L0 gates, in `learned`, moved by Optax.

How sparse a leaf becomes is not chosen but found: by weight decay on the thresholds (STR), or by
`l0_penalty` in the loss. Weights stay what they are, the view has the zeros. See `soft_movement`
for gates that are 0 or 1.
"""

import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.compressor import (
    Compressor,
    CompressState,
    is_absent,
    per_leaf,
)
from jaxcompress.core.paths import path_str
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.prune.masking.mask_state import prunable, refuse_nan
from jaxcompress.prune.soft.gates import gate_values, packing, weights_per_gate
from jaxcompress.prune.soft.proximal_operators import prox_l1

# The stretched concrete distribution of Louizos et al., section 4.
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1


def soft_threshold(*, initial: float = -6.0, min_ndim: int = 2) -> Compressor:
    """sign(w) relu(|w| - sigmoid(s)) with a learned s per leaf.

    dL/ds = -sigmoid'(s) sum_i g_i sign(w_i) over the weights that stay. The published recipe gives
    s a weight decay (towards 0, where the threshold is 1/2), which is what makes the network
    sparse. The view of a view is thresholded again, so `apply` is not idempotent.

    Args:
      initial: s at the start; -6 is a threshold of 0.0025.
      min_ndim: leaves with fewer axes pass unchanged.

    `learned` holds s, float32 [], for each leaf it acts on.

    Raises:
      ValueError: `initial` is not finite; (at init, eager) NaN in a leaf, with its path; a state of
        another compressor.

    Source: Kusupati et al. 2020, Soft threshold weight reparameterization, arXiv 2002.03231.

    >>> comp = soft_threshold(initial=0.0)
    >>> w = jnp.array([[1.5, -0.25, -2.0]])
    >>> print(comp.apply(w, comp.init(w)))
    [[ 1.   0.  -1.5]]
    """
    if not math.isfinite(initial):
        raise ValueError(f"initial must be finite, got {initial}")

    def init(w: Array) -> CompressState:
        if not prunable(w, min_ndim):
            return CompressState()
        refuse_nan(w)
        return CompressState(learned=jnp.full((), initial, jnp.float32))

    def apply(w: Array, state: CompressState) -> Array:
        if not prunable(w, min_ndim):
            return w
        if is_absent(state.learned):
            raise ValueError("the state holds no threshold: it was made by another compressor")
        return _shrunk(w, state.learned)

    return per_leaf(init, apply, pack=packing(apply))


# Compiled also where the caller is not: the same operations fused the same way, bit for bit.
@jax.jit
def _shrunk(w: Array, s: Array) -> Array:
    # w~ = sign(w) relu(|w| - sigmoid(s))
    return prox_l1(w.astype(jnp.float32), jax.nn.sigmoid(s)).astype(w.dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["log_alpha"], meta_fields=["size"]
)
@dataclass(frozen=True)
class Gates:
    """The learned part of `l0` of a leaf.

    Attributes:
      log_alpha: float32, the leaf's shape, 1 where an axis shares its gates.
      size: weights per gate.
    """

    log_alpha: Array
    size: int


class GateNoise(NamedTuple):
    """The buffers of `l0` of a leaf."""

    key: Array  # uint32 [2], threefry; `update` draws the next
    noisy: Array  # bool []; False: gates are at their test values


def l0(
    *,
    axis: int | tuple[int, ...] | None = None,
    open_rate: float = 0.9,
    seed: int = 0,
    min_ndim: int = 2,
) -> Compressor:
    """w * z with hard concrete gates z in [0, 1], whose log_alpha are learned.

    After `init` gates have their test values z = clip(sigmoid(log_alpha) (zeta - gamma) + gamma,
    0, 1), zeta = 1.1, gamma = -0.1. Every `update` draws new noise, from then on they are
    z = clip(sigmoid((logit u + log_alpha) / beta) (zeta - gamma) + gamma, 0, 1), u uniform,
    beta = 2/3. Evaluate and pack with `without_noise(state)`; add a multiple of `l0_penalty(state)`
    to the loss. A view of a view is gated twice, so `apply` is not idempotent.

    Args:
      axis: axes with gates of their own: -1, one gate per output of a Flax kernel; None: one gate
        per weight.
      open_rate: sigmoid(log_alpha) at the start, in (0, 1).
      seed: of the noise; every leaf has its own key.
      min_ndim: leaves with fewer axes pass unchanged.

    `learned` holds `Gates` for each leaf it acts on, `buffers` holds `GateNoise`.

    Raises:
      ValueError: an open_rate outside (0, 1); (at init) an axis that a leaf does not have, NaN in a
        leaf (eager), with its path; a state of another compressor.

    Source: Louizos et al. 2018, Learning sparse neural networks through L0, arXiv 1712.01312.

    >>> comp = l0(axis=-1, open_rate=0.5)
    >>> w = jnp.ones((3, 2))
    >>> state = comp.init(w)
    >>> print(comp.apply(w, state)[0], state.learned.log_alpha.shape)
    [0.5 0.5] (1, 2)
    """
    if not 0 < open_rate < 1:
        raise ValueError(f"open_rate must be between 0 and 1, got {open_rate}")
    start = math.log(open_rate / (1 - open_rate))

    def init(w: Array) -> CompressState:
        if not prunable(w, min_ndim):
            return CompressState()
        refuse_nan(w)
        gates = Gates(gate_values(w, start, axis), weights_per_gate(w.shape, axis))
        return CompressState(gates, GateNoise(jnp.zeros(2, jnp.uint32), jnp.zeros((), bool)))

    def tree_init(params: Any) -> CompressState:
        state = comp.init(params)
        return state._replace(buffers=_map_noise(lambda *node: _seeded(seed, *node), state.buffers))

    def apply(w: Array, state: CompressState) -> Array:
        if not prunable(w, min_ndim):
            return w
        if not isinstance(state.learned, Gates):
            raise ValueError("the state holds no gates: it was made by another compressor")
        return _gated(w, state.learned.log_alpha, state.buffers)

    def update(w: Array, state: CompressState, *, grads: Any = None, **extra: Any) -> CompressState:
        del w, grads, extra
        if is_absent(state.buffers):
            return state
        key = _key_data(state.buffers.key, 1)
        return state._replace(buffers=GateNoise(key, jnp.ones((), bool)))

    comp = per_leaf(init, apply, update=update, pack=packing(apply))
    return comp._replace(init=on_any_mesh(tree_init))


@jax.jit
def _gated(w: Array, log_alpha: Array, noise: GateNoise) -> Array:
    key = jax.random.wrap_key_data(noise.key, impl="threefry2x32")
    logit_u = jax.random.logistic(key, log_alpha.shape, jnp.float32)  # ln u - ln(1 - u)
    # s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta); at test s = sigmoid(log_alpha)
    s = jax.nn.sigmoid(jnp.where(noise.noisy, (logit_u + log_alpha) / _BETA, log_alpha))
    # z = clip(s (zeta - gamma) + gamma, 0, 1)
    z = jnp.clip(s * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)
    return jnp.where(z > 0, w.astype(jnp.float32) * z, 0).astype(w.dtype)


def l0_penalty(state: CompressState) -> Array:
    """E[number of weights whose gate is not 0], float32 []; differentiable in `learned`.

    Args:
      state: of a recipe that holds `l0` anywhere; 0 if it does not.

    >>> comp = l0(open_rate=0.5)
    >>> print(l0_penalty(comp.init(jnp.ones((4, 25)))).round())
    83.0
    """
    is_gates = lambda node: isinstance(node, Gates)
    gates = [g for g in jax.tree.leaves(state.learned, is_leaf=is_gates) if is_gates(g)]
    # P(z != 0) = sigmoid(log_alpha - beta ln(-gamma / zeta))
    shift = _BETA * math.log(-_GAMMA / _ZETA)
    counts = [g.size * jnp.sum(jax.nn.sigmoid(g.log_alpha - shift)) for g in gates]
    return sum(counts, start=jnp.zeros((), jnp.float32))


def without_noise(state: CompressState) -> CompressState:
    """The state with all `l0` gates at their test values: what is evaluated and shipped."""
    quiet = lambda path, noise: noise._replace(noisy=jnp.zeros((), bool))
    return state._replace(buffers=_map_noise(quiet, state.buffers))


def _map_noise(fn: Any, buffers: Any) -> Any:
    is_noise = lambda node: isinstance(node, GateNoise)
    run = lambda path, node: fn(path_str(path), node) if is_noise(node) else node
    return jax.tree_util.tree_map_with_path(run, buffers, is_leaf=is_noise)


def _seeded(seed: int, path: str, noise: GateNoise) -> GateNoise:
    root = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    return noise._replace(key=_key_data(root, zlib.crc32(path.encode())))


def _key_data(key: Array, number: int) -> Array:
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(typed, number))
