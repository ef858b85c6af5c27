"""All that training changes, as one pytree."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.compressor import Compressor, CompressState, is_float_array
from jaxcompress.core.paths import leaves_with_paths


class Trainable(NamedTuple):
    """What Optax updates: the params, and what is learned beside them."""

    params: Any
    learned: Any  # by the compressor
    activations: Any = ()  # by the activation quantizer
    distill: Any = ()  # by the loss: projectors, temperatures


def learned_part(state: Any) -> Any:
    """What Optax trains of a quantizer's or loss's state; `()` where all are statistics."""
    return state.learned if isinstance(state, CompressState) else ()


def with_learned(state: Any, learned: Any) -> Any:
    """The state with this as its learned part, if it has one."""
    return state._replace(learned=learned) if isinstance(state, CompressState) else state


def label_learned(trainable: Trainable) -> Any:
    """Labels for `optax.multi_transform`: "learned" for quantizers' parameters, else "params".

    Learned steps and clips want a learning rate of their own and seldom weight decay. What a loss
    learns, projectors say, counts as params.

    >>> tx = optax.multi_transform(
    ...     {"params": optax.adamw(1e-3), "learned": optax.adam(1e-4)}, label_learned
    ... )
    >>> label_learned(Trainable({"w": 1.0}, {"w": 2.0}))
    Trainable(params={'w': 'params'}, learned={'w': 'learned'}, activations=(), distill=())
    """

    def label(field, part):
        name = "learned" if field in ("learned", "activations") else "params"
        return jax.tree.map(lambda _: name, part)

    return Trainable(*(label(*part) for part in zip(trainable._fields, trainable, strict=True)))


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
      activations: state of the activation quantizer: range statistics, or a `CompressState`.
      distill: `CompressState` of a stateful loss: what it learns (projectors), and its memories.
      ema: moving average of the params, in float32 at least: in fewer bits the small steps of an
        average are rounded away, and it stops half-way.
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
        return Trainable(
            self.params,
            self.compress.learned,
            learned_part(self.activations),
            learned_part(self.distill),
        )

    def with_trainable(self, new: Trainable) -> "TrainState":
        """The state with these in their places."""
        return self.replace(
            params=new.params,
            compress=self.compress._replace(learned=new.learned),
            activations=with_learned(self.activations, new.activations),
            distill=with_learned(self.distill, new.distill),
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
        ema=jax.tree.map(_wide, params) if with_ema else (),
    )
    return state.replace(opt=tx.init(state.trainable))


def _wide(x: jax.Array) -> jax.Array:
    # a copy in float32, or in what is wider
    return jnp.array(x, x.dtype if x.dtype.itemsize >= 4 else jnp.float32)
