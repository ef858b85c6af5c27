"""Contractions whose outputs parameters multiply, channel by channel: BatchNorm in inference."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.graph.absorb import Absorption, group_of
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.trace import trace_program
from jaxcompress.graph.trial import Trial, search


class Normalization(NamedTuple):
    """Channels of a contraction's output that a parameter multiplies.

    Attributes:
      absorption: what the factor can move between; the consumer is the scale of the norm.
      factor: params -> the factor of every channel, [channels].
    """

    absorption: Absorption
    factor: Callable[[Any], Array]


def normalizations(
    fn: Callable[..., Any], params: Any, *inputs: Any
) -> tuple[tuple[Normalization, ...], dict[str, str]]:
    """Contractions whose outputs are multiplied by parameters, channel by channel: BatchNorm.

    Returns:
      The normalizations in order of execution, and {site: why its factor cannot move}.
    """
    flat = Flat(trace_program(fn, params, *inputs))
    found, refused = [], {}
    for op, tap in flat.layers() if not flat.conditional else ():
        trial = search(flat, lambda trial, at=(op, tap): trial.seed_output(*at), fold=True)
        factors = _factors(trial)
        group = group_of(trial) if factors else None
        if group is not None:
            factor = functools.partial(_factor, trial, group, factors[0])
            found.append(Normalization(group, factor))
        elif factors:
            refused[tap.site.name] = trial.reasons
    return tuple(found), refused


def _factors(trial: Trial) -> list[int]:
    # The values made of parameters that took a scale out of activations.
    flat, found = trial.flat, []
    for (at, _), mode in trial.modes.items():
        if mode == "cancel":
            operands = flat.ops[at].operands
            if any(map(flat.is_data, operands)):
                found += [n for n in operands if not flat.is_data(n)]
    return found


def _factor(trial: Trial, group: Absorption, number: int, params: Any) -> Array:
    flat = trial.flat
    while number in flat.definition:  # before it was broadcast
        op = flat.ops[flat.definition[number]]
        if op.primitive != "broadcast_in_dim" or op.operands[0] is None:
            break
        number = op.operands[0]
    value = flat.evaluate(number, jax.tree.leaves(params))
    labels = trial.see(number, -1)
    assert labels is not None
    channel = trial.channels()[labels]
    channel = np.broadcast_to(channel, (1, *value.shape))[0].reshape(-1)
    known = channel >= 0
    factor = jnp.ones(group.channels, value.dtype)
    factor = factor.at[channel[known]].set(value.reshape(-1)[known])
    if not set(group.through) <= _LINEAR:
        factor = jnp.abs(factor)
    return jnp.where(factor == 0, 1, factor)  # what is multiplied by 0 stays as it is


_LINEAR = frozenset(
    "add add_any sub mul div neg reshape squeeze expand_dims transpose broadcast_in_dim slice pad "
    "concatenate split rev reduce_sum reduce_window_sum cumsum convert_element_type copy copy_p "
    "dot_general conv_general_dilated".split()
)
