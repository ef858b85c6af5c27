"""Ways to store a weight, and all weights of a network stored so."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxcompress.core.combine import chain
from jaxcompress.core.compressor import Compressor, CompressState
from jaxcompress.formats import integer
from jaxcompress.graph.layers.layer_by_layer import Progress
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.masking.given_masks import fixed
from jaxcompress.quantize.ptq import Spec, gptq, recipe, round_to_nearest
from jaxcompress.quantize.ranges.clipping import mse


@dataclass(frozen=True)
class Option:
    """How a weight is stored.

    Attributes:
      spec: its numbers.
      sparsity: share of zeros, in [0, 1).

    Raises:
      TypeError: spec is no `quantize.Spec`.
      ValueError: sparsity out of range.
    """

    spec: Spec
    sparsity: float = 0.0

    def __post_init__(self):
        if not isinstance(self.spec, Spec):
            raise TypeError(f"spec must be a quantize.Spec, got {self.spec!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")


def integer_options(
    bits: Iterable[int] = range(2, 9), *, sparsity: Iterable[float] = (0.0,)
) -> dict[str, Option]:
    """{"int4": Option, ...}: integers per output channel with ranges of least squared error.

    >>> list(integer_options((2, 8), sparsity=(0.0, 0.5)))
    ['int2', 'int8', 'int2, 50 % zeros', 'int8, 50 % zeros']
    """
    bits = tuple(bits)
    specs = {b: Spec(integer(b), calibrate=mse() if b < 8 else None) for b in bits}
    return {
        f"int{b}" + (f", {100 * share:g} % zeros" if share else ""): Option(specs[b], share)
        for share in sparsity
        for b in bits
    }


def as_options(options: Mapping[str, "Option | Spec"] | None) -> dict[str, Option]:
    """The options by name; a `Spec` is one without zeros.

    Raises:
      TypeError: one is neither, with its name.
      ValueError: there are none.
    """
    if options is None:
        return integer_options()
    if not options:
        raise ValueError("options: there must be at least one")
    found = {}
    for name, option in options.items():
        if not isinstance(option, Option | Spec):
            raise TypeError(f"options[{name!r}] must be a Spec or an Option, got {option!r}")
        found[name] = Option(option) if isinstance(option, Spec) else option
    return found


def stored(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    chosen: Mapping[str, Option],
    *,
    fitted: bool,
    sparse: bool,
    progress: Progress = iter,
) -> tuple[Compressor, Any, CompressState]:
    """(recipe, params, state) of weights stored as {path: Option} says.

    Args:
      fitted: to the outputs on the batches, by GPTQ or SparseGPT; else rounded to nearest.
      sparse: whether any option of the search has zeros: all weights then go one way, so that an
        option gives the same weights whatever the others are.

    Raises:
      ValueError: options with zeros, but not `fitted`.
    """
    spec = {re.escape(site): option.spec for site, option in chosen.items()}
    shares = {re.escape(site): option.sparsity for site, option in chosen.items()}
    if not fitted and not sparse:
        return recipe(spec), *round_to_nearest(apply_fn, params, batches, spec)
    if not sparse:
        return recipe(spec), *gptq(apply_fn, params, batches, spec, progress=progress)
    if not fitted:
        raise ValueError("options with zeros need batches of the data")
    found, state = sparse_gpt(apply_fn, params, batches, shares, quantize=spec, progress=progress)
    return chain(recipe(spec), fixed(state.buffers[1].masks)), found, state
