"""Labels followed from a seed until nothing changes, and the choices with which most stay free.

The seed is one label for each channel that a layer sums over: its weight shall be divided by t, so
whatever made the input must be multiplied by it, wherever that is. Rules carry the labels on until
they reach weights and biases (which take them), or something that fixes them. A work list holds the
operations whose ports changed.

Mostly there is one way to carry a scale on. Where a product has two factors that both could, there
are two, and which is right is seen only at the end: the scale of a norm, say, or the activation in
front of it. Such an operation waits until nothing else is left to do, for what it is told by others
may settle it. Then it chooses, and `search` goes through the choices, last one first, up to a
number of trials; the one that leaves most labels of the seed free is taken. Networks have few such
places, so this is seldom more than one trial.
"""

from collections import deque
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jaxcompress.graph.flat import Flat
from jaxcompress.graph.flat_list import Op
from jaxcompress.graph.scaling.labelled_operation import Step
from jaxcompress.graph.scaling.labels import FIXED, Classes, Labels
from jaxcompress.graph.scaling.scale_products import input_axes, output_axes
from jaxcompress.graph.scaling.scale_rules import apply
from jaxcompress.graph.sites import Tap


class Trial:
    """Follows labels from a seed until nothing changes, with some choices made.

    Args:
      flat: the program.
      choices: number of the option of every choice, in the order in which they come up; 0 for more.
      fold: whether parameters that multiply activations must take a scale out.
    """

    def __init__(self, flat: Flat, choices: Sequence[int] = (), *, fold: bool = False):
        self.flat, self.choices, self.fold = flat, choices, fold
        self.classes = Classes()
        self.labels: dict[tuple[int, int], Labels] = {}  # (number of a value, sign)
        self.modes: dict[tuple[int, int], str] = {}  # (position of an operation, sign)
        self.log: list[tuple[int, int]] = []  # choice, number of options
        self.seed = np.zeros(0, np.int64)
        self.work: deque[int] = deque()
        self.waiting: dict[int, None] = {}

    @property
    def reasons(self) -> str:
        """Why labels were fixed."""
        return "; ".join(dict.fromkeys(self.classes.reasons))

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
            self.work.extend(flat.readers.get(number, ()))
            self.work.extend([flat.definition[number]] if number in flat.definition else [])

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

    def mode(self, key: tuple[int, int], options: Sequence[str], decide: bool) -> str | None:
        """What an operation does with the labels of a sign; None if it has to wait for that."""
        if key not in self.modes:
            chosen = 0
            if len(options) > 1:
                if not decide:
                    return None
                chosen = self.choices[len(self.log)] if len(self.log) < len(self.choices) else 0
                self.log.append((chosen, len(options)))
            self.modes[key] = options[chosen]
        return self.modes[key]

    def seed_input(self, op: Op, tap: Tap, done: np.ndarray) -> None:
        """Starts with a label for each channel that a contraction sums over, but those done."""
        self._start(op, tap.operand, input_axes(op.eqn, tap.operand), done)

    def seed_output(self, op: Op, tap: Tap) -> None:
        """Starts with a label for each channel that a contraction gives."""
        self._start(op, -1, output_axes(op.eqn, 1 - tap.operand), np.zeros(1, bool))

    def _start(self, op: Op, port: int, axes: set[int], done: np.ndarray) -> None:
        step = Step(self, self.flat.at[op.place])
        labels = self.classes.fresh(_channels(step, port, axes))
        self.seed = np.where(done, -1, labels)
        self.work.append(step.at)
        step.put(port, self.seed)
        self._run()

    def _run(self) -> None:
        while self.alive:
            if self.work:
                at = self.work.popleft()
                if not apply(Step(self, at)):
                    self.waiting[at] = None
            elif self.waiting:
                at = next(iter(self.waiting))
                del self.waiting[at]
                apply(Step(self, at, decide=True))
            else:
                return

    def leaves(self, sign: int) -> list[Labels | None]:
        """The labels of all parameters."""
        return [self.see(number, sign) for number in range(len(self.flat.paths))]

    def channels(self) -> np.ndarray:
        """Label -> number of its channel; -1 where parameters of one sign only have it."""
        made, used = (_free(self.leaves(sign)) for sign in (1, -1))
        seed = self.classes.find(self.seed).reshape(-1)
        both = list(dict.fromkeys(seed[np.isin(seed, np.intersect1d(made, used))].tolist()))
        channel = np.full(len(self.classes.parent) + 1, -1)  # one more for the label -1
        channel[both] = np.arange(len(both))
        return channel

    def cover(self, covered: dict[str, np.ndarray]) -> None:
        """Notes which channels of the inputs of all layers have free labels, by site name."""
        for op, tap in self.flat.layers():
            step = Step(self, self.flat.at[op.place])
            labels = step.see(tap.operand)
            if labels is not None and self.modes.get((step.at, 1), "weight") == "weight":
                shape = _channels(step, tap.operand, input_axes(op.eqn, tap.operand))
                here = np.broadcast_to(labels > FIXED, shape)
                covered[tap.site.name] = here | covered.get(tap.site.name, np.zeros(1, bool))


def _channels(step: Step, port: int, axes: set[int]) -> tuple[int, ...]:
    # Shape of labels that depend on some axes of a port, and on the trip.
    sizes = (n if axis in axes else 1 for axis, n in enumerate(step.shape(port)))
    return (step.flat.trips[step.op.region], *sizes)


def _free(found: list[Labels | None]) -> np.ndarray:
    flat = [labels[labels > FIXED] for labels in found if labels is not None]
    return np.unique(np.concatenate(flat)) if flat else np.zeros(0, np.int64)


def search(
    flat: Flat, seed: Callable[[Trial], None], *, fold: bool = False, most: int = 64
) -> Trial:
    """The trial that leaves most labels free, over the choices of what carries a product.

    Args:
      flat: the program.
      seed: starts a trial.
      fold: as in `Trial`.
      most: trials at most.
    """
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
