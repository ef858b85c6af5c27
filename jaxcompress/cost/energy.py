"""Energy: what a board draws while it computes; and, apart from it, an ideal chip's operations.

The two are never mixed. A board spends its active power whatever the operation is (MLPerf Tiny:
mean power times latency predicts the measured energy with a median error of 2.5 %); the ideal chip
spends what the adders, multipliers and memories of a 45 nm process need, and nothing for control.
"""

import functools
import importlib.resources
import tomllib
from typing import NamedTuple

from jaxcompress.cost import dtypes
from jaxcompress.cost.device import Device, Quantity
from jaxcompress.cost.result import Cost


def active_energy(device: Device, latency_s: float) -> float:
    """Joules that the device draws while it computes: E = P * t."""
    return device.active_power.value * latency_s


class IdealEnergy(NamedTuple):
    """Joules of the operations alone, in total and by layer (in the order of `Cost.layers`)."""

    mac_j: float
    weight_j: float  # reads of the weights
    activation_j: float  # reads and writes of the activations
    layers: tuple[float, ...]

    @property
    def total_j(self) -> float:
        """The sum of the three."""
        return self.mac_j + self.weight_j + self.activation_j


@functools.cache
def table_45nm() -> dict[str, dict[str, Quantity]]:
    """Horowitz's table: pJ of `mul` and `add` by number type, pJ per 64 bits by memory."""
    file = importlib.resources.files("jaxcompress.cost") / "tables" / "horowitz_45nm.toml"
    groups = tomllib.loads(file.read_text("utf-8"))
    return {
        group: {key: Quantity(**number) for key, number in numbers.items()}
        for group, numbers in groups.items()
        if isinstance(numbers, dict)
    }


def mac_pj(weight: str, activation: str) -> float:
    """Picojoules of a multiply-accumulate of two number types, 45 nm.

    Integers: k2 b_w b_a + k1 (b_w + b_a) / 2 for the product, a 32-bit addition for the sum.
    Else the cheapest float type of the table that holds both.

    >>> round(mac_pj("int8", "int8"), 3), round(mac_pj("float32", "int8"), 3)
    (0.3, 4.6)
    """
    table = table_45nm()
    w, a = dtypes.kind(weight), dtypes.kind(activation)
    if w.family == a.family == "int":
        k = {key: quantity.value for key, quantity in table["integer"].items()}
        product = k["quadratic"] * w.digits * a.digits + k["linear"] * (w.digits + a.digits) / 2
        return product + k["add"]
    sums = [
        sum(quantity.value for quantity in numbers.values())
        for name, numbers in table.items()
        if name.startswith(("float", "bfloat"))
        and dtypes.holds(name, weight)
        and dtypes.holds(name, activation)
    ]
    if not sums:
        raise ValueError(f"the 45 nm table has no float type that holds {weight} and {activation}")
    return min(sums)


def ideal_energy(
    cost: Cost, *, weight_memory: str = "dram", activation_memory: str = "sram_1mb"
) -> IdealEnergy:
    """Energy of a chip without overhead that runs the layers of `cost` at their own bit widths.

    All multiply-accumulates count, zeros too; weights are read as they are stored. Use it to
    compare bit widths, not to predict a device: the table is good to a factor of 2 to 4.

    Args:
      cost: the result of `estimate`; its device's rates, power and latency play no part.
      weight_memory, activation_memory: sram_8kb, sram_32kb, sram_1mb or dram.

    Raises:
      ValueError: an unknown memory, or number types that the table does not cover.
    """
    memories = table_45nm()["memory"]
    for name in (weight_memory, activation_memory):
        if name not in memories:
            raise ValueError(f"unknown memory {name!r}; the table has {', '.join(memories)}")
    per_byte = {name: quantity.value / 8 for name, quantity in memories.items()}
    rows = []
    for layer in cost.layers:
        mac = layer.macs * mac_pj(layer.weight_dtype, layer.activation_dtype) if layer.macs else 0.0
        weight = layer.weight_read_bytes * per_byte[weight_memory]
        rows.append((mac, weight, layer.activation_bytes * per_byte[activation_memory]))
    totals = [1e-12 * sum(row[i] for row in rows) for i in range(3)]
    return IdealEnergy(*totals, layers=tuple(1e-12 * sum(row) for row in rows))
