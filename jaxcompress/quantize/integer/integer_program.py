"""Networks that run in integers alone: codes in, int8 products into int32, codes out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.notices import warn
from jaxcompress.core.packed import Grid, unpack
from jaxcompress.formats import Format, integer
from jaxcompress.formats.bits import signed
from jaxcompress.formats.integers import Integer
from jaxcompress.graph import trace
from jaxcompress.quantize.integer import lowering_moves, lowering_rules
from jaxcompress.quantize.integer.constants import Node, build
from jaxcompress.quantize.integer.float_check import assert_integer_only, float_operations
from jaxcompress.quantize.integer.integer_steps import run_node
from jaxcompress.quantize.integer.lowering import Plan, lower
from jaxcompress.quantize.integer.requantize import rounded_product
from jaxcompress.quantize.integer.simulated_steps import rounded_once, simulate_node
from jaxcompress.quantize.integer.traced_ranges import Flat, calibrated_grids, flatten
from jaxcompress.quantize.integer.trained_grids import check_grids
from jaxcompress.quantize.ranges.min_max import Calibrator, min_max

__all__ = [
    "IntegerProgram",
    "assert_integer_only",
    "differing_codes",
    "float_operations",
    "integer_only",
]

_INT8, _UINT8 = integer(8), integer(8, symmetric=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntegerProgram:
    """A network in integers; a pytree whose leaves are its weights, constants and grids.

    Give it to `jax.jit` as an argument: `jax.jit(IntegerProgram.run)(program, codes)`. Called
    outside, `run` compiles every kind of step by itself, which on CPU is the faster program: in a
    whole one, XLA computes codes again for each of their readers.

    Attributes:
      constants: of every step, int32 and int8 arrays; see `Node`.
      weight_scales: float32 of every step, size 1 off the output channels; () without weights. For
        export: `run` has no use for them.
      grids: of every tensor: the input, then the result of each step.
      nodes: the steps, in order; step i gives tensor i + 1.
      output: number of the tensor that is the result.
      shape: of the input when the network was traced.
      batched: whether batches of other sizes run too.
    """

    constants: tuple[dict[str, Array], ...]
    weight_scales: tuple[Any, ...]
    grids: tuple[Grid, ...]
    nodes: tuple[Node, ...] = dataclasses.field(metadata={"static": True})
    output: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    batched: bool = dataclasses.field(metadata={"static": True})

    def quantize_input(self, x: Any) -> Array:
        """The codes of inputs [B, ...]: uint8, or int8 on symmetric grids."""
        if not jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating):
            raise TypeError(
                f"quantize_input(x): must be floating point, got {jnp.asarray(x).dtype}"
            )
        self._check("quantize_input(x)", x)
        grid = self.grids[0]
        assert isinstance(grid.format, Integer)
        codes = grid.format.encode(jnp.asarray(x), grid.qparams)
        if grid.format.symmetric:
            return signed(codes, grid.format.bits).astype(jnp.int8)
        return codes

    def run(self, codes: Any) -> Array:
        """The codes of the result from those of the input; every operation is one of integers."""
        return self.run_every(codes)[self.output]

    def run_every(self, codes: Any) -> tuple[Array, ...]:
        """As `run`: the codes of every tensor."""
        self._check_codes("run(codes)", codes)
        tensors = [jnp.asarray(codes)]
        for node, constants in zip(self.nodes, self.constants, strict=True):
            inputs = (tensors[number] for number in node.inputs)
            tensors.append(run_node(node, constants, *inputs))
        return tuple(tensors)

    def simulate(self, codes: Any, *, rounding: str = "twice") -> np.ndarray:
        """What `run` must give, computed in floating point on the host; not for `jit`.

        Args:
          codes: as for `run`.
          rounding: of an accumulator: "twice", as `run` does; or "once", to the nearest code, as
            runtimes do that bring it to the next grid in float32 (ONNX Runtime, XNNPACK).
        """
        return self.simulate_every(codes, rounding=rounding)[self.output]

    def simulate_every(self, codes: Any, *, rounding: str = "twice") -> tuple[np.ndarray, ...]:
        """As `simulate`: the codes of every tensor."""
        products = {"twice": rounded_product, "once": rounded_once}
        if rounding not in products:
            raise ValueError(f"simulate(rounding): 'twice' or 'once', got {rounding!r}")
        self._check_codes("simulate(codes)", codes)
        tensors = [np.asarray(codes)]
        for node, constants in zip(self.nodes, self.constants, strict=True):
            numbers = {key: np.asarray(value) for key, value in constants.items()}
            inputs = (tensors[number] for number in node.inputs)
            tensors.append(simulate_node(node, numbers, *inputs, product=products[rounding]))
        return tuple(tensors)

    def dequantize(self, codes: Any) -> Array:
        """The numbers of the result's codes, float32."""
        grid = self.grids[self.output]
        steps = jnp.asarray(codes).astype(jnp.int32)
        if not grid.format.symmetric:
            steps = steps - grid.qparams.zero_point.astype(jnp.int32)
        return steps.astype(jnp.float32) * grid.qparams.scale

    @property
    def code_dtype(self) -> Any:
        """uint8, or int8 on symmetric grids."""
        return jnp.dtype(jnp.int8 if self.grids[0].format.symmetric else jnp.uint8)

    def _check_codes(self, what: str, codes: Any) -> None:
        dtype = getattr(codes, "dtype", type(codes).__name__)
        if dtype != self.code_dtype:
            raise TypeError(
                f"{what}: must be {self.code_dtype}, as quantize_input gives, got {dtype}"
            )
        self._check(what, codes)

    def _check(self, what: str, x: Any) -> None:
        given, known = tuple(x.shape), self.shape
        fits = given == known or (self.batched and given[1:] == known[1:] and len(given) > 0)
        if not fits or 0 in given:
            want = ("B", *known[1:]) if self.batched else known
            raise ValueError(
                f"{what}: must have the shape {str(want).replace(chr(39), '')}, got {given}"
            )


def integer_only(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    weights: Integer = _INT8,
    activations: Integer = _UINT8,
    calibrate: Calibrator | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> IntegerProgram:
    """A network whose every operation between quantized input and result is one of integers.

    r = S (q - Z) everywhere. Weights are symmetric, with one scale per output channel; biases are
    int32 in steps of S_x S_w; every tensor that leaves an accumulator is brought to its own grid by
    `requantize`. Convolution, bias, inference BatchNorm and clamp (ReLU, ReLU6) are one step;
    additions bring both operands to one scale first; means are sums of integers; padding is the
    zero point; views and maxima keep the grid of what they take.

    Runs: convolutions (strided, dilated, transposed, grouped, depthwise), dense layers, additions,
    subtractions and products of activations, multiplication and addition of constants, ReLU and
    other clamps, sums, means, average and maximum pooling, padding, slices, splits,
    concatenations, reshapes, transposes, broadcasts.

    Args:
      apply_fn: pure, (params, x) -> one array; Linen, NNX, Equinox or plain, in inference mode.
      params: pytree of arrays and packed leaves. Those on symmetric integers keep their codes and
        steps (one for the tensor or for each output channel), whatever `weights` says: what QAT
        has learned runs. Other packed weights are quantized again, and a warning names them.
      batches: float inputs, all of one shape, each x or (x,): the ranges are calibrated on them.
      weights: e.g. `formats.integer(8)`; symmetric, at most 8 bits.
      activations: e.g. `formats.integer(8, symmetric=False)`: uint8, as ONNX Runtime likes it.
      calibrate: how ranges are found, default `min_max()`.
      grids: {name of a contraction: grid of what enters it}, as `quantizer.grids(state)` of trained
        activations gives: they are kept, and codes there are those of the fake quantization, but
        for ties. Everything else, results of additions and of the network say, gets a grid from
        `batches`; contractions that `grids` leaves out do too, and a warning names them.

    Raises:
      TypeError: a format that is no `formats.integer`; inputs that are not floating point.
      ValueError: an operation that integers cannot do, with its name and scope; packed steps that
        differ along what is summed; a grid of no contraction; no batch, batches of several shapes,
        an empty input; NaN or Inf; an accumulator that int32 does not hold.

    Source: Jacob et al. 2018, arXiv 1712.05877.

    >>> params = {"w": jnp.array([[1.0, -0.5], [0.5, 1.0]]), "b": jnp.array([[0.0, 0.25]])}
    >>> x = jnp.array([[0.5, -1.0], [1.0, 0.25]])
    >>> program = integer_only(lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]), params, [x])
    >>> codes = program.run(program.quantize_input(x))
    >>> print(codes.dtype, program.dequantize(codes).round(2))
    uint8 [[0.   0.  ]
     [1.12 0.  ]]
    """
    _check_formats(weights, activations)
    inputs = _inputs(batches)
    first = next(inputs, None)
    if first is None:
        raise ValueError("batches is empty: calibration needs at least one batch of inputs")
    given: dict[str, Grid] = {}
    if grids:
        names = [tap.name for tap in trace(apply_fn, unpack(params), first).taps]
        given = check_grids(grids, names, symmetric=activations.symmetric)
        if rest_of := [name for name in names if name not in given]:
            warn(
                "integer_only(grids): no grid of what enters these contractions, the ranges of "
                f"batches stand in for it: {', '.join(rest_of)}"
            )
    flat = flatten(apply_fn, params, first, given)
    plan = lower(flat, lambda name: lowering_rules.RULES.get(name) or lowering_moves.rule_of(name))
    if plan.requantized:
        warn(
            f"integer_only quantizes packed weights again, to {weights.name}: "
            f"{', '.join(plan.requantized)}; it keeps symmetric integers that reach their "
            "contraction by views alone"
        )
    rest = _of_one_shape(first, inputs)
    named = {n: name for n, name in _names(flat, plan).items() if n not in flat.fixed}
    found = dict(flat.fixed) | calibrated_grids(
        flat, rest, named, format=activations, calibrate=calibrate or min_max()
    )
    built = build(plan, found, found[flat.input], weights=weights)
    return IntegerProgram(
        built.constants,
        built.weight_scales,
        built.grids,
        built.nodes,
        plan.output,
        tuple(first.shape),
        plan.batched,
    )


def _check_formats(weights: Format, activations: Format) -> None:
    for name, format in (("weights", weights), ("activations", activations)):
        if not isinstance(format, Integer) or not isinstance(format.bits, int):
            raise TypeError(f"{name} must be a formats.integer(bits), got {format!r}")
    if not weights.symmetric:  # type: ignore[attr-defined]
        raise ValueError("weights must be symmetric: formats.integer(8)")


def _inputs(batches: Iterable[Any]) -> Iterator[Array]:
    for given in batches:
        x: Any = given[0] if isinstance(given, tuple | list) and len(given) == 1 else given
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(
                f"batches must hold arrays x or tuples (x,), got {type(given).__name__}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"batches must hold floating point inputs, got {x.dtype}")
        if not x.shape or 0 in x.shape:
            raise ValueError(f"batches must hold inputs [B, ...] with elements, got {x.shape}")
        yield jnp.asarray(x)


def _of_one_shape(first: Array, rest: Iterable[Array]) -> Iterable[Array]:
    yield first
    for x in rest:
        if (x.shape, x.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"batches must have one shape: the first is {first.dtype}{list(first.shape)}, "
                f"another {x.dtype}{list(x.shape)}"
            )
        yield x


def _names(flat: Flat, plan: Plan) -> dict[int, str]:
    names = {flat.input: "the input"}
    for draft in plan.drafts:
        if draft.value is not None:
            names[draft.value] = f"{draft.kind} at {draft.scope or 'the top'}"
    return names


def differing_codes(program: IntegerProgram, codes: Any) -> np.ndarray:
    """How many codes of each tensor differ between the integers and the simulation, int64.

    >>> program = integer_only(lambda p, x: 0.5 * x, (), [jnp.array([[-1.0, 3.0]])])
    >>> print(differing_codes(program, jnp.array([[0, 255], [7, 8]], jnp.uint8)))
    [0 0]
    """
    pairs = zip(program.run_every(codes), program.simulate_every(codes), strict=True)
    return np.array([np.count_nonzero(np.asarray(a) != b) for a, b in pairs], np.int64)
