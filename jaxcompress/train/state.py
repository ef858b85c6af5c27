"""All that training changes, as one pytree."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.compressor import Compressor, CompressState, is_float_array
from jaxcompress.core.paths import leaves_with_paths


class Trainable(NamedTuple):
    """What Optax updates: the params, and what is learned beside them.

    Attributes:
      params: the dense float parameters.
      learned: of the compressor: step sizes, thresholds.
      activations: of the activation quantizer: step sizes, clipping levels.
    """

    params: Any
    learned: Any
    activations: Any = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The donated argument of a train step; `()` is what is absent.

    Attributes:
      step: int32, optimizer steps done.
      params: the dense float parameters.
      compress: state of the compressor (masks, scales, learned steps).
      opt: state of the Optax optimizer, over `Trainable`.
      model_state: what the forward pass changes (BatchNorm statistics).
      activations: range statistics of the activation quantizer; a `CompressState` where it learns.
      distill: state of distillation losses (projectors, memories).
      ema: moving average of the params.
    """

    step: jax.Array
    params: Any
    compress: CompressState
    opt: Any
    model_state: Any = ()
    activations: Any = ()
    distill: Any = ()
    ema: Any = ()

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def trainable(self) -> Trainable:
        """What Optax updates."""
        acts = self.activations
        learned = acts.learned if isinstance(acts, CompressState) else ()
        return Trainable(self.params, self.compress.learned, learned)

    def with_trainable(self, new: Trainable) -> "TrainState":
        """The state with these in their places; it may be called while tracing a gradient."""
        acts = self.activations
        if isinstance(acts, CompressState):
            acts = acts._replace(learned=new.activations)
        return self.replace(
            params=new.params,
            compress=self.compress._replace(learned=new.learned),
            activations=acts,
        )


def create(
    params: Any,
    recipe: Compressor,
    tx: optax.GradientTransformation,
    *,
    model_state: Any = (),
    activations: Any = (),
    distill: Any = (),
    with_ema: bool = False,
) -> TrainState:
    """The state at step 0; the params are copied, since the step donates its state.

    Raises:
      TypeError: a leaf of the params is not a floating point array, with its path.

    >>> from jaxcompress.core import identity
    >>> state = create({"w": jnp.ones(2)}, identity(), optax.sgd(0.1))
    >>> int(state.step), state.compress.learned
    (0, ())
    """
    for path, leaf in leaves_with_paths(params):
        if not is_float_array(leaf):
            raise TypeError(
                f"params: {path}: a gradient needs floating point arrays, got "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}; keep it in model_state"
            )
    params = jax.tree.map(jnp.array, params)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        compress=jax.tree.map(jnp.array, recipe.init(params)),
        opt=(),
        model_state=jax.tree.map(jnp.array, model_state),
        activations=jax.tree.map(jnp.array, activations),
        distill=jax.tree.map(jnp.array, distill),
        ema=jax.tree.map(jnp.array, params) if with_ema else (),
    )
    return state.replace(opt=tx.init(state.trainable))


def label_learned(trainable: Trainable) -> Trainable:
    """ "params" or "learned" for every leaf: groups for `optax.partition`.

    Step sizes want no weight decay and often a learning rate of their own.

    >>> labels = label_learned(Trainable({"w": 1.0}, {"w": 0.1}))
    >>> labels.params, labels.learned
    ({'w': 'params'}, {'w': 'learned'})
    """
    labels = jax.tree.map(lambda _: "learned", trainable)
    return labels._replace(params=jax.tree.map(lambda _: "params", trainable.params))
