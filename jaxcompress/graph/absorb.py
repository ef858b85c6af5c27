"""Where scales per channel can move between layers without a change of the function."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.graph import compat
from jaxcompress.graph.affine import FIXED, Classes, Labels, Step, apply, dot_roles
from jaxcompress.graph.inline import END, LOOP, Op, carried, inline
from jaxcompress.graph.matrices import Layer
from jaxcompress.graph.sites import Tap
from jaxcompress.graph.trace import Program, trace_program
from jaxcompress.graph.views import views


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
        found = trial.result()
        if found is not None:
            groups.append(found)
            trial.cover(covered)
        elif name not in covered:
            refused[name] = "; ".join(dict.fromkeys(trial.reasons)) or "nothing makes it"
    return Absorptions(tuple(groups), {k: v for k, v in refused.items() if k not in covered})


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
        group = trial.result() if factors else None
        if group is not None:
            factor = functools.partial(_factor, trial, group, factors[0])
            found.append(Normalization(group, factor))
        elif factors:
            refused[tap.site.name] = "; ".join(dict.fromkeys(trial.reasons))
    return tuple(found), refused


def _factors(trial: "Trial") -> list[int]:
    # The values made of parameters that took a scale out of activations.
    flat, found = trial.flat, []
    for at, mode in trial.modes.items():
        if mode == "cancel":
            operands = flat.ops[at].operands
            if any(map(flat.is_data, operands)):
                found += [n for n in operands if not flat.is_data(n)]
    return found


def _factor(trial: "Trial", group: Absorption, number: int, params: Any) -> Array:
    flat = trial.flat
    while number in flat.definition:  # before it was broadcast
        op = flat.ops[flat.definition[number]]
        if op.primitive != "broadcast_in_dim" or op.operands[0] is None:
            break
        number = op.operands[0]
    value = flat.evaluate(number, jax.tree.leaves(params))
    labels = trial.see(number, -1)
    assert labels is not None
    channel = np.broadcast_to(trial.channel[labels], (1, *value.shape))[0].reshape(-1)
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


class Flat:
    """A program as a list of operations, with the readers and the origin of every value."""

    def __init__(self, program: Program):
        self.program = program
        flat = inline(program, weigh=len)
        self.values, self.paths = flat.values, list(program.graph.params)
        self.conditional = ", ".join(flat.choices)
        self.outputs = frozenset(flat.outputs)
        self.ops = _live(flat.ops, self.outputs)
        self.weights = {view.path for view in views(program).values()}
        self.trips: dict[tuple[Any, ...], int] = {(): 1}  # region -> trips
        self.region: dict[int, tuple[Any, ...]] = {}
        self.definition: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.at = {op.place: k for k, op in enumerate(self.ops) if op.primitive not in (LOOP, END)}
        self.free: set[int] = set()  # constants that no scale changes: 0 and infinity
        for at, op in enumerate(self.ops):
            self._enter(at, op)

    def _enter(self, at: int, op: Op) -> None:
        inside = (*op.region, op.place)
        if op.primitive == LOOP:
            self.trips[inside] = self.trips[op.region] * op.eqn.params.get("length", 1)
        inner = len(carried(op)[1]) if op.primitive == LOOP else 0
        for k, number in enumerate(op.outputs):
            self.definition[number] = at
            self.region[number] = inside if k < inner else op.region
        for number in op.inputs:
            self.readers.setdefault(number, []).append(at)
        if op.primitive in ("broadcast_in_dim", "convert_element_type", "reshape"):
            if self.is_free(op, 0):
                self.free.add(op.outputs[0])

    def is_free(self, op: Op, port: int) -> bool:
        """Whether an operand is known to be 0 or infinite everywhere."""
        number = op.operands[port]
        if number is not None:
            return number in self.free
        value = self.literal(op, port)
        if value is None or value.dtype == bool:
            return False
        return bool(np.all((value == 0) | np.isinf(value)))

    def literal(self, op: Op, port: int) -> np.ndarray | None:
        """The value of an operand that is a number in the program; None if it is not known."""
        return np.asarray(op.constants[port]) if port in op.constants else None

    def evaluate(self, number: int, leaves: Sequence[Any]) -> Array:
        """A value that is made of parameters and constants, from the leaves of the parameters.

        Raises:
          ValueError: a loop makes it, or it depends on an input.
        """
        consts = self.program.closed.consts
        start = len(self.program.closed.jaxpr.invars)
        if number < len(leaves):
            return jnp.asarray(leaves[number])
        if start <= number < start + len(consts):
            return jnp.asarray(consts[number - start])
        op = self.ops[self.definition[number]] if number in self.definition else None
        if op is None or op.primitive in (LOOP, END):
            raise ValueError("a normalization in a loop cannot be folded")
        values = [
            self.evaluate(n, leaves) if n is not None else self._constant(op, port)
            for port, n in enumerate(op.operands)
        ]
        return compat.evaluate(op.eqn, values)[op.outputs.index(number)]

    def _constant(self, op: Op, port: int) -> Array | None:
        variable = op.eqn.invars[port]
        if compat.is_literal(variable):
            return None
        return jnp.asarray(self.literal(op, port), variable.aval.dtype)

    def layers(self) -> Iterator[tuple[Op, Tap]]:
        """The contractions of activations with weights."""
        for op in self.ops:
            taps = self.program.places.get(op.place, ())
            if taps and taps[0].site.weight is not None and op.primitive not in (LOOP, END):
                yield op, taps[0]

    def is_data(self, number: int | None) -> bool:
        """Whether inputs reach a value."""
        return number is not None and self.values[number].origin.data

    def is_made_of_params(self, number: int | None) -> bool:
        """Whether a value is made of parameters."""
        return number is not None and bool(self.values[number].origin.params)


def _live(ops: Sequence[Op], outputs: frozenset[int]) -> tuple[Op, ...]:
    needed, kept = set(outputs), []
    for op in reversed(ops):
        if op.primitive in (LOOP, END) or needed.intersection(op.outputs):
            needed.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def _input_axes(op: Op, tap: Tap) -> set[int]:
    # Axes of an activation that a weight may have an index for: summed over, or batch axes.
    numbers = op.eqn.params["dimension_numbers"]
    if op.primitive == compat.CONV:
        return {numbers.lhs_spec[1]}
    contracted, batch = numbers
    return {*contracted[tap.operand], *batch[tap.operand]}


class Trial:
    """Follows labels from a seed until nothing changes, with some choices made."""

    def __init__(self, flat: Flat, choices: Sequence[int] = (), *, fold: bool = False):
        self.flat, self.choices, self.fold = flat, choices, fold
        self.classes = Classes()
        self.labels: dict[tuple[int, int], Labels] = {}
        self.modes: dict[Any, str] = {}
        self.log: list[tuple[int, int]] = []  # choice, number of options
        self.seed = np.zeros(0, np.int64)
        self.channel = np.zeros(0, np.int64)  # label -> channel of the result
        self.work: deque[int] = deque()
        self.waiting: dict[int, None] = {}

    @property
    def reasons(self) -> list[str]:
        """Why labels were fixed."""
        return self.classes.reasons

    @property
    def alive(self) -> int:
        """How many labels of the seed are still free."""
        return int((self.classes.find(self.seed) > FIXED).sum())

    @property
    def whole(self) -> bool:
        """Whether all labels of the seed are."""
        return self.alive == int((self.seed >= 0).sum())

    def see(self, number: int, sign: int) -> Labels | None:
        """The labels of a value, None if none is free."""
        labels = self.labels.get((number, sign))
        if labels is None:
            return None
        labels = self.classes.find(labels)
        return labels if (labels > FIXED).any() else None

    def assign(self, number: int, labels: Labels, sign: int) -> None:
        """A value has these labels too; its neighbours are looked at again."""
        flat, key = self.flat, (number, sign)
        old = self.labels.get(key)
        new = self.labels[key] = self.classes.merge(old, labels)
        if reason := self._objection(number, sign):
            self.classes.fix(new, reason)
        if old is None or old.shape != new.shape or not np.array_equal(old, new):
            near = [
                *flat.readers.get(number, ()),
                *([flat.definition[number]] if number in flat.definition else []),
            ]
            self.work.extend(near)

    def _objection(self, number: int, sign: int) -> str:
        flat = self.flat
        value = flat.values[number]
        if not jnp.issubdtype(value.aval.dtype, jnp.floating):
            return f"it becomes {value.aval.dtype}"
        if number in flat.outputs:
            return "it is a result of the function"
        if number >= len(flat.paths) and number not in flat.definition:
            return "an input or constant of the function is part of it"
        if sign < 0 and flat.is_data(number):
            return "its scale would be divided out of an activation"
        return ""

    def seed_input(self, op: Op, tap: Tap, done: np.ndarray) -> None:
        """Starts with a label for each channel that a contraction sums over, but those done."""
        step = Step(self, self.flat.at[op.place])
        self._start(step, tap.operand, _input_axes(op, tap), done)

    def seed_output(self, op: Op, tap: Tap) -> None:
        """Starts with a label for each channel that a contraction gives."""
        step = Step(self, self.flat.at[op.place])
        if op.primitive == compat.CONV:
            axes = {op.eqn.params["dimension_numbers"].out_spec[1]}
        else:
            roles = dot_roles(step)
            weight = tap.site.weight or 0
            axes = {*roles.out_batch, *roles.out_free[weight]}
        self._start(step, -1, axes, np.zeros(1, bool))

    def _start(self, step: Step, port: int, axes: set[int], done: np.ndarray) -> None:
        sizes = [n if axis in axes else 1 for axis, n in enumerate(step.shape(port))]
        labels = self.classes.fresh([self.flat.trips[step.op.region], *sizes])
        self.seed = np.where(done, -1, labels)
        self.work.append(step.at)
        step.put(port, self.seed)
        self._run()

    def cover(self, covered: dict[str, np.ndarray]) -> None:
        """Notes which channels of the inputs of all layers have free labels, by site name."""
        for op, tap in self.flat.layers():
            step = Step(self, self.flat.at[op.place])
            labels = step.see(tap.operand)
            if labels is not None and self.modes.get((step.at, 1), "weight") == "weight":
                axes = _input_axes(op, tap)
                sizes = [n if k in axes else 1 for k, n in enumerate(step.shape(tap.operand))]
                size = (self.flat.trips[op.region], *sizes)
                here = np.broadcast_to(labels > FIXED, size)
                covered[tap.site.name] = here | covered.get(tap.site.name, np.zeros(1, bool))

    def _run(self) -> None:
        while self.work or self.waiting:
            if not self.alive:
                return
            if self.work:
                at = self.work.popleft()
                if not apply(Step(self, at), decide=False):
                    self.waiting[at] = None
            else:
                at = next(iter(self.waiting))
                del self.waiting[at]
                apply(Step(self, at), decide=True)

    def mode(self, key: Any, options: Sequence[str], decide: bool) -> str | None:
        """The choice that was made; None if it has to wait."""
        if key not in self.modes:
            if len(options) > 1 and not decide:
                return None
            if len(options) > 1:
                chosen = self.choices[len(self.log)] if len(self.log) < len(self.choices) else 0
                self.log.append((chosen, len(options)))
                self.modes[key] = options[chosen]
            else:
                self.modes[key] = options[0]
        return self.modes[key]

    def result(self) -> Absorption | None:
        """What was found; None if no channel is free on both sides."""
        return _result(self)


def search(flat: Flat, seed: Callable[[Trial], None], *, fold: bool = False, most: int = 64):
    """The trial that leaves most labels free, over the choices of what carries a product."""
    best, first, choices = None, None, []
    for _ in range(most):
        trial = Trial(flat, choices, fold=fold)
        seed(trial)
        first = first or trial
        if trial.alive and (best is None or trial.alive > best.alive):
            best = trial
        if trial.whole:
            break
        log = trial.log
        while log and log[-1][0] + 1 >= log[-1][1]:
            log = log[:-1]
        if not log:
            break
        choices = [*(choice for choice, _ in log[:-1]), log[-1][0] + 1]
    assert first is not None
    return best or first


def _result(trial: Trial) -> Absorption | None:
    flat, graph = trial.flat, trial.flat.program.graph
    made = [trial.see(n, 1) for n in range(len(flat.paths))]
    used = [trial.see(n, -1) for n in range(len(flat.paths))]
    both = np.intersect1d(_classes_of(made), _classes_of(used))
    seed = trial.classes.find(trial.seed).reshape(-1)
    roots = list(dict.fromkeys(seed[np.isin(seed, both)].tolist()))
    if not roots:
        return None
    channel = trial.channel = np.full(len(trial.classes.parent) + 1, -1)
    channel[roots] = np.arange(len(roots))
    producers, consumers = (
        tuple(
            Elements(path, channel[labels][0], graph.params[path].shape, path in flat.weights)
            for path, labels in zip(flat.paths, found, strict=True)
            if labels is not None and (channel[labels] >= 0).any()
        )
        for found in (made, used)
    )
    before, after, through = _sites(trial, channel)
    producer = " + ".join(before) or producers[0].path
    name = f"{producer} -> {', '.join(after) or ', '.join(e.path for e in consumers)}"
    return Absorption(name, len(roots), producers, consumers, through, after, producer)


def _classes_of(found: list[Labels | None]) -> np.ndarray:
    flat = [labels[labels > FIXED] for labels in found if labels is not None]
    return np.unique(np.concatenate(flat)) if flat else np.zeros(0, np.int64)


def _sites(trial: Trial, channel: np.ndarray):
    # Names of the sites in front and behind, and of the operations between.
    flat, before, after, through = trial.flat, [], [], []

    def has(number, sign=1):
        labels = None if number is None else trial.see(number, sign)
        return labels is not None and bool((channel[labels] >= 0).any())

    for at, op in enumerate(flat.ops):
        if op.primitive in (LOOP, END):
            continue
        site = flat.program.contractions.get(op.place)
        weight = op.primitive == compat.CONV or trial.modes.get((at, 1)) == "weight"
        if site is not None and weight:
            x = [k for k in (0, 1) if flat.is_data(op.operands[k])]
            after += [site.name] * any(has(op.operands[k]) for k in x)
            before += [site.name] * has(op.outputs[0])
        elif any(flat.is_data(n) and has(n) for n in op.outputs):
            through.append(op.primitive)
            factor = [n for n in op.inputs if not flat.is_data(n) and has(n)]
            if op.primitive == "mul" and factor:  # the scale of a norm
                before += sorted(flat.values[factor[0]].origin.params)
    return tuple(dict.fromkeys(before)), tuple(dict.fromkeys(after)), tuple(dict.fromkeys(through))
