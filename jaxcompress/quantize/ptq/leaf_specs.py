"""What post-training methods are told: formats by path, and what they find: layers and a recipe."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcompress.core.combine import by_path
from jaxcompress.core.compressor import Compressor, CompressState, identity, is_absent
from jaxcompress.core.notices import warn
from jaxcompress.formats import Format, Granularity, check_format, granularity_for
from jaxcompress.graph.layers.layer_by_layer import leaf, match_layers, replaced
from jaxcompress.graph.layers.matrices import Layer, layers
from jaxcompress.graph.layers.statistics import Batches, check_batches
from jaxcompress.graph.layers.uses import Pool
from jaxcompress.quantize.fake_quantized_weights import weights
from jaxcompress.quantize.ranges.min_max import Calibrator, check_calibrator

__all__ = ["Plan", "Rules", "Spec", "check_rules", "leaf", "plan", "recipe", "replaced"]


@dataclass(frozen=True)
class Spec:
    """How a weight is stored: the arguments of `quantize.weights`.

    Attributes:
      format: e.g. `formats.integer(4)`.
      axis: channel axes; the default is the last one, the outputs of Flax kernels.
      group, block: elements that share a scale, see `quantize.weights`.
      calibrate: how the range of a block is found; `quantize.mse()` clips.
    """

    format: Format
    axis: int | tuple[int, ...] | None = -1
    group: int | None = None
    block: int | tuple[int, ...] | None = None
    calibrate: Calibrator | None = None

    def __post_init__(self):
        check_format(self.format)
        check_calibrator(self.calibrate)

    @property
    def where(self) -> Granularity:
        """Which elements share a scale."""
        return granularity_for(self.format, self._channels, self.group, self.block)

    @property
    def _channels(self) -> int | tuple[int, ...] | None:
        return None if self.block is not None else self.axis

    def weights(self) -> Compressor:
        """The quantizer of the leaves it is for."""
        return weights(
            self.format,
            axis=self._channels,
            group=self.group,
            block=self.block,
            calibrate=self.calibrate,
        )


Rules = Mapping[str, Spec]


def recipe(spec: Rules) -> Compressor:
    """The Compressor of a specification: it applies and packs what the methods give.

    Args:
      spec: regular expression on the whole path -> `Spec`; the first match wins, other leaves stay.

    >>> import jax.numpy as jnp
    >>> from jaxcompress.core import packed_bytes
    >>> from jaxcompress.formats import integer
    >>> four = recipe({".*kernel": Spec(integer(4))})
    >>> params = {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}
    >>> packed_bytes(four.pack(params, four.init(params)))  # 8 of codes, 2 scales, a bias
    24
    """
    check_rules(spec)
    return by_path({rule: s.weights() for rule, s in spec.items()}, default=identity())


def check_rules(spec: Any) -> None:
    """Raises TypeError for what is not a mapping of rules to `Spec`."""
    if not isinstance(spec, Mapping):
        raise TypeError(
            "spec must map regular expressions on paths to Spec, such as "
            f'{{".*kernel": Spec(formats.integer(4))}}, got {type(spec).__name__}'
        )
    for rule, entry in spec.items():
        if not isinstance(entry, Spec):
            raise TypeError(f"spec: {rule!r} must be a Spec, got {type(entry).__name__}")


class Plan(NamedTuple):
    """A network and a specification, matched.

    Attributes:
      recipe: the Compressor.
      layers: those whose leaf a rule takes, in order of execution.
      rules: path of a leaf -> its rule.
      spec: path of a leaf -> its `Spec`.
      batches: the data, a list.
      pools: the weights of the layers, each with all that uses them.
      apart: "path (reason)" of the leaves whose uses have no pool; or "".
      read: path of a leaf -> what else than contractions reads it.
    """

    recipe: Compressor
    layers: tuple[Layer, ...]
    rules: dict[str, str]
    spec: dict[str, Spec]
    batches: Batches
    pools: tuple[Pool, ...]
    apart: str
    read: dict[str, str]

    def with_qparams(self, state: CompressState, qparams: Mapping[str, Any]) -> CompressState:
        """The recipe's state with other scales, {path: the format's arrays}."""
        buffers = dict(state.buffers or {})
        for path, found in qparams.items():
            rule = self.rules[path]
            if not is_absent(found):  # a format without scales has no state
                buffers[rule] = {**buffers[rule], path: found}
        return state._replace(buffers=buffers or ())

    def qparams(self, state: CompressState, path: str) -> Any:
        """The scales of a leaf."""
        found = (state.buffers or {}).get(self.rules[path], ())
        return () if is_absent(found) else found[path]


def plan(
    apply_fn: Callable[..., Any], params: Any, data: Iterable[tuple[Any, ...]], spec: Rules
) -> Plan:
    """Matches a specification with the layers of a network.

    Warns of leaves that a rule takes and that no layer uses as they are: they are rounded only.

    Raises:
      ValueError: no data; a rule that matches nothing; no layer that a rule takes.
      TypeError: `spec` or a batch is of another kind.
    """
    check_rules(spec)
    batches = check_batches(data)
    network = layers(apply_fn, params, *batches[0])
    matched = match_layers(network, params, spec)
    read = {reader.path: reader.what for reader in network.readers}
    if matched.left:
        warn(f"rounded only, since no contraction takes them as they are: {matched.left}")
    specs = {path: spec[rule] for path, rule in matched.rules.items()}
    found = matched.layers, matched.rules, specs, batches, matched.pools, matched.apart
    return Plan(recipe(spec), *found, read)
