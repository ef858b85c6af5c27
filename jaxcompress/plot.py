"""Plots on Matplotlib axes: where time goes, how costs compare, what sites and sizes lose."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress.cost import Cost
from jaxcompress.cost.report import contractions
from jaxcompress.cost.result import LayerCost
from jaxcompress.search.sensitivities.measured import Sensitivity
from jaxcompress.search.solvers.pareto_front import Front

_COLORS = {"compute": "tab:blue", "memory": "tab:orange", "overhead": "tab:gray", "": "tab:gray"}


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "jaxcompress[experiments]"'
        ) from error
    return plt.gca()


def roofline(cost: Cost, axes: Any = None) -> Any:
    """MACs per second of every layer against its MACs per byte, under the device's roofs.

    Flat roofs are the rates that the layers use, the slope is the bandwidth of the memory of the
    activations. A layer under a roof loses its distance to overhead, padding or unpacking.

    Args:
      cost: what `cost.estimate` gave.
      axes: Matplotlib axes; None for the current ones.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    axes, device = _axes(axes), cost.device
    layers = [layer for layer in cost.layers if layer.macs and layer.latency_s]
    points = [
        (layer.macs / max(_bytes(layer), 1), layer.macs / layer.latency_s) for layer in layers
    ]
    for bound, color in _COLORS.items():
        shown = [p for p, layer in zip(points, layers, strict=True) if layer.bound == bound]
        if shown:
            axes.scatter(*zip(*shown, strict=True), s=18, color=color, label=bound, zorder=3)
    low = min((x for x, _ in points), default=1.0) / 4
    high = max((x for x, _ in points), default=1.0) * 4
    bandwidth = device.memories[cost.activation_memory].bandwidth.value
    used = {
        device.macs_per_s(rate)
        for rate in device.throughput
        if any(layer.op == rate.op and rate.pattern == "dense" for layer in layers)
    }
    for rate in sorted(used):
        knee = min(max(rate / bandwidth, low), high)
        axes.plot(
            [low, knee, high], [low * bandwidth, min(rate, knee * bandwidth), rate], "k-", lw=0.8
        )
    axes.set(xscale="log", yscale="log", xlabel="MAC per byte", ylabel="MAC/s")
    axes.set_title(f"{device.name} ({device.runtime})")
    if layers:
        axes.legend()
    return axes


def _bytes(layer: LayerCost) -> int:
    return layer.activation_bytes + layer.weight_read_bytes


def layers(cost: Cost, axes: Any = None, *, quantity: str = "latency_s", most: int = 40) -> Any:
    """A bar for every layer, in the color of what bounds it.

    Args:
      cost: what `cost.estimate` gave.
      axes: Matplotlib axes; None for the current ones.
      quantity: a number of `LayerCost`: "latency_s", "energy_j", "weight_bytes", "live_bytes", ...
      most: how many layers are shown, the largest ones in their order.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
      ValueError: no such quantity.
    """
    shown = contractions(cost)
    if not shown or not isinstance(getattr(shown[0], quantity, None), int | float):
        raise ValueError(f"quantity: {quantity!r} is no number of a layer, such as 'latency_s'")
    axes = _axes(axes)
    largest = sorted(shown, key=lambda layer: getattr(layer, quantity))[-most:]
    shown = [layer for layer in shown if layer in largest]
    values = [getattr(layer, quantity) for layer in shown]
    positions = range(len(shown))
    axes.barh(positions, values, color=[_COLORS[layer.bound] for layer in shown])
    axes.set_yticks(positions, [layer.name for layer in shown], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel=quantity, title=f"{cost.device.name} ({cost.device.runtime})")
    for bound in dict.fromkeys(layer.bound for layer in shown if layer.bound):
        axes.barh([0], [0], color=_COLORS[bound], label=bound)
    axes.legend()
    return axes


def compare(
    costs: Mapping[str, Cost] | Sequence[Cost], axes: Any = None, *, quantity: str = "latency_s"
) -> Any:
    """A bar for each of several costs: devices, or before and after; hatched where it does not fit.

    Args:
      costs: by name, or a sequence (named after their devices).
      axes: Matplotlib axes; None for the current ones.
      quantity: a number of `Cost`.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    axes = _axes(axes)
    if not isinstance(costs, Mapping):
        costs = {f"{cost.device.name} ({cost.device.runtime})": cost for cost in costs}
    for i, (name, cost) in enumerate(costs.items()):
        hatch = None if cost.fits() else "///"
        axes.barh(i, getattr(cost, quantity), color=_COLORS[cost.bound], hatch=hatch)
        axes.text(getattr(cost, quantity), i, f" {name}", va="center", fontsize=7)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=quantity, title="hatched: does not fit")
    return axes


def sensitivity(
    found: Sensitivity, axes: Any = None, *, metric: str = "kl", kind: str = "weights"
) -> Any:
    """A map of sites by options: how much each raises a metric alone, on a logarithmic scale.

    Args:
      found: what `search.sensitivity` gave.
      axes: Matplotlib axes; None for the current ones.
      metric, kind: as `Sensitivity.increase`. Increases of at most 1e-9 have one color.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
      ValueError: no such metric or kind.
    """
    increase = found.increase(metric, kind)
    axes = _axes(axes)
    options = list(next(iter(increase.values()), {}))
    values = [[max(by[name], 1e-9) for name in options] for by in increase.values()]
    image = axes.imshow(values, norm="log", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(options)), options)
    axes.set_yticks(range(len(increase)), list(increase), fontsize=6)
    axes.set_title(f"increase of {metric} by one site alone ({kind})")
    axes.figure.colorbar(image, ax=axes)
    return axes


def front(found: Front, axes: Any = None) -> Any:
    """The Pareto front of a problem: the least sum of losses by cost.

    Args:
      found: what `search.front` gave.
      axes: Matplotlib axes; None for the current ones.

    Returns:
      The axes.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    axes = _axes(axes)
    axes.step(found.cost, found.loss, where="post", marker=".", label="front")
    axes.set(xlabel=found.name, ylabel="sum of losses", title=f"{len(found)} best of all choices")
    return axes
