"""One jitted, donated train step in which teacher, masks, quantizers and schedules compose."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import reshard

from jaxcompress.core.compressor import Compressor, CompressState, identity, is_absent
from jaxcompress.core.numbers import Number, number_at
from jaxcompress.core.sharding.meshes import on_any_mesh, shardings_at_rest
from jaxcompress.distill.logits import kd
from jaxcompress.distill.masks import kept_rows, poisoned, reduced, zeroed
from jaxcompress.prune.masking.mask_state import masks as find_masks
from jaxcompress.quantize.fake_quantized_activations import ActivationQuantizer
from jaxcompress.train.train_state import TrainState


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    ignore_label: int | None = None,
) -> jax.Array:
    """Mean cross-entropy of [..., classes] logits with [...] integer labels, in float32.

    Args:
      logits: [..., classes].
      labels: integers [...]; or float [..., classes] probabilities, as `augment.mixup` makes them.
        The loss is NaN where an integer is none of the classes.
      where: [...], nonzero where an example counts; None: everywhere.
      ignore_label: integer labels of this value do not count; -100 is the usual mark.

    >>> z = jnp.array([[0.0, 0.0], [9.0, 0.0]])
    >>> print(cross_entropy(z, jnp.array([1, -100]), ignore_label=-100).round(4))
    0.6931
    """
    logits, rows = logits.astype(jnp.float32), logits.shape[:-1]
    keep = kept_rows(where, rows, labels=labels, ignore_label=ignore_label)
    logits, labels = zeroed(keep, logits, labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        losses = optax.softmax_cross_entropy(logits, labels.astype(jnp.float32))
        return reduced(losses, False, keep)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return reduced(poisoned(losses, labels, logits.shape[-1]), False, keep)


def hinton_loss(
    *,
    temperature: Number = 4.0,
    kd_weight: Number = 0.9,
    ce_weight: Number = 0.1,
    ignore_label: int | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """ce_weight * cross-entropy + kd_weight * KD, for `make_step`; numbers may be schedules.

    Returns a loss (outputs, labels, teacher_outputs, step, *, where=None) -> (scalar, metrics).
    Without a teacher (outputs None) only the cross-entropy counts, with weight 1. Neither term
    counts what `where` leaves out, nor what has the label `ignore_label`.

    Source: Hinton et al. 2015, arXiv 1503.02531; weights as in its usual CIFAR recipes.
    """

    def loss(outputs, labels, teacher_outputs, step, *, where=None):
        keep = kept_rows(where, outputs.shape[:-1], labels=labels, ignore_label=ignore_label)
        ce = cross_entropy(outputs, labels, where=keep)
        if teacher_outputs is None:
            return ce, {"cross_entropy": ce}
        soft = kd(outputs, teacher_outputs, temperature=number_at(temperature, step), where=keep)
        total = number_at(ce_weight, step) * ce + number_at(kd_weight, step) * soft
        return total, {"cross_entropy": ce, "kd": soft}

    return loss


def stateless(apply_fn: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A forward for `make_step` from apply_fn(params, inputs): the model state stays as it is."""
    return lambda params, model_state, inputs: (apply_fn(params, inputs), model_state)


def _accepts(function: Callable[..., Any], name: str) -> bool:
    # optax.MultiSteps passes extra arguments on without being an extra-args transformation.
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check(state: TrainState, activations: Any, ema_decay: float | None, stateful: bool) -> None:
    if stateful and not isinstance(state.distill, CompressState):
        raise ValueError(
            "the loss is stateful, but the state has nothing for it: create(..., "
            "distill=core.CompressState(learned, buffers))"
        )
    if activations is not None and is_absent(state.activations):
        raise ValueError(
            "activations are quantized, but the state has no statistics of them: "
            "create(..., activations=quantizer.init(params, inputs))"
        )
    if (ema_decay is None) != is_absent(state.ema):
        raise ValueError(
            f"ema_decay={ema_decay}, but the state was created with "
            f"with_ema={not is_absent(state.ema)}"
        )


def make_step(
    forward: Callable[..., tuple[Any, Any]],
    tx: optax.GradientTransformation,
    *,
    recipe: Compressor | None = None,
    loss: Callable[..., Any] | None = None,
    teacher: Callable[[Any, Any], Any] | None = None,
    activations: ActivationQuantizer | None = None,
    ema_decay: float | None = None,
    recipe_sees: str = "params",
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds step(state, teacher_params, (inputs, labels)) -> (state, metrics), jitted.

    In order: the recipe's `update` (schedules, masks, scales), the view, the forward pass with
    quantized activations, the loss against the teacher, the optimizer, the moving average. The
    state is donated, the teacher is not; metrics stay on the device. Everything that changes
    from step to step is traced, and the new state lies as the old one did, so that training
    compiles once; what of a state on a mesh is on no mesh yet is copied to all its devices first.

    Args:
      forward: (params, model_state, inputs) -> (outputs, model_state); see `stateless`.
      tx: any optimizer; `prune.masked_optimizer(tx)` keeps pruned weights exactly zero.
      recipe: how params are compressed; default `identity()`.
      loss: (outputs, labels, teacher_outputs, step) -> (scalar, metrics); default
        `hinton_loss()`. A loss with an argument `distill` is stateful: it gets `state.distill`, a
        `CompressState`, and returns (scalar, metrics, buffers); what is learned there (projectors,
        a temperature) is trained beside the params.
      teacher: (teacher_params, inputs) -> outputs; None: no teacher, pass () for its params.
      activations: built on `forward` itself, or on (params, inputs) -> outputs of the same
        network; it then replaces `forward`, and in the second case model state does not change.
        What it learns (steps, clips) is trained beside the params.
      ema_decay: decay of `state.ema` (create it with `with_ema=True`), in [0, 1); the average is
        float32 also where params are bfloat16 or float16.
      recipe_sees: "params": the recipe's `update` comes first, as said, without gradients.
        "gradients": it comes after the loss and before the optimizer, with the gradients by the
        params (dense where a mask is straight through): for methods that look at them, such as
        RigL, SNFS, Taylor and movement, which do nothing without. What else the recipe renews,
        scales say, is then one optimizer step older than the params.

    Raises:
      ValueError: `recipe_sees` is neither, `ema_decay` outside [0, 1); (at the first step) a state
        that does not fit.
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be at least 0 and below 1, got {ema_decay}")
    if recipe_sees not in ("params", "gradients"):
        raise ValueError(f'recipe_sees must be "params" or "gradients", got {recipe_sees!r}')
    recipe = recipe or identity()
    loss = on_any_mesh(loss or hinton_loss())
    accepts_masks = _accepts(tx.update, "masks")
    stateful = "distill" in inspect.signature(loss).parameters

    def objective(trainable, state, teacher_params, inputs, labels):
        state = state.with_trainable(trainable)
        view = recipe.apply(state.params, state.compress)
        model_state, statistics = state.model_state, state.activations
        if activations is None:
            outputs, model_state = forward(view, model_state, inputs)
        elif activations.apply_fn is forward:
            both, statistics = activations.train(statistics, view, model_state, inputs)
            outputs, model_state = both
        else:
            outputs, statistics = activations.train(statistics, view, inputs)
        known = None
        if teacher is not None:
            known = jax.lax.stop_gradient(teacher(teacher_params, inputs))
        distill = state.distill
        if stateful:
            value, metrics, buffers = loss(outputs, labels, known, state.step, distill=distill)
            distill = distill._replace(buffers=jax.lax.stop_gradient(buffers))
        else:
            value, metrics = loss(outputs, labels, known, state.step)
        changed = {"model_state": model_state, "activations": statistics, "distill": distill}
        return value, (metrics, changed)

    def step(state: TrainState, teacher_params: Any, batch: tuple[Any, Any]):
        inputs, labels = batch
        _check(state, activations, ema_decay, stateful)
        if recipe_sees == "params":
            state = state.replace(compress=recipe.update(state.params, state.compress))
        trainable = state.trainable
        (value, (metrics, changed)), grads = jax.value_and_grad(objective, has_aux=True)(
            trainable, state, teacher_params, inputs, labels
        )
        if recipe_sees == "gradients":
            compress = recipe.update(state.params, state.compress, grads=grads.params)
            state = state.replace(compress=compress)
        everything = jax.tree.map(lambda _: jnp.ones((), bool), trainable)
        kept = everything._replace(params=find_masks(state.compress, state.params))
        extra = {"masks": kept} if accepts_masks else {}
        updates, opt = tx.update(grads, state.opt, trainable, **extra)
        new: Any = optax.apply_updates(trainable, updates)
        state = state.replace(step=state.step + 1, opt=opt, **changed).with_trainable(new)
        if ema_decay is not None:
            params = jax.tree.map(lambda p, mean: p.astype(mean.dtype), state.params, state.ema)
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
            state = state.replace(ema=ema)
        return state, {"loss": value, **metrics}

    return _at_rest(step)


def _at_rest(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step jitted, its state sharded after as before, whatever the compiler would choose."""

    def staying(state: TrainState, teacher_params: Any, batch: Any, *, layout: Any):
        state, metrics = step(state, teacher_params, batch)
        if layout is not None:
            leaves, treedef = jax.tree.flatten(state)
            stay = reshard if layout[0].mesh.explicit_axes else jax.lax.with_sharding_constraint
            state = treedef.unflatten(map(stay, leaves, layout))
        return state, metrics

    jitted: Any = jax.jit(staying, static_argnames="layout", donate_argnums=0)

    def settled(state: Any) -> tuple[Any, Any]:
        layout = shardings_at_rest(state)
        if layout is None:
            return state, None
        leaves, treedef = jax.tree.flatten(state)
        placed = map(jax.device_put, leaves, layout)
        return treedef.unflatten(placed), layout

    @functools.wraps(step)
    def run(state: TrainState, teacher_params: Any, batch: tuple[Any, Any]):
        state, layout = settled(state)
        return jitted(state, teacher_params, batch, layout=layout)

    def lower(state: TrainState, teacher_params: Any, batch: tuple[Any, Any]) -> Any:
        state, layout = settled(state)
        return jitted.lower(state, teacher_params, batch, layout=layout)

    vars(run).update(lower=lower, _cache_size=jitted._cache_size)
    return run
