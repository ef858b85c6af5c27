"""Contractions whose outputs parameters multiply, channel by channel: BatchNorm in inference.

The factor moves into what is multiplied: the weights in front, and what is added between. Then the
multiplication is gone, and what is added before and after it is one sum (`sums`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.graph import compat
from jaxcompress.graph.edit import reachable
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import END, LOOP, Op
from jaxcompress.graph.primitives import row
from jaxcompress.graph.scaling.labelled_operation import Step
from jaxcompress.graph.scaling.labels import FIXED, Labels
from jaxcompress.graph.scaling.migration import Absorption, Elements, rescale
from jaxcompress.graph.scaling.propagation import Trial, search


def factors_of(flat: Flat) -> dict[int, str]:
    """Multiplications of activations by a norm's factor, and the leaves that it is made of.

    A norm divides by a root or a quotient of parameters; those that are made of inputs, such as
    LayerNorm's, are none.
    """
    found = {}
    for at, op in enumerate(flat.ops):
        port = data_port(flat, op) if op.primitive in ("mul", "div") else None
        other = None if port is None else op.operands[1 - port]
        if other is not None and flat.is_computed(other):
            if op.primitive == "mul" or port == 0:
                found[at] = ", ".join(sorted(flat.values[other].origin.params))
    return found


def data_port(flat: Flat, op: Op) -> int | None:
    """Of an operation on activations and something made of parameters: which operand is which."""
    data = [flat.is_data(number) for number in op.operands]
    if (
        len(data) != 2
        or sum(data) != 1
        or not flat.is_made_of_params(op.operands[data.index(False)])
    ):
        return None
    port = data.index(True)
    x = op.operands[port]
    same = x is not None and flat.values[x].aval.shape == flat.values[op.outputs[0]].aval.shape
    return port if same else None


def fold_factors(flat: Flat, params: Any) -> tuple[Any, set[int], dict[int, str]]:
    """Moves the factors of all norms into what they multiply.

    Returns:
      (params, operations that now multiply by 1, {operation: why it cannot go}).
    """
    done: set[int] = set()
    refused: dict[int, str] = {}
    for op, tap in flat.layers() if not flat.conditional else ():
        trial = search(flat, lambda trial, at=(op, tap): trial.seed_output(*at), fold=True)
        places = [at for (at, _), mode in trial.modes.items() if mode == "fold"]
        places = [at for at in places if at not in done]
        if not places:
            continue
        try:
            group, t = _group(trial, places, jax.tree.leaves(params))
        except _Refused as why:
            refused.update(dict.fromkeys(places, str(why)))
            continue
        params = rescale(params, group, t)
        done.update(places)
    return params, done, {at: why for at, why in refused.items() if at not in done}


class _Refused(Exception):
    """Why a factor cannot move."""


def _group(trial: Trial, places: Sequence[int], leaves: Sequence[Any]) -> tuple[Absorption, Any]:
    pairs = [_labelled(trial, at, leaves) for at in places]
    labels = np.concatenate([label for label, _ in pairs])
    values = np.concatenate([value for _, value in pairs])
    if (labels <= FIXED).any():
        raise _Refused(trial.reasons or "what it multiplies is not scaled by one contraction")
    classes, first, channel_of = np.unique(labels, return_index=True, return_inverse=True)
    t = values[first]
    if not np.allclose(values, t[channel_of], rtol=1e-6, atol=0):
        raise _Refused("its factor differs within a channel, or from that of another norm behind")
    if not np.isfinite(t).all():
        raise _Refused("its factor is not finite")
    channel = np.full(len(trial.classes.parent) + 1, -1)
    channel[classes] = np.arange(len(classes))
    producers, consumers = (_elements(trial, sign, channel) for sign in (1, -1))
    used = {c for e in consumers for c in np.unique(e.channel).tolist()}
    if any(t[c] == 0 for c in used - {-1}):
        raise _Refused("its factor is 0 where another layer reads the channel")
    bent = _bent(trial, channel)
    if bent and (t < 0).any():
        raise _Refused(f"its factor is negative, and {bent!r} lies in front of it")
    name = producers[0].path if producers else ""
    return Absorption(name, len(t), producers, consumers, (), (), name), jnp.asarray(t)


def _labelled(trial: Trial, at: int, leaves: Sequence[Any]) -> tuple[Labels, np.ndarray]:
    # The labels of what an operation multiplies and its factors, both flat.
    flat, op = trial.flat, trial.flat.ops[at]
    if not reachable(flat.program.closed, op.place):
        raise _Refused("it is inside a function that cannot be changed")
    port = data_port(flat, op)
    labels = None if port is None else Step(trial, at).see(port)
    if port is None or labels is None:
        raise _Refused(trial.reasons or "what it multiplies is not scaled by one contraction")
    try:
        factor = spread_of(flat, op, 1 - port, leaves)
    except ValueError as why:
        raise _Refused(str(why)) from None
    if op.primitive == "div":
        factor = 1 / factor
    labels, factor = np.broadcast_arrays(labels, factor)
    return labels.reshape(-1), factor.reshape(-1)


def spread_of(flat: Flat, op: Op, port: int, leaves: Sequence[Any]) -> np.ndarray:
    """An operand made of parameters, [trips, *shape], of size 1 along axes where it is repeated."""
    number = op.operands[port]
    assert number is not None
    rank = len(flat.values[op.outputs[0]].aval.shape)
    source, axes = unrepeated(flat, number)
    value = np.asarray(flat.evaluate(source, leaves))
    sizes = [1] * rank
    for axis, n in zip(axes, value.shape[1:], strict=True):
        sizes[axis] = n
    return value.reshape(len(value), *sizes)


def unrepeated(flat: Flat, number: int) -> tuple[int, tuple[int, ...]]:
    """The value that was broadcast to this one, and the axes that it has here, ascending."""
    op = flat.ops[flat.definition[number]] if number in flat.definition else None
    if op is not None and op.primitive == "broadcast_in_dim" and op.operands[0] is not None:
        return op.operands[0], tuple(op.eqn.params["broadcast_dimensions"])
    return number, tuple(range(len(flat.values[number].aval.shape)))


def _elements(trial: Trial, sign: int, channel: np.ndarray) -> tuple[Elements, ...]:
    flat, found = trial.flat, []
    for path, labels in zip(flat.paths, trial.leaves(sign), strict=True):
        if labels is not None and (channel[labels] >= 0).any():
            shape = flat.program.graph.params[path].shape
            found.append(Elements(path, channel[labels][0], shape, path in flat.weights))
    return tuple(found)


def _bent(trial: Trial, channel: np.ndarray) -> str:
    # An operation between that passes positive factors only.
    flat = trial.flat
    for op in flat.ops:
        if not _is_linear(op) and not flat.site_name(op):
            for number in op.outputs:
                labels = trial.see(number, 1) if flat.is_data(number) else None
                if labels is not None and (channel[labels] >= 0).any():
                    return op.primitive
    return ""


def why_not(flat: Flat, at: int) -> str:
    """Why nothing in front of a norm takes its factor."""
    if flat.conditional:
        return f"the function has a conditional ({flat.conditional})"
    fronts, behind = _upstream(flat, at), _padding_behind(flat, at)
    reasons = []
    for op, tap in flat.layers():
        if op.place in fronts:
            trial = search(flat, lambda trial, at=(op, tap): trial.seed_output(*at), fold=True)
            reasons.append(f"{tap.site.name} in front of it: {trial.reasons or 'not tied to it'}")
    return "; ".join([*reasons, *behind]) or "no layer in front of it takes a factor"


def _upstream(flat: Flat, at: int) -> set[Any]:
    # Places of the nearest contractions in front.
    found, seen, work = set(), set(), list(flat.ops[at].inputs)
    while work:
        number = work.pop()
        if number in seen or not flat.is_data(number) or number not in flat.definition:
            continue
        seen.add(number)
        op = flat.ops[flat.definition[number]]
        if row(op.primitive).kind == "contract":
            found.add(op.place)
        else:
            work += op.inputs
    return found


def _padding_behind(flat: Flat, at: int) -> list[str]:
    number, found = flat.ops[at].outputs[0], []
    while len(readers := flat.readers.get(number, ())) == 1:
        op = flat.ops[readers[0]]
        if op.primitive == compat.CONV and any(sum(pad) for pad in op.eqn.params["padding"]):
            name = flat.site_name(op)
            found.append(f"{name} behind it pads its input, where nothing is added")
        if not _is_linear(op) or flat.site_name(op):
            break
        number = op.outputs[0]
    return found


def _is_linear(op: Op) -> bool:
    # In what inputs reach; factors are parameters here. Marks of loops pass what is inside on.
    return op.primitive in (LOOP, END) or row(op.primitive).linear
