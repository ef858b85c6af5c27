"""Network-wise reconstruction: quantized weights tuned until the outputs are the float network's.

Li et al. 2021, BRECQ, arXiv 2102.05426, section 3.2, compare units of reconstruction, of which the
whole network is the largest; Hubara et al. 2020, AdaQuant, arXiv 2006.10518, tune the weights.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcompress.core.compressor import Compressor, CompressState, is_float_array
from jaxcompress.core.sharding.meshes import on_any_mesh
from jaxcompress.formats.scales import QParams
from jaxcompress.quantize.ptq.driver import Progress
from jaxcompress.quantize.ptq.leaf_specs import Rules, plan

Distance = Callable[[Any, Any], Array]


def squared_error(outputs: Any, targets: Any) -> Array:
    """Mean squared error over the mean square of the targets, all outputs together."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True)
    errors = [(jnp.sum((y - t) ** 2), jnp.sum(t**2)) for y, t in pairs]
    return sum(e for e, _ in errors) / jnp.maximum(sum(p for _, p in errors), 1e-30)


@on_any_mesh
def reconstruct(
    apply_fn: Callable[..., Any],
    params: Any,
    data: Iterable[tuple[Any, ...]],
    spec: Rules,
    *,
    quantized: tuple[Any, CompressState] | None = None,
    distance: Distance = squared_error,
    epochs: int = 20,
    learning_rate: float = 1e-4,
    scales: bool = False,
    progress: Progress = iter,
) -> tuple[Any, CompressState]:
    """Float parameters behind their grids, moved by Adam until the outputs are the float network's.

    Minimizes distance(f(Q(p)), f(params)) over p on the data, without labels; gradients go straight
    through the rounding. Every floating leaf moves, those that are not quantized too. The learning
    rate falls to zero as a cosine. Of all epochs the one with the least mean distance is kept, at
    worst the start.

    Args:
      apply_fn, params, data, spec: as `gptq`; `params` are the float parameters.
      quantized: (params, state) of another method; None: rounded to nearest.
      distance: (outputs, targets) -> scalar; for logits `distill.kd` with a temperature of 1.
      epochs: passes over the data.
      learning_rate: of Adam, at the start.
      scales: the scales of integer grids move as well, each by its logarithm, with the gradients of
        Esser et al. 2019, arXiv 1902.08153, eq. 3.
      progress: wraps the epochs, for a progress bar.

    Returns:
      (params, state) for the `apply` and `pack` of `recipe(spec)`; the state as in `quantized`,
      but for scales that moved.

    Raises:
      ValueError: as `spec.plan`.
    """
    planned = plan(apply_fn, params, data, spec)
    start, state = quantized or (params, planned.recipe.init(params))
    total = epochs * len(planned.batches)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(total, 1)))
    problem = _Problem(apply_fn, planned.recipe, distance)
    targets = [_outputs(params, batch, fn=apply_fn) for batch in planned.batches]
    floats, fixed = _split(start)
    moving = _Moving(floats, _no_growth(state) if scales else None)
    tuned = _Tuned(moving, optimizer.init(moving))
    loss = jax.jit(problem.loss)
    judged = lambda moving: _mean(loss, moving, fixed, state, planned.batches, targets)
    best, least = moving, judged(moving)
    step = jax.jit(functools.partial(_step, problem, optimizer))
    for _ in progress(range(epochs)):
        for batch, target in zip(planned.batches, targets, strict=True):
            tuned = step(tuned, fixed, state, batch, target)
        now = judged(tuned.params)
        if now < least:
            best, least = tuned.params, now
    return _join(best.floats, fixed), _grown(state, best.growth)


class _Moving(NamedTuple):
    floats: Any  # of the parameters
    growth: Any  # log of new over old scales, () beside what is no scale; None: they stay


def _is_grid(x: Any) -> bool:
    return isinstance(x, QParams)


def _no_growth(state: CompressState) -> Any:
    zeros = lambda x: jnp.zeros_like(x.scale) if _is_grid(x) else ()
    return jax.tree.map(zeros, state.buffers, is_leaf=_is_grid)


def _grown(state: CompressState, growth: Any) -> CompressState:
    if growth is None:
        return state
    grow = lambda x, by: x._replace(scale=x.scale * jnp.exp(by)) if _is_grid(x) else x
    return state._replace(buffers=jax.tree.map(grow, state.buffers, growth, is_leaf=_is_grid))


class _Problem(NamedTuple):
    fn: Callable[..., Any]
    recipe: Compressor
    distance: Distance

    def loss(self, moving, fixed, state, batch, target) -> Array:
        """The distance of one batch."""
        view = self.recipe.apply(_join(moving.floats, fixed), _grown(state, moving.growth))
        return self.distance(self.fn(view, *batch), target)


class _Tuned(NamedTuple):
    params: Any
    optimizer: Any


@functools.partial(jax.jit, static_argnames=("fn",))
def _outputs(params: Any, batch: Any, *, fn: Callable[..., Any]) -> Any:
    return fn(params, *batch)


def _step(problem: _Problem, optimizer, tuned: _Tuned, fixed, state, batch, target) -> _Tuned:
    gradients = jax.grad(problem.loss)(tuned.params, fixed, state, batch, target)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes its counter with floats
        updates, after = optimizer.update(gradients, tuned.optimizer, tuned.params)
        return _Tuned(optax.apply_updates(tuned.params, updates), after)


def _mean(loss: Callable, moving, fixed, state, batches, targets) -> float:
    losses = [loss(moving, fixed, state, b, t) for b, t in zip(batches, targets, strict=True)]
    return float(jnp.mean(jnp.stack(losses)))


def _split(params: Any) -> tuple[Any, Any]:
    # Floating leaves, which move, and all others; None where the other one has the leaf.
    moving = jax.tree.map(lambda w: w if is_float_array(w) else None, params)
    fixed = jax.tree.map(lambda w: None if is_float_array(w) else w, params)
    return moving, fixed


def _join(moving: Any, fixed: Any) -> Any:
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, moving, fixed, is_leaf=lambda x: x is None)
