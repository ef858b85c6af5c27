"""Training within a budget: what was compressed learns from what it was."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.compressor import Compressor, identity
from jaxcompress.formats import Format
from jaxcompress.graph.layers.layer_by_layer import Progress
from jaxcompress.prune.sparse_training.optimizers import masked_optimizer
from jaxcompress.quantize.fake_quantized_activations import activations as quantize_activations
from jaxcompress.quantize.ranges.min_max import moving_average
from jaxcompress.train.convolutions import fast_kernel_gradients
from jaxcompress.train.data import batches as batches_of
from jaxcompress.train.data import key_at
from jaxcompress.train.loop import fit
from jaxcompress.train.step import hinton_loss, make_step, stateless
from jaxcompress.train.train_state import TrainState, create

_TIMED = 3  # steps from which the seconds of one are taken


@dataclass(frozen=True)
class Training:
    """Data and effort of fine-tuning by distillation from the network as it was.

    Attributes:
      inputs: [N, ...], examples; as the network takes them, or as `augment` makes them so.
      labels: int [N]; None: the outputs of the network as it was are all there is to learn.
      seconds: of all training, compilation left out; the number of steps is measured.
      steps: instead of seconds, of all training: the same result on every machine.
      size: examples of a step.
      learning_rate: of SGD with Nesterov momentum 0.9, at the start; it falls along a cosine.
      ce_weight: of the cross-entropy to the labels; the rest is the teacher's.
      augment: (key, inputs [size, ...]) -> inputs of the network, the same for the teacher.
      seed: of order and augmentation.

    Raises:
      ValueError: both or none of seconds and steps; labels of another number than inputs; numbers
        that are not positive; fewer examples than one step takes.
    """

    inputs: Any = dataclasses.field(repr=False)
    labels: Any = dataclasses.field(default=None, repr=False)
    seconds: float | None = None
    steps: int | None = None
    size: int = 128
    learning_rate: float = 0.01
    ce_weight: float = 0.1
    augment: Callable[[Any, Any], Any] | None = None
    seed: int = 0

    def __post_init__(self):
        if (self.seconds is None) == (self.steps is None):
            raise ValueError("Training: give either seconds or steps")
        for name in ("seconds", "steps", "size", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Training({name}) must be positive, got {value}")
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"Training(ce_weight) must be in [0, 1], got {self.ce_weight}")
        count = np.shape(self.inputs)[0]
        if self.labels is not None and np.shape(self.labels) != (count,):
            raise ValueError(
                f"Training(labels) must have the shape ({count},), got {np.shape(self.labels)}"
            )
        if count < self.size:
            raise ValueError(f"Training(size): {self.size} examples a step, there are {count}")

    def part(self, share: float) -> "Training":
        """The same with a share of the seconds or steps."""
        if self.seconds is not None:
            return dataclasses.replace(self, seconds=self.seconds * share)
        assert self.steps is not None
        return dataclasses.replace(self, steps=max(1, round(self.steps * share)))

    def batch_at(self) -> Callable[[int], tuple[Any, Any]]:
        """step -> (inputs, labels); zeros for labels where there are none."""
        count = np.shape(self.inputs)[0]
        labels = np.zeros(count, np.int32) if self.labels is None else np.asarray(self.labels)
        plain = batches_of((self.inputs, labels), size=self.size, seed=self.seed)
        root, augment = jax.random.key(self.seed), self.augment
        if augment is None:
            return plain
        changed = jax.jit(lambda step, x: augment(key_at(root, "augment", step), x))

        def batch(step: int) -> tuple[Any, Any]:
            inputs, targets = plain(step)
            return changed(step, inputs), targets

        return batch


def finetune(
    apply_fn: Callable[..., Any],
    params: Any,
    training: Training,
    *,
    teacher: tuple[Callable[..., Any], Any],
    recipe: Compressor | None = None,
    activations: Format | None = None,
    progress: Progress = iter,
) -> TrainState:
    """Trains params, compressed by a recipe on the way, against a teacher and labels.

    SGD with Nesterov momentum and a cosine learning rate, gradients clipped to norm 1; what the
    recipe masks stays exactly zero.

    Args:
      apply_fn: pure, (params, inputs) -> logits [B, classes].
      params: where training starts.
      training: data and effort.
      teacher: (apply_fn, params) of the network as it was.
      recipe: how params are compressed in every forward pass.
      activations: format of all activations, their ranges moving averages; None: as they are.
      progress: wraps the steps.

    Returns:
      The state of `train.make_step` at the end: `params` and `compress` for `recipe.pack`.

    Raises:
      FloatingPointError: the loss is not finite; a smaller learning rate may help.
    """
    recipe, batch = recipe or identity(), training.batch_at()
    forward = fast_kernel_gradients(apply_fn)
    quantizer, statistics = None, ()
    if activations is not None:
        quantizer = quantize_activations(apply_fn, activations, calibrate=moving_average())
        statistics = quantizer.init(recipe.apply(params, recipe.init(params)), batch(0)[0])
        quantizer = quantizer._replace(train=fast_kernel_gradients(quantizer.train))
    ce_weight = 0.0 if training.labels is None else training.ce_weight
    loss = hinton_loss(temperature=1.0, kd_weight=1.0 - ce_weight, ce_weight=ce_weight)

    def setup(steps: int) -> tuple[Any, TrainState]:
        tx = _optimizer(training.learning_rate, steps)
        step = make_step(
            stateless(forward), tx, recipe=recipe, loss=loss, teacher=teacher[0],
            activations=quantizer,
        )  # fmt: skip
        return step, create(params, recipe, tx, activations=statistics)

    steps = training.steps or _steps(*setup(1), batch, teacher[1], training.seconds or 0.0)
    step, state = setup(steps)
    return fit(step, state, batch, steps=steps, teacher_params=teacher[1], progress=progress)


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    def rate(count: Any) -> jax.Array:
        # optax.cosine_decay_schedule, without its implicit promotion of the count of steps.
        done = jnp.minimum(jnp.asarray(count, jnp.float32) / steps, 1.0)
        return learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return masked_optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9, nesterov=True))
    )


def _steps(step: Any, state: TrainState, batch: Any, teacher_params: Any, seconds: float) -> int:
    """How many steps take so long, from a few after the first, which compiles."""
    state, metrics = step(state, teacher_params, batch(0))
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for number in range(_TIMED):
        state, metrics = step(state, teacher_params, batch(number))
    jax.block_until_ready(metrics)
    each = (time.perf_counter() - start) / _TIMED
    return max(1, math.floor(seconds / each))
