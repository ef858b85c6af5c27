"""Teachers beyond a single network: ensembles, moving averages, generations, assistants, peers.

A teacher is what `jaxcompress.train.make_step` takes: a pure function (params, inputs) -> outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.distill.probabilities import log_probs

Number = float | Array
Apply = Callable[[Any, Any], Any]


class Teacher(NamedTuple):
    """A network and its parameters, for chains in which both change."""

    apply: Apply  # (params, inputs) -> outputs
    params: Any


def average_logits(logits: Array) -> Array:
    """mean_m z_m, float32: the normalized geometric mean of the probabilities, at any temperature.

    Args:
      logits: [members, ..., classes].

    >>> print(average_logits(jnp.array([[1.0, 3.0], [3.0, 3.0]])))
    [2. 3.]
    """
    return jnp.mean(_members(logits), axis=0)


def average_probabilities(logits: Array, *, temperature: Number = 1.0) -> Array:
    """z with softmax(z / T) = mean_m softmax(z_m / T), float32: T log mean_m p_m.

    A class keeps weight if one member gives it some. KL(mean || student) is at most the mean of
    KL(p_m || student), and its gradient to the student is the same.

    Args:
      logits: [members, ..., classes].
      temperature: T > 0 of the loss that follows, may be traced.

    Raises:
      ValueError: no members; a Python temperature is not above 0.
    """
    log_p = log_probs(_members(logits), temperature)
    mean = jax.nn.logsumexp(log_p, axis=0) - jnp.log(jnp.float32(len(log_p)))
    return jnp.asarray(temperature, jnp.float32) * mean


def product_of_experts(logits: Array) -> Array:
    """log of prod_m p_m, normalized, float32: a class that one member rules out is out.

    Sharper than the mean of the log-probabilities, whose softmax is that of `average_logits`:
    it is that mean at temperature 1 / members.

    Args:
      logits: [members, ..., classes].

    Source: Hinton 2002, Training Products of Experts by Minimizing Contrastive Divergence, eq. 1.
    """
    return log_probs(jnp.sum(log_probs(_members(logits)), axis=0))


def stack_members(*params: Any) -> Any:
    """Trees of one architecture as one tree whose leaves have a first axis `members`.

    Raises:
      ValueError: no tree, or trees of different structure, shapes or dtypes, with the path.
    """
    if not params:
        raise ValueError("stack_members: give the params of one member at least")
    first = leaves_with_paths(params[0])
    for number, other in enumerate(params[1:], 1):
        found = leaves_with_paths(other)
        if [path for path, _ in found] != [path for path, _ in first]:
            raise ValueError(
                f"member {number} has other leaves than member 0; use ensemble_of for different "
                "architectures"
            )
        for (path, a), (_, b) in zip(first, found, strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ValueError(
                    f"{path}: {b.dtype}{list(b.shape)} in member {number}, {a.dtype}"
                    f"{list(a.shape)} in member 0; use ensemble_of for different architectures"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def ensemble(teacher: Apply, *, combine: Callable[[Array], Array] = average_logits) -> Apply:
    """A teacher of many members of one architecture, evaluated by one `vmap`.

    Args:
      teacher: (params, inputs) -> logits [..., classes] of one member.
      combine: [members, ..., classes] -> [..., classes]: `average_logits`, `average_probabilities`
        or `product_of_experts`.

    Returns:
      A teacher whose params are those of `stack_members`.

    >>> both = ensemble(lambda w, x: x @ w)
    >>> print(both(stack_members(jnp.eye(2), 3 * jnp.eye(2)), jnp.ones((1, 2))))
    [[2. 2.]]
    """
    return lambda params, inputs: combine(jax.vmap(teacher, in_axes=(0, None))(params, inputs))


def ensemble_of(
    *teachers: Apply, combine: Callable[[Array], Array] = average_logits
) -> Callable[[Sequence[Any], Any], Array]:
    """A teacher of different networks; its params are the sequence of theirs.

    Args:
      teachers: (params, inputs) -> logits, of one shape.
      combine: as in `ensemble`.

    Raises:
      ValueError: no teachers; (when called) not as many params, or logits of different shapes.
    """
    if not teachers:
        raise ValueError("ensemble_of: give one teacher at least")

    def teacher(params, inputs):
        if len(params) != len(teachers):
            raise ValueError(f"params of {len(params)} members for {len(teachers)} teachers")
        return combine(_stacked([f(p, inputs) for f, p in zip(teachers, params, strict=True)]))

    return teacher


def mean_teacher(step: Callable[..., Any]) -> Callable[..., Any]:
    """A train step whose teacher is the moving average of the student's params, `state.ema`.

    Args:
      step: of `make_step(..., teacher=apply, ema_decay=d)`, state of `create(with_ema=True)`.

    Returns:
      step(state, (), batch), which `fit` takes too. The teacher sees a copy of the average:
      the state's own is donated, and a donated buffer cannot be an argument a second time.

    Raises:
      ValueError: (at a step) the state has no average; teacher params are given.

    Source: Tarvainen and Valpola 2017, Mean teachers are better role models, arXiv 1703.01780,
    eq. 1 and 2; the decay there rises as min(1 - 1 / (step + 1), d).
    """

    def averaged(state, teacher_params, batch):
        if jax.tree.leaves(teacher_params):
            raise ValueError("mean_teacher: the teacher is state.ema; pass () as teacher_params")
        if not jax.tree.leaves(state.ema):
            raise ValueError(
                "mean_teacher: the state has no moving average; create(..., with_ema=True) and "
                "make_step(..., ema_decay=0.999)"
            )
        return step(state, _as_params(state.ema, state.params), batch)

    return averaged


@jax.jit
def _as_params(average: Any, params: Any) -> Any:
    # a copy, in the dtypes that the network has its params in
    return jax.tree.map(lambda mean, p: jnp.array(mean, p.dtype), average, params)


def born_again(train: Callable[[int, Any], Any], *, generations: int) -> tuple[Any, ...]:
    """The params of generations of one architecture, each taught by the one before.

    Args:
      train: (generation, teacher_params) -> params; teacher_params is None for generation 0, which
        learns from the labels alone. Start each from fresh params.
      generations: at least 1. `ensemble` with `stack_members(*result)` joins them.

    Source: Furlanello et al. 2018, Born-Again Neural Networks, arXiv 1805.04770, section 3.

    >>> born_again(lambda generation, teacher: (generation, teacher), generations=3)[-1]
    (2, (1, (0, None)))
    """
    if generations < 1:
        raise ValueError(f"generations must be at least 1, got {generations}")
    found = []
    for generation in range(generations):
        found.append(train(generation, found[-1] if found else None))
    return tuple(found)


def teacher_assistants(
    teacher: Teacher, *trainers: Callable[[Teacher], Teacher]
) -> tuple[Teacher, ...]:
    """A chain of networks from the teacher's size down to the student's, each taught by the last.

    Args:
      teacher: the largest network, trained.
      trainers: teacher -> the trained network of the next size; the last one is the student.

    Raises:
      ValueError: no trainers.
      TypeError: a trainer does not return a `Teacher`.

    Source: Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant,
    arXiv 1902.03393, section 3.
    """
    if not trainers:
        raise ValueError("teacher_assistants: give one trainer at least, that of the student")
    found = []
    for number, train in enumerate(trainers):
        teacher = train(teacher)
        if not isinstance(teacher, Teacher):
            raise TypeError(
                f"trainer {number} must return Teacher(apply, params), got {type(teacher).__name__}"
            )
        found.append(teacher)
    return tuple(found)


def _members(logits: Array) -> Array:
    if logits.ndim < 2 or logits.shape[0] < 1:
        raise ValueError(f"logits must be [members, ..., classes], got {logits.shape}")
    return logits.astype(jnp.float32)


def _stacked(outputs: Sequence[Array]) -> Array:
    shapes = [z.shape for z in outputs]
    if len(set(shapes)) > 1:
        raise ValueError(f"the members' logits must have one shape, got {shapes}")
    return jnp.stack([z.astype(jnp.float32) for z in outputs])
