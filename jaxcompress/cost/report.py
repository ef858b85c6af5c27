"""Costs for people: a summary in plain text, tables with rich."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxcompress.cost.result import CALL, OTHER, Cost, LayerCost


def si(value: float, unit: str) -> str:
    """A number with three digits and an SI prefix.

    >>> si(0.000123, "s"), si(40551424, "MAC"), si(0, "J")
    ('123 us', '40.6 MMAC', '0 J')
    """
    if value == 0:
        return f"0 {unit}".rstrip()
    for prefix, scale in zip("TGMk", (1e12, 1e9, 1e6, 1e3), strict=True):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    for prefix, scale in zip(("", "m", "u", "n"), (1, 1e-3, 1e-6, 1e-9), strict=True):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix}{unit}".rstrip()
    return f"{value / 1e-12:.3g} p{unit}"


def summary(cost: Cost) -> str:
    """Totals, whether it fits, the slowest layers, fallbacks and notes, as lines of text."""
    runtime = " ".join(filter(None, (cost.device.runtime, cost.version)))
    low, high = cost.interval_s
    lines = [
        f"{cost.device.name} ({runtime}): {si(cost.latency_s, 's')} "
        f"({si(low, 's')} to {si(high, 's')}), "
        f"{si(cost.energy_j, 'J')}, {si(cost.macs, 'MAC')}",
        f"  weights {cost.weight_bytes:,} B, activations {cost.activation_bytes:,} B, "
        f"peak {cost.peak_bytes:,} B",
        f"  {cost.verdict()}",
    ]
    slowest = sorted(cost.layers, key=lambda layer: -layer.latency_s)[:3]
    for layer in slowest:
        if layer.latency_s:
            share = layer.latency_s / cost.latency_s
            lines.append(f"  {layer.name}: {si(layer.latency_s, 's')} ({share:.0%}), {layer.bound}")
    lines += [f"  {text}" for text in fallbacks(cost.layers)]
    lines += [f"  note: {note}" for note in cost.notes]
    return "\n".join(lines)


def fallbacks(layers: Iterable[LayerCost]) -> list[str]:
    """One line per layer that the device runs otherwise than it is stored, at most four."""
    lines = [f"{layer.name}: {layer.fallback}" for layer in layers if layer.fallback]
    return lines if len(lines) <= 4 else [*lines[:3], f"and {len(lines) - 3} more layers fall back"]


def _rich() -> Any:
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError as error:
        raise ImportError(
            'tables need rich: pip install "jaxcompress[experiments]" (print(cost) needs nothing)'
        ) from error
    return rich


_LAYER_COLUMNS = ("layer", "op", "MAC", "bits", "weights", "act.", "latency", "energy")


def _layer_row(layer: LayerCost) -> tuple[str, ...]:
    return (
        layer.name,
        layer.op,
        si(layer.macs, ""),
        f"{layer.weight_bits:.3g}" if layer.weight_bits else "",
        si(layer.weight_bytes, "B"),
        si(layer.activation_bytes, "B"),
        si(layer.latency_s, "s"),
        si(layer.energy_j, "J"),
        layer.bound,
    )


def _of_layers(cost: Cost, layers: Iterable[LayerCost], rich: Any) -> Any:
    title = f"{cost.device.name} ({cost.device.runtime})"
    low, high = cost.interval_s
    within = f"latency {si(low, 's')} to {si(high, 's')}"
    rests_on = [note for note in cost.notes if note.startswith(("runtime ", "outside the fit"))]
    caption = "\n".join([cost.verdict(), within, *rests_on, *fallbacks(cost.layers)])
    # Narrow enough for 80 columns.
    style = {"box": rich.box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    grid = rich.table.Table(title=title, caption=caption, show_footer=True, **style)
    totals = (
        "total",
        "",
        si(cost.macs, ""),
        "",
        si(cost.weight_bytes, "B"),
        si(cost.activation_bytes, "B"),
        si(cost.latency_s, "s"),
        si(cost.energy_j, "J"),
    )
    for name, total in zip(_LAYER_COLUMNS, totals, strict=True):
        left, fold = name in ("layer", "op"), name == "layer"
        grid.add_column(
            name,
            total,
            justify="left" if left else "right",
            no_wrap=not fold,
            overflow="fold",
            min_width=12 if fold else None,
        )
    grid.add_column("bound")
    for layer in layers:
        grid.add_row(*_layer_row(layer))
    return grid


def _times(value: float, first: float) -> str:
    return f"{value / first:.2f}x" if first else ""


def _of_costs(costs: Mapping[str, Cost], rich: Any) -> Any:
    grid = rich.table.Table(title="costs")
    columns = ("", "device", "MAC", "weights", "peak", "latency", "", "energy", "fits", "bound")
    for name in columns:
        grid.add_column(name, justify="left" if name in ("device", "fits", "bound") else "right")
    first = next(iter(costs.values()), None)
    for name, cost in costs.items():
        grid.add_row(
            name,
            f"{cost.device.name} ({cost.device.runtime})",
            si(cost.macs, ""),
            si(cost.weight_bytes, "B"),
            si(cost.peak_bytes, "B"),
            si(cost.latency_s, "s"),
            "" if first is None or cost is first else _times(cost.latency_s, first.latency_s),
            si(cost.energy_j, "J"),
            "yes" if cost.fits() else "no",
            cost.bound,
        )
    return grid


def contractions(cost: Cost) -> list[LayerCost]:
    """The layers with all kernels that hold no contraction added up in one, last but parameters."""
    mains = [layer for layer in cost.layers if layer.op or layer.name in (CALL, OTHER)]
    rest = [layer for layer in cost.layers if layer not in mains]
    if len(rest) < 2:
        return list(cost.layers)
    sums: dict[str, Any] = {
        field: sum(getattr(layer, field) for layer in rest)
        for field in (
            "flops transcendentals weight_bytes weight_read_bytes activation_bytes compute_s "
            "memory_s overhead_s latency_s energy_j"
        ).split()
    }
    return [*mains, LayerCost(f"{len(rest)} other kernels", **sums)]


def table(
    cost_or_costs: Cost | Sequence[Cost] | Mapping[str, Cost],
    console: Any = None,
    *,
    every: bool = False,
) -> None:
    """Prints one cost layer by layer, or several costs (a sequence, or by name) side by side.

    Several costs may be of several devices, or of a network before and after; the columns behind
    the first row say what came of it.

    Args:
      cost_or_costs: what `estimate` gave.
      console: a `rich.console.Console`; None for standard output.
      every: also the kernels without a contraction one by one, not in one row.

    Raises:
      ImportError: rich is not installed.
    """
    rich = _rich()
    console = console or rich.console.Console()
    if isinstance(cost_or_costs, Cost):
        layers = cost_or_costs.layers if every else contractions(cost_or_costs)
        console.print(_of_layers(cost_or_costs, layers, rich))
        return
    if not isinstance(cost_or_costs, Mapping):
        cost_or_costs = {str(i): cost for i, cost in enumerate(cost_or_costs)}
    console.print(_of_costs(cost_or_costs, rich))
