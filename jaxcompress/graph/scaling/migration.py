"""Where scales per channel can move between layers without a change of the function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import compat
from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import END, LOOP
from jaxcompress.graph.layers.matrices import Layer
from jaxcompress.graph.scaling.propagation import Trial, search
from jaxcompress.graph.tracing import trace_program


class Elements(NamedTuple):
    """Elements of a leaf that a scale moves.

    Attributes:
      path: of the leaf.
      channel: int, broadcasts against the leaf; the channel of each element, -1: none.
      shape: of the leaf.
      weight: whether a contraction takes the leaf as its weight.
    """

    path: str
    channel: np.ndarray
    shape: tuple[int, ...]
    weight: bool


class Absorption(NamedTuple):
    """Channels whose scale is free: producers times t, consumers divided by t, t [channels] > 0.

    Attributes:
      name: "producer -> consumers".
      channels: how many.
      producers: what is multiplied: weights and biases in front, or scale and bias of a norm.
      consumers: what is divided: the weights that all readers of the tensor sum channels with.
      through: names of the operations between them.
      layers: names of the sites of the consumers.
      producer: names of the sites of the producers, else the path of a norm's leaf.
    """

    name: str
    channels: int
    producers: tuple[Elements, ...]
    consumers: tuple[Elements, ...]
    through: tuple[str, ...]
    layers: tuple[str, ...]
    producer: str


class Absorptions(NamedTuple):
    """All of a function.

    Attributes:
      groups: each has other tensors; a leaf may be a consumer of one and a producer of another.
      refused: name of a site -> why the scale of its input is not free.
    """

    groups: tuple[Absorption, ...]
    refused: dict[str, str]


def absorbable(fn: Callable[..., Any], params: Any, *inputs: Any) -> Absorptions:
    """Where scales per channel can move between the parameters of `fn(params, *inputs)`.

    Starts at what enters each contraction and follows it, in both directions, through sums,
    products, ReLU, pooling, views, norms' scales, gates, attention's values and scans over stacked
    layers. Branches that are added (residuals) are scaled together, where that can be.

    >>> def fn(p, x):
    ...     return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]
    >>> params = {"up": jnp.ones((4, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
    >>> (group,) = absorbable(fn, params, jnp.ones((3, 4))).groups
    >>> group.name, group.channels, [e.path for e in group.producers]
    ('up -> down', 8, ['bias', 'up'])
    """
    program = trace_program(fn, params, *inputs)
    flat = Flat(program)
    groups, refused, covered = [], {}, {}
    for op, tap in flat.layers():
        name = tap.site.name
        if flat.conditional:
            refused[name] = f"the function has a conditional ({flat.conditional})"
            continue
        done = covered.get(name, np.zeros(1, bool))
        if name in covered and done.all():
            continue
        trial = search(flat, lambda trial, at=(op, tap, done): trial.seed_input(*at))
        group = group_of(trial)
        if group is not None:
            groups.append(group)
            trial.cover(covered)
        elif name not in covered:
            refused[name] = trial.reasons or "nothing makes it"
    return Absorptions(tuple(groups), {k: v for k, v in refused.items() if k not in covered})


def group_of(trial: Trial) -> Absorption | None:
    """What a trial found; None if no channel is free on both sides."""
    flat, channel = trial.flat, trial.channels()
    count = int(channel.max()) + 1
    if not count:
        return None
    producers, consumers = (
        tuple(
            Elements(path, at[0], flat.program.graph.params[path].shape, path in flat.weights)
            for path, labels in zip(flat.paths, trial.leaves(sign), strict=True)
            if labels is not None and ((at := channel[labels]) >= 0).any()
        )
        for sign in (1, -1)
    )
    before, after, through = _sites(trial, channel)
    producer = " + ".join(before) or producers[0].path
    name = f"{producer} -> {', '.join(after) or ', '.join(e.path for e in consumers)}"
    return Absorption(name, count, producers, consumers, through, after, producer)


def _sites(trial: Trial, channel: np.ndarray) -> tuple[tuple[str, ...], ...]:
    # Names of the sites in front and behind, and of the operations between.
    flat, before, after, through = trial.flat, [], [], []

    def has(number):
        labels = None if number is None else trial.see(number, 1)
        return labels is not None and bool((channel[labels] >= 0).any())

    for at, op in enumerate(flat.ops):
        if op.primitive in (LOOP, END):
            continue
        name = flat.site_name(op)
        weight = op.primitive == compat.CONV or trial.modes.get((at, 1)) == "weight"
        if name and weight:
            after += [name] * any(flat.is_data(n) and has(n) for n in op.operands)
            before += [name] * has(op.outputs[0])
        elif any(flat.is_data(n) and has(n) for n in op.outputs):
            through.append(op.primitive)
            factor = [n for n in op.inputs if not flat.is_data(n) and has(n)]
            if op.primitive == "mul" and factor:  # the scale of a norm
                before += sorted(flat.values[factor[0]].origin.params)
    return tuple(tuple(dict.fromkeys(names)) for names in (before, after, through))


def rescale(params: Any, absorption: Absorption, t: Array) -> Any:
    """The parameters with the scales t [channels] in the producers and out of the consumers.

    The function stays the same up to rounding; exactly where t are powers of two. Works under
    `jit`, differentiable in both.

    Raises:
      ValueError: t has another shape; a path is not in params.
    """
    t = jnp.asarray(t)
    if t.shape != (absorption.channels,):
        raise ValueError(
            f"t must have one scale for each of the {absorption.channels} channels of "
            f"{absorption.name!r}, got shape {t.shape}"
        )
    paths = [path for path, _ in leaves_with_paths(params)]
    leaves, treedef = jax.tree.flatten(params)
    for part, times in ((absorption.producers, True), (absorption.consumers, False)):
        for elements in part:
            if elements.path not in paths:
                raise ValueError(
                    f"params: no leaf {elements.path!r}, which {absorption.name!r} has"
                )
            at = paths.index(elements.path)
            leaves[at] = _scaled(leaves[at], elements, t, times=times)
    return treedef.unflatten(leaves)


def _scaled(leaf: Any, elements: Elements, t: Array, *, times: bool) -> Array:
    leaf = jnp.asarray(leaf)
    dtype = leaf.dtype if leaf.dtype.itemsize > 4 else jnp.float32
    factor = spread(elements, t.astype(dtype), 1.0)
    wide = leaf.astype(dtype)
    return (wide * factor if times else wide / factor).astype(leaf.dtype)


def ranges(params: Any, parts: Sequence[Elements], channels: int) -> Array:
    """Largest magnitude of the elements of each channel, float32 [channels]; 0 where there is none.

    Works under `jit`.
    """
    leaves = dict(leaves_with_paths(params))
    largest = jnp.zeros(channels, jnp.float32)
    for path, channel, _, _ in parts:
        leaf = jnp.abs(jnp.asarray(leaves[path])).astype(jnp.float32)
        alike = tuple(axis for axis, n in enumerate(channel.shape) if n == 1)
        magnitudes = jnp.max(leaf, axis=alike, keepdims=True)
        at = np.where(channel < 0, channels, channel).reshape(-1)  # out of bounds: dropped
        largest = largest.at[at].max(magnitudes.reshape(-1), mode="drop")
    return largest


def channels_of(absorption: Absorption, layer: Layer) -> np.ndarray:
    """The channel of every input of a consumer, int [S, G, K] as in `Layer.index`; -1: none.

    Raises:
      ValueError: the layer's weight is none of the consumers.
    """
    for path, channel, shape, _ in absorption.consumers:
        if path == layer.path:
            return np.broadcast_to(channel, shape).reshape(-1)[layer.index[..., 0]]
    raise ValueError(f"{layer.path!r} is no consumer of {absorption.name!r}")


def slots(absorption: Absorption, layer: Layer) -> np.ndarray:
    """As `channels_of`, flat, for scatters with mode "drop": out of bounds stands for none."""
    at = channels_of(absorption, layer).reshape(-1)
    return np.where(at < 0, absorption.channels, at)


def spread(elements: Elements, values: Array, default: float) -> Array:
    """Values [channels] at the elements, broadcastable against the leaf; `default` elsewhere."""
    channel = elements.channel
    return jnp.where(channel < 0, jnp.asarray(default, values.dtype), values[channel])
