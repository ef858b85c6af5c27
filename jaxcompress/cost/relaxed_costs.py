"""Costs as a differentiable function of bits and of kept channels: a regulariser for training."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.core.paths import near_misses
from jaxcompress.cost.count import Stored
from jaxcompress.cost.device_model import Device
from jaxcompress.cost.estimation import Analysis, analyse
from jaxcompress.cost.timing.roofline import Load, timing
from jaxcompress.graph.flat_list import Trips

GRID = (2, 3, 4, 5, 6, 7, 8, 16)
"""Bits of integer weights at which a device is asked; between them costs are interpolated."""


class SoftCost(NamedTuple):
    """Scalars, float32; differentiable in bits and kept shares."""

    latency_s: jax.Array
    energy_j: jax.Array
    weight_bytes: jax.Array


Settings = Mapping[str, Any]  # path of a weight -> scalar


def differentiable(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    device: "str | os.PathLike[str] | Device",
    activations: Any = None,
    trips: Trips = None,
    fusion: str | None = None,
) -> Callable[..., SoftCost]:
    """A function `soft(bits={}, kept={}) -> SoftCost` of a network on a device, for `grad`.

    `bits` maps paths of weights (of `graph.trace`'s sites) to bits, `kept` to the share of their
    multiply-accumulates and weights that is left (channels, patterns that the device exploits);
    weights that are not named stay as they are in `params`. At the integer bits of `GRID` and all
    kept, the costs are those of `estimate` for integer weights with the scales that `params` has;
    between them latency is interpolated linearly, beyond them (and beyond the types that the device
    has kernels for) constant. A loss may add `weight * soft(bits=bits).latency_s`.

    Args:
      apply_fn, params, *inputs, device, activations, trips, fusion: as `estimate`.

    Raises:
      ValueError: as `estimate`; (when called) a path that is no weight of a contraction.

    >>> x, w = jnp.ones((1, 64)), {"w": jnp.ones((64, 32))}
    >>> soft = differentiable(lambda p, x: x @ p["w"], w, x, device="stm32l4r5", activations=8)
    >>> float(soft(bits={"w": 8.0}).weight_bytes)
    2048.0
    >>> slope = jax.grad(lambda b: soft(bits={"w": b}).weight_bytes)(8.0)
    >>> float(slope)
    256.0
    """
    seen = analyse(
        apply_fn,
        params,
        *inputs,
        device=device,
        activations=activations,
        trips=trips,
        fusion=fusion,
    )
    rows, fixed_s = _curves(seen)
    stored, watts = seen.stored, seen.device.active_power.value
    paths = {path for row in rows for path in row.paths}

    def soft(*, bits: Settings | None = None, kept: Settings | None = None) -> SoftCost:
        bits, kept = bits or {}, kept or {}
        for name, given in (("bits", bits), ("kept", kept)):
            for path in given:
                if path not in paths:
                    nearest = ", ".join(map(repr, near_misses(path, sorted(paths))))
                    raise ValueError(f"{name}: {path!r} is no weight of a contraction; {nearest}")
        latency = jnp.float32(fixed_s) + sum(_row_s(row, bits, kept) for row in rows)
        size = jnp.float32(sum(leaf.bytes for path, leaf in stored.items() if path not in bits))
        for path, b in bits.items():
            size += stored[path].size * jnp.asarray(b, jnp.float32) / 8 + _metadata(stored[path])
        for path, share in kept.items():
            at_bits = stored[path].size * jnp.asarray(bits.get(path, 0.0), jnp.float32) / 8
            whole = at_bits if path in bits else stored[path].bytes
            size -= (1 - jnp.asarray(share, jnp.float32)) * whole
        return SoftCost(latency, watts * latency, size)

    return soft


def _metadata(leaf: Stored) -> float:
    # Bytes of scales: what is stored besides the weights' own bits.
    return max(leaf.dense_bytes - leaf.size * leaf.bits / 8, 0.0)


class _Curve(NamedTuple):
    # Seconds of a contraction by bits of its weight, and as it is; overhead apart.
    paths: tuple[str, ...]
    bits: tuple[int, ...]
    seconds: tuple[float, ...]
    plain_s: float
    overhead_s: float


def _curves(seen: Analysis) -> tuple[list[_Curve], float]:
    rows, fixed_s = [], 0.0 if seen.device.call is None else seen.device.call.value
    for kernel in seen.kernels:
        if kernel.marks:
            continue
        site, load = seen.site(kernel), seen.load(kernel, "")
        time = timing(seen.device, load)
        if site is None or not site.params:
            fixed_s += time.latency_s
            continue
        largest = max(site.params, key=lambda path: seen.stored[path].size)
        times = load.weights / max(sum(seen.stored[path].size for path in site.params), 1)
        extra = times * sum(_metadata(seen.stored[path]) for path in site.params)
        bits = tuple(b for b in GRID if b <= 8 or _runs(seen, load, b))
        seconds = tuple(_seconds(seen.device, load, b, extra) for b in bits)
        rows.append(_Curve((largest,), bits, seconds, _busy(time), time.overhead_s))
    return rows, fixed_s


def _runs(seen: Analysis, load: Load, bits: int) -> bool:
    try:
        _seconds(seen.device, load, bits, 0.0)
    except ValueError:  # no type of the device holds it
        return False
    return True


def _seconds(device: Device, load: Load, bits: int, extra: float) -> float:
    read = load.weights * bits / 8 + extra
    narrow = load._replace(
        weight_dtype=f"int{bits}",
        pattern="dense",
        density=1.0,
        weight_read_bytes=read,
        dense_read_bytes=read,
    )
    return _busy(timing(device, narrow))


def _busy(time: Any) -> float:
    return time.latency_s - time.overhead_s


def _row_s(row: _Curve, bits: Settings, kept: Settings) -> jax.Array:
    (path,) = row.paths
    seconds = jnp.float32(row.plain_s)
    if path in bits:
        grid = jnp.asarray(row.bits, jnp.float32)
        at = jnp.asarray(bits[path], jnp.float32)
        seconds = jnp.interp(at, grid, jnp.asarray(row.seconds, jnp.float32))
    if path in kept:
        seconds = seconds * jnp.asarray(kept[path], jnp.float32)
    return seconds + jnp.float32(row.overhead_s)
