"""Deep mutual learning: students that teach each other, trained in one step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.numbers import Number, number_at
from jaxcompress.distill.logits import kd
from jaxcompress.distill.masks import kept_rows


def mutual_kd(
    logits: Array, *, temperature: float | Array = 1.0, where: Array | None = None
) -> Array:
    """For each student the mean over its peers of T^2 KL(peer || student): float32 [students].

    Peers get no gradient from a student's loss: the sum over students trains each by its own.

    Args:
      logits: [students, ..., classes], two students or more.
      temperature: T > 0, may be traced; 1 in the paper.
      where: [...], as in `kd`; the same for all students.

    Raises:
      ValueError: fewer than two students; a Python temperature is not above 0.

    Source: Zhang et al. 2018, Deep Mutual Learning, arXiv 1706.00384, eq. 5 and 8.
    """
    if logits.ndim < 2 or len(logits) < 2:
        raise ValueError(f"logits must be [students >= 2, ..., classes], got {logits.shape}")
    one = lambda student, peer: kd(student, peer, temperature=temperature, where=where)
    pairs = jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(logits, logits)
    own = jnp.eye(len(logits), dtype=bool)
    return jnp.sum(jnp.where(own, 0.0, pairs), axis=1) / (len(logits) - 1)


def mutual_loss(
    task: Callable[..., Array],
    *,
    kd_weight: Number = 1.0,
    temperature: Number = 1.0,
    ignore_label: int | None = None,
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """sum over students of task(z_i, labels) + kd_weight * `mutual_kd`_i, as a loss of `make_step`.

    Args:
      task: (logits of one student, labels) -> scalar: `jaxcompress.train.cross_entropy`; with a
        mask it is called with `where=` too.
      kd_weight, temperature: numbers, or schedules of the step.
      ignore_label: examples of this label do not count, in the task neither.

    The loss takes a mask as `where=`, nonzero where an example counts.

    All students take their step at once, where the paper's algorithm has turns.
    """

    def loss(outputs, labels, teacher_outputs, step, *, where=None):
        del teacher_outputs
        shape = outputs.shape[1:-1]
        keep = kept_rows(where, shape, labels=labels, ignore_label=ignore_label)
        soft = mutual_kd(outputs, temperature=number_at(temperature, step), where=keep)
        one = task if keep is None else functools.partial(task, where=keep)
        hard = jax.vmap(one, in_axes=(0, None))(outputs, labels).astype(jnp.float32)
        total = jnp.sum(hard + number_at(kd_weight, step) * soft)
        return total, {"task": jnp.mean(hard), "mutual_kd": jnp.mean(soft)}

    return loss


def stacked_students(forward: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """A forward for `make_step` of students of one architecture, by `vmap` over their params.

    Args:
      forward: (params, model_state, inputs) -> (outputs, model_state) of one student.

    Returns:
      The same for params and model state of `stack_members`; outputs [students, ...]. A recipe
      sees stacked leaves too: let it count axes from the end.
    """
    return jax.vmap(forward, in_axes=(0, 0, None))


def joint_students(*forwards: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """A forward for `make_step` of students of different architectures.

    Params and model state are tuples, an entry for each student; outputs [students, ...]. Rules
    of a recipe see paths such as `0/Dense_0/kernel`.

    Raises:
      ValueError: fewer than two; (when called) not as many params or model states.
    """
    if len(forwards) < 2:
        raise ValueError(f"joint_students needs two students or more, got {len(forwards)}")

    def joint(params, model_state, inputs):
        model_state = model_state if len(model_state) else ((),) * len(forwards)
        if {len(params), len(model_state)} != {len(forwards)}:
            raise ValueError(
                f"{len(forwards)} students, but params of {len(params)} and model states of "
                f"{len(model_state)}"
            )
        found = [f(p, s, inputs) for f, p, s in zip(forwards, params, model_state, strict=True)]
        states = tuple(state for _, state in found)
        return jnp.stack([z for z, _ in found]), states if jax.tree.leaves(states) else ()

    return joint
