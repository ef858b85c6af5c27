"""Sensitivities as they were measured, and what is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax import Array

from jaxcompress.distill.logits import kd
from jaxcompress.train.step import cross_entropy as mean_cross_entropy

Metric = Callable[[Any, Any, Any], Array]
Values = dict[str, dict[str, dict[str, float]]]
KINDS = ("weights", "activations")


@dataclass(frozen=True)
class Sensitivity:
    """Metrics of the network with one site compressed, all others as they were.

    Attributes:
      base: {metric: value} of the network as it was.
      weights: {path of the leaf: {option: {metric: value}}}.
      activations: {name of the tap: {option: {metric: value}}}.
    """

    base: Mapping[str, float] = field(hash=False)
    weights: Mapping[str, Mapping[str, Mapping[str, float]]] = field(hash=False)
    activations: Mapping[str, Mapping[str, Mapping[str, float]]] = field(hash=False)

    def increase(self, metric: str, kind: str = "weights") -> dict[str, dict[str, float]]:
        """{site: {option: value - base}}; kind: "weights" or "activations".

        Raises:
          ValueError: no such metric or kind.
        """
        if metric not in self.base:
            raise ValueError(f"metric {metric!r} was not measured; there are {sorted(self.base)}")
        if kind not in ("weights", "activations"):
            raise ValueError(f'kind must be "weights" or "activations", got {kind!r}')
        return {
            site: {name: found[metric] - self.base[metric] for name, found in options.items()}
            for site, options in getattr(self, kind).items()
        }


def kl(outputs: Array, reference: Array, targets: Any) -> Array:
    """Mean over the examples of KL(softmax(reference) || softmax(outputs)), nats; a metric."""
    del targets
    return kd(outputs, reference, temperature=1.0)


def cross_entropy(outputs: Array, reference: Array, targets: Any) -> Array:
    """Mean cross-entropy of logits [B, classes] to the labels [B], nats; a metric."""
    del reference
    return mean_cross_entropy(outputs, targets)
