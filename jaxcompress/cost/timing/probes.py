"""Times what layers cost on this machine's CPU, as XLA uses it.

Small networks of one kind of layer, as deep and as varied as real ones, are timed, interleaved, so
that each call finds caches and threads as other programs leave them; rates, the speed of gathering
patches and the overhead of a kernel are the non-negative least squares fit to the medians.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.optimize import nnls

from jaxcompress.cost.timing.clock import interleaved

_LANES = (1, 4, 8, 16)
_CHAIN = 12  # products in a row


class Probe(NamedTuple):
    """A program to time, and what its layers are made of.

    Attributes:
      op: the kind of its layers.
      run: runs it.
      layers: MACs, elements of patches, and input channels of each layer.
      outputs: elements that its layers put out, which its elementwise kernels read and write.
    """

    op: str
    run: Callable[[], Any]
    layers: list[tuple[int, int, int]]
    outputs: int


def _network(
    op: str, size: int, inputs: int, layers: Sequence[tuple[int, int]], taps: int
) -> Probe:
    # As networks have them: convolutions of (width, stride), BatchNorm and ReLU behind each.
    x = jax.random.normal(jax.random.key(0), (1, size, size, inputs))
    params, made, outputs = [], [], 0
    for i, (width, stride) in enumerate(layers):
        groups = inputs if op == "depthwise" else 1
        shape = (taps, taps, inputs // groups, width)
        w = jax.random.normal(jax.random.key(i), shape) / float(np.prod(shape[:-1])) ** 0.5
        zero, one = jnp.zeros((1, 1, 1, width)), jnp.ones((1, 1, 1, width))
        params.append((w, zero, one, one, zero))
        size = -(-size // stride)
        patches = size * size * taps * taps * inputs
        made.append((patches * width // groups, patches, inputs // groups))
        outputs, inputs = outputs + size * size * width, width

    @jax.jit
    def run(params, x):
        for (w, mean, variance, scale, bias), (_, stride) in zip(params, layers, strict=True):
            x = lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=x.shape[-1] if op == "depthwise" else 1,
            )
            x = jax.nn.relu((x - mean) * (lax.rsqrt(variance + 1e-5) * scale) + bias)
        return x

    return Probe(op, lambda: run(params, x), made, outputs)


def _stages(width: int, depth: int) -> list[tuple[int, int]]:
    # Three stages, each of half the size and twice the width.
    widths = [width * 2**stage for stage in range(3)]
    return [(w, 1 + (i == 0 and w > width)) for w in widths for i in range(depth)]


def _dot(op: str, rows: int, width: int, *, batch: int = 1) -> Probe:
    x = jax.random.normal(jax.random.key(0), (batch, rows, width))
    keys = jax.random.split(jax.random.key(1), _CHAIN)
    weights = [jax.random.normal(key, (batch, width, width)) / width**0.5 for key in keys]

    @jax.jit
    def run(weights, x):
        for i, w in enumerate(weights):
            x = jax.nn.relu(jnp.matmul(x, w) + 0.01 * i)
        return x

    layers = [(x.size * width, x.size, width)] * _CHAIN
    return Probe(op, lambda: run(weights, x), layers, x.size * _CHAIN)


def probes(*, short: bool = False) -> list[Probe]:
    """The programs that are timed: widths, sizes and depths that small networks have."""
    shapes = [(w, d) for w in (8, 14, 6, 16, 10, 20) for d in (3, 5)]
    shapes = shapes[:3] if short else [*shapes, (32, 3)]
    others = shapes if short else shapes[::2]
    found = [_network("conv", 32, 3, _stages(width, depth), 3) for width, depth in shapes]
    for width, depth in others:
        found.append(_network("pointwise", 32, width, _stages(4 * width, depth), 1))
        strides = [(width, 1 + (i == 0)) for _ in range(3) for i in range(depth)]
        found.append(_network("depthwise", 64, width, strides, 3))
    found += [_dot("dense", rows, width) for rows, width in ((1, 64), (16, 256), (128, 256))]
    return found + [_dot("matmul", rows, 64, batch=8) for rows in (8, 64, 256)]


class Fitted(NamedTuple):
    """Speed of one class of layers: t = macs / rate + patches / unfold + overhead.

    Attributes:
      rate: MAC/s.
      unfold, ragged: elements of patches per second, input channels padded to `vector`, where they
        are a multiple of `packet` and where not; inf where gathering costs nothing.
      overhead: s.
      error: mean relative error that the fit leaves.
    """

    rate: float
    unfold: float
    ragged: float
    overhead: float
    error: float


def fit(
    programs: Sequence[Sequence[tuple[int, int, int]]],
    seconds: Sequence[float],
    *,
    vector: int = 1,
    packet: int = 1,
) -> Fitted:
    """Fits times of programs; relative errors are minimized, no cost is negative.

    Args:
      programs: MACs, elements of patches and input channels of the layers of each.
      seconds: what each took.
      vector, packet: channels.

    >>> layers = [(100, 10, 8), (200, 10, 8), (100, 40, 8)]
    >>> fitted = fit([[layer] for layer in layers], [3.1, 5.1, 3.4])
    >>> [round(x, 3) for x in fitted]
    [50.0, 100.0, inf, 1.0, 0.0]
    """
    rows = [_columns(np.asarray(layers, float), vector, packet) for layers in programs]
    design = np.stack(rows) / np.asarray(seconds, float)[:, None]
    scale = np.maximum(design.max(axis=0), 1e-300)
    found = nnls(design / scale, np.ones(len(seconds)))[0] / scale
    rate, unfold, slow = (float(1 / x) if x > 0 else float("inf") for x in found[:3])
    error = float(np.mean(np.abs(design @ found - 1)))
    return Fitted(rate, unfold, slow, float(found[3]), error)


def _columns(layers: np.ndarray, vector: int, packet: int) -> np.ndarray:
    macs, patches, channels = layers.T
    padded = patches * (np.ceil(channels / vector) * vector / channels)
    ragged = channels % packet != 0
    return np.array([macs.sum(), padded[~ragged].sum(), padded[ragged].sum(), len(layers)])


def fits(timed: list[Probe], seconds: list[float]) -> tuple[dict[str, Fitted], int, int]:
    """The speed of every class of layers, and the vector and packet, in channels, of convolutions.

    Of the widths that processors have, those that leave the smallest error.

    Args:
      timed: the programs.
      seconds: what the layers of each took.
    """
    groups = {op: [i for i, p in enumerate(timed) if p.op == op] for op in {p.op for p in timed}}

    def fitted(op: str, vector: int = 1, packet: int = 1) -> Fitted:
        layers = [timed[i].layers for i in groups[op]]
        return fit(layers, [seconds[i] for i in groups[op]], vector=vector, packet=packet)

    tried = {(v, p): fitted("conv", v, p) for v in _LANES for p in _LANES if p <= v}
    # Packets that are not full cannot be gathered faster than full ones.
    sound = [lanes for lanes, found in tried.items() if found.ragged <= found.unfold]
    best = min([(1, 1), *sound], key=lambda lanes: tried[lanes].error)
    found = {op: fitted(op) for op in sorted(groups)}
    return {**found, "conv": tried[best]}, *best


def bandwidth(size: int, *, repeats: int) -> float:
    """Bytes per second that a sum over `size` bytes reads."""
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return size / interleaved({"sum": lambda: total(x)}, repeats=repeats)["sum"]


def elementwise(*, repeats: int) -> tuple[float, float, float]:
    """Operations per second, bytes per second in the cache, and seconds of overhead of a kernel.

    The first from many operations in one kernel, the others from one operation in many kernels on
    arrays of two sizes.
    """
    count, loops, small, large = 64, 200, 1 << 8, 1 << 16

    @jax.jit
    def chain(x):
        for i in range(count // 2):
            x = (x + 0.5) * (0.25 + i / 128)
        return x

    @jax.jit
    def kernels(x):
        return lax.fori_loop(0, loops, lambda _, x: x * 0.5 + 0.25, x)

    xs = {n: jnp.ones(n, jnp.float32) for n in (small, large)}
    runs = {str(n): functools.partial(kernels, x) for n, x in xs.items()}
    taken = interleaved({**runs, "chain": lambda: chain(xs[large])}, repeats=repeats)
    slope = (taken[str(large)] - taken[str(small)]) / loops / (large - small)
    return count * large / taken["chain"], 8 / slope, taken[str(small)] / loops


def _call() -> Callable[[], Any]:
    # A call from Python with 100 arrays, as many as small networks have.
    arrays = [jnp.ones(16) for _ in range(100)]
    first = jax.jit(lambda arrays: arrays[0] + 1.0, keep_unused=True)
    return lambda: first(arrays)


class Timings(NamedTuple):
    """What one session of timing found.

    Attributes:
      probes, seconds: the programs, and what their layers took, calls and elementwise apart.
      call: s of a call from Python.
      elementwise, cached, overhead: see `elementwise`.
      dram: byte/s.
      beside: median seconds of a call of what ran in the same rounds.
    """

    probes: list[Probe]
    seconds: list[float]
    call: float
    elementwise: float
    cached: float
    overhead: float
    dram: float
    beside: dict[str, float]


def timings(
    *,
    repeats: int = 25,
    short: bool = False,
    beside: Mapping[str, Callable[[], Any]] | None = None,
) -> Timings:
    """Times the programs, interleaved, and in the same rounds what else is to be compared.

    Args:
      repeats: rounds.
      short: fewer programs, for tests; the figures mean little.
      beside: calls that take part in the rounds, as the speed of many machines drifts.

    Raises:
      ValueError: JAX does not run on a CPU here, or `repeats` is below 1.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(f"measures a CPU, but JAX runs on {jax.default_backend()!r}")
    if repeats < 1:
        raise ValueError(f"need repeats >= 1, got {repeats=}")
    timed = probes(short=short)
    runs = {f"probe {i}": p.run for i, p in enumerate(timed)}
    others = {f"beside {name}": run for name, run in (beside or {}).items()}
    medians = interleaved({**runs, **others, "call": _call()}, repeats=repeats)
    rate, cached, overhead = elementwise(repeats=repeats)
    call = medians["call"]
    kernels = [len(p.layers) * overhead + 8 * p.outputs / cached for p in timed]
    seconds = [medians[key] - call - took for key, took in zip(runs, kernels, strict=True)]
    return Timings(
        probes=timed,
        seconds=[max(taken, 1e-9) for taken in seconds],
        call=call,
        elementwise=rate,
        cached=cached,
        overhead=overhead,
        dram=bandwidth((16 if short else 256) << 20, repeats=repeats),
        beside={name: medians[f"beside {name}"] for name in beside or {}},
    )
