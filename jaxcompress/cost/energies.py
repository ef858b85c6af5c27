"""Energy: what a board draws while it computes; and, apart from it, an ideal chip's operations.

The two are never mixed. A board spends its active power whatever the operation is (MLPerf Tiny:
mean power times latency predicts the measured energy with a median error of 2.5 %); the ideal chip
spends what the adders, multipliers and memories of a 45 or 7 nm process need, nothing for control.
"""

import functools
import importlib.resources
import tomllib
from typing import NamedTuple

from jaxcompress.cost import dtypes
from jaxcompress.cost.device_model import Device, Quantity
from jaxcompress.cost.result import Cost, LayerCost


def active_energy(device: Device, latency_s: float) -> float:
    """Joules that the device draws while it computes: E = P * t."""
    return device.active_power.value * latency_s


def _arithmetic_pj(layer: LayerCost, node: str) -> float:
    energy = 0.0
    if layer.macs:
        energy += layer.macs * mac_pj(layer.weight_dtype, layer.activation_dtype, node=node)
    others = layer.flops - 2 * layer.macs + layer.transcendentals
    return energy + (others * add_pj(layer.activation_dtype, node=node) if others else 0.0)


class IdealEnergy(NamedTuple):
    """Joules of the operations alone, in total and by layer (in the order of `Cost.layers`)."""

    mac_j: float  # and other operations
    weight_j: float  # reads of the weights
    activation_j: float  # reads and writes of the activations
    layers: tuple[float, ...]

    @property
    def total_j(self) -> float:
        """The sum of the three."""
        return self.mac_j + self.weight_j + self.activation_j


NODES = {"45nm": "horowitz_45nm.toml", "7nm": "jouppi_7nm.toml"}


@functools.cache
def node_table(node: str) -> dict[str, dict[str, Quantity]]:
    """The table of a process, "45nm" or "7nm": pJ by number type, pJ per 64 bits by memory.

    Raises:
      ValueError: no such table.
    """
    if node not in NODES:
        raise ValueError(f"unknown node {node!r}; there are tables for {', '.join(NODES)}")
    file = importlib.resources.files("jaxcompress.cost") / "tables" / NODES[node]
    groups = tomllib.loads(file.read_text("utf-8"))
    return {
        group: {key: Quantity(**number) for key, number in numbers.items()}
        for group, numbers in groups.items()
        if isinstance(numbers, dict)
    }


def _float_type(table: dict[str, dict[str, Quantity]], *names: str) -> str:
    # The cheapest float type that holds them all.
    fitting = {
        name: sum(quantity.value for quantity in numbers.values())
        for name, numbers in table.items()
        if name.startswith(("float", "bfloat")) and all(dtypes.holds(name, n) for n in names)
    }
    if not fitting:
        raise ValueError(f"the table has no float type that holds {' and '.join(names)}")
    return min(fitting, key=lambda name: fitting[name])


def mac_pj(weight: str, activation: str, *, node: str = "45nm") -> float:
    """Picojoules of a multiply-accumulate of two number types.

    Integers of more than 2 bits: at 45 nm k2 b_w b_a + k1 (b_w + b_a) / 2 for the product, at
    7 nm k (b_w b_a)^(e/2), and a 32-bit addition for the sum. Weights of 1 or 2 bits (binary,
    ternary) need no product: an addition alone. Else the cheapest float type of the table that
    holds both.

    >>> round(mac_pj("int8", "int8"), 3), round(mac_pj("float32", "int8"), 3)
    (0.3, 4.6)
    >>> mac_pj("int2", "int8") == node_table("45nm")["integer"]["add"].value
    True
    """
    table = node_table(node)
    w, a = dtypes.kind(weight), dtypes.kind(activation)
    if w.family == a.family == "int":
        k = {key: quantity.value for key, quantity in table["integer"].items()}
        if w.digits <= 2:
            return k["add"]
        if "exponent" in k:
            return k["product"] * (w.digits * a.digits) ** (k["exponent"] / 2) + k["add"]
        product = k["quadratic"] * w.digits * a.digits + k["linear"] * (w.digits + a.digits) / 2
        return product + k["add"]
    return sum(q.value for q in table[_float_type(table, weight, activation)].values())


def add_pj(dtype: str, *, node: str = "45nm") -> float:
    """Picojoules of an addition; an integer's is a 32-bit one, scaled with its bits."""
    table, kind = node_table(node), dtypes.kind(dtype)
    if kind.family == "int":
        return table["integer"]["add"].value * min(kind.digits, 32) / 32
    return table[_float_type(table, dtype)]["add"].value


def ideal_energy(
    cost: Cost,
    *,
    node: str = "45nm",
    weight_memory: str = "dram",
    activation_memory: str = "sram_1mb",
) -> IdealEnergy:
    """Energy of a chip without overhead that runs the layers of `cost` at their own bit widths.

    All multiply-accumulates count, zeros too, and every other operation as an addition; weights
    are read as they are stored. Use it to
    compare bit widths, not to predict a device: the table is good to a factor of 2 to 4.

    Args:
      cost: the result of `estimate`; its device's rates, power and latency play no part.
      node: "45nm" (Horowitz) or "7nm" (Jouppi et al.).
      weight_memory, activation_memory: sram_8kb, sram_32kb, sram_1mb, dram; at 7 nm also hbm.

    Raises:
      ValueError: an unknown node or memory, or number types that the table does not cover.
    """
    memories = node_table(node)["memory"]
    for name in (weight_memory, activation_memory):
        if name not in memories:
            raise ValueError(f"unknown memory {name!r}; the table has {', '.join(memories)}")
    per_byte = {name: quantity.value / 8 for name, quantity in memories.items()}
    rows = []
    for layer in cost.layers:
        mac = _arithmetic_pj(layer, node)
        weight = layer.weight_read_bytes * per_byte[weight_memory]
        rows.append((mac, weight, layer.activation_bytes * per_byte[activation_memory]))
    totals = [1e-12 * sum(row[i] for row in rows) for i in range(3)]
    return IdealEnergy(*totals, layers=tuple(1e-12 * sum(row) for row in rows))
