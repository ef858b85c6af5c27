"""Reads a device file: the form it must have, and errors that say what is missing."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jaxcompress.core.paths import near_misses
from jaxcompress.cost import dtypes
from jaxcompress.cost.device_model import (
    GRADES,
    OPS,
    Device,
    Measurements,
    Memory,
    Quantity,
    Rate,
    Vector,
)
from jaxcompress.cost.timing.fused_kernels import FUSIONS


class _Table:
    """One table of a file, with the name that messages give it."""

    def __init__(self, values: Any, file: str, name: str):
        self.file, self.name = file, name
        if not isinstance(values, Mapping):
            self.fail(f"must be a table, got {values!r}")
        self.values = values

    def fail(self, message: str) -> NoReturn:
        where = f" [{self.name}]" if self.name else ""
        raise ValueError(f"device file {self.file!r}{where}: {message}")

    def keys(self, required: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Checks the names of the keys."""
        allowed = [*required, *optional]
        for key in self.values:
            if key not in allowed:
                nearest = near_misses(str(key), allowed, most=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                self.fail(f"unknown key {key!r}{hint} Known: {', '.join(allowed)}")
        for key in required:
            if key not in self.values:
                self.fail(f"{key!r} is missing; it needs {', '.join(required)}")

    def table(self, key: str) -> "_Table":
        """A table inside this one."""
        return _Table(self.values[key], self.file, f"{self.name}.{key}" if self.name else key)

    def rows(self, key: str) -> list["_Table"]:
        """The tables of an array of tables, none if it is absent."""
        rows = self.values.get(key, [])
        if not isinstance(rows, list):
            self.fail(f"{key!r} must be an array of tables, [[{self.name}.{key}]]")
        return [_Table(row, self.file, f"{self.name}.{key} {i}") for i, row in enumerate(rows)]

    def text(self, key: str, choices: Iterable[str] = ()) -> str:
        """A string, one of `choices` where there are any."""
        value, choices = self.values[key], tuple(choices)
        if not isinstance(value, str) or not value.strip():
            self.fail(f"{key!r} must be a non-empty string, got {value!r}")
        if choices and value not in choices:
            self.fail(f"{key!r} must be one of {', '.join(choices)}, got {value!r}")
        return value

    def number_type(self, key: str) -> str:
        """The name of a number type."""
        name = self.text(key)
        try:
            dtypes.kind(name)
        except ValueError as error:
            self.fail(f"{key!r}: {error}")
        return name

    def quantity(self, key: str, unit: str | tuple[str, ...], *, zero: bool = False) -> Quantity:
        """The table `key` as a number with its source; `zero` says whether 0 is allowed."""
        units = (unit,) if isinstance(unit, str) else unit
        if key not in self.values:
            self.fail(f"{key!r} is missing; it needs value, unit = {units[0]!r}, source, grade")
        table = self.table(key)
        table.keys(("value", "unit", "source", "grade"))
        return table.number(units, zero=zero)

    def number(self, units: tuple[str, ...], *, zero: bool = False) -> Quantity:
        """The keys value, unit, source and grade of this table."""
        value = self.values["value"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"'value' must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            self.fail(f"'value' must be {'at least' if zero else 'above'} 0, got {value!r}")
        unit = self.text("unit", units)
        return Quantity(float(value), unit, self.text("source"), self.text("grade", GRADES))


_ALIGNMENTS = ("inputs", "outputs", "vector", "packet")
_GATHER = ("element/s", "cycle/element")
_RATE_UNITS = {"unfold": _GATHER, "ragged": _GATHER, "overhead": ("s",)}
_QUANTITY = ("value", "unit", "source", "grade")


def _rates(runtime: _Table) -> tuple[Rate, ...]:
    rates: dict[tuple[str, ...], Rate] = {}
    for row in runtime.rows("throughput"):
        row.keys(("weight", "activation", "op", *_QUANTITY), ("pattern", *_RATE_UNITS))
        pattern = row.text("pattern") if "pattern" in row.values else "dense"
        if not re.fullmatch(r"dense|unstructured|[1-9]\d*:[1-9]\d*", pattern):
            row.fail(f"'pattern' must be dense, unstructured or N:M such as 2:4, got {pattern!r}")
        ops = row.values["op"]
        ops = OPS if ops == "any" else [ops] if isinstance(ops, str) else ops
        if not isinstance(ops, list | tuple) or not ops or not set(ops) <= set(OPS):
            row.fail(f"'op' must be any, or some of {', '.join(OPS)}, got {row.values['op']!r}")
        quantity = row.number(("MAC/s", "cycle/MAC"))
        more = {k: row.quantity(k, u) for k, u in _RATE_UNITS.items() if k in row.values}
        for op in ops:
            weight, activation = row.number_type("weight"), row.number_type("activation")
            rate = Rate(weight, activation, op, pattern, quantity, **more)
            if rate.key in rates:
                row.fail(f"a second rate for {' '.join(rate.key)}; there must be one")
            rates[rate.key] = rate
    if not rates:
        runtime.fail(
            f"'throughput' is missing; it needs at least one [[{runtime.name}.throughput]]"
        )
    return tuple(rates.values())


def _unpack(runtime: _Table) -> dict[str, Quantity]:
    entries = {}
    for row in runtime.rows("unpack"):
        row.keys(("weight", *_QUANTITY))
        entries[row.number_type("weight")] = row.number(("cycle/weight",), zero=True)
    return entries


def _vectors(runtime: _Table) -> tuple[Vector, ...]:
    rows = runtime.rows("elementwise")
    for row in rows:
        row.keys(("type", *_QUANTITY))
    return tuple(Vector(r.number_type("type"), r.number(("op/s", "cycle/op"))) for r in rows)


def _quantities(runtime: _Table, key: str, names: Iterable[str], unit: str) -> dict[str, Quantity]:
    if key not in runtime.values:
        return {}
    table = runtime.table(key)
    table.keys((), names)
    return {name: table.quantity(name, unit) for name in table.values}


def _places(runtime: _Table, key: str, memories: Mapping[str, Memory]) -> tuple[str, ...]:
    given = runtime.values[key]
    names: tuple[Any, ...] = tuple(given) if isinstance(given, list) and given else (given,)
    for name in names:
        if name not in memories:
            runtime.fail(f"{key!r} must be one or several of {', '.join(memories)}, got {given!r}")
    rates = [memories[name].bandwidth.value for name in names]
    if rates != sorted(rates, reverse=True):
        runtime.fail(f"{key!r} must name the fastest memory first, got {given!r}")
    return names


def _fit(runtime: _Table) -> Measurements:
    table = runtime.table("fit")
    table.keys(("kinds", "types", "smallest", "largest", "networks"), ("error",))
    for key in ("kinds", "types", "networks"):
        found = table.values[key]
        if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
            table.fail(f"{key!r} must be a list of names, got {found!r}")
    kinds = tuple(table.values["kinds"])
    if not set(kinds) <= set(OPS):
        table.fail(f"'kinds' must be some of {', '.join(OPS)}, got {list(kinds)!r}")
    low, high = (table.quantity(key, "MAC").value for key in ("smallest", "largest"))
    if low > high:
        table.fail(f"'smallest' must be at most 'largest', got {low:g} and {high:g}")
    error = table.quantity("error", "log ratio") if "error" in table.values else None
    networks, types = (tuple(table.values[key]) for key in ("networks", "types"))
    return Measurements(kinds, (low, high), networks, types, error)


def _memories(top: _Table) -> dict[str, Memory]:
    memories, table = {}, top.table("memory")
    for name in table.values:
        memory = table.table(name)
        memory.keys(("capacity", "bandwidth"))
        memories[name] = Memory(
            name, memory.quantity("capacity", "B"), memory.quantity("bandwidth", "B/s")
        )
    if not memories:
        top.fail("'memory' has no entry; it needs at least one, such as [memory.dram]")
    return memories


def parse(values: Mapping[str, Any], name: str, *, runtime: str, file: str) -> Device:
    """The device of a file's tables; all runtimes are checked, `runtime` ("": the first) is taken.

    Raises:
      ValueError: the tables are not of the form, or there is no such runtime.
    """
    top = _Table(values, file, "")
    top.keys(("description", "memory", "runtime"), ("clock",))
    clock = top.quantity("clock", "Hz") if "clock" in values else None
    memories = _memories(top)
    found = {}
    for key in top.table("runtime").values:
        table = top.table("runtime").table(key)
        required = ("description", "rates", "weights", "activations", "active_power", "overhead")
        optional = ("unpack", "elementwise", "fusion", "call", "voltage", "reserved", "alignment")
        optional += ("version", "fit")
        table.keys((*required, "throughput"), optional)
        found[key] = Device(
            name=name,
            runtime=key,
            description=f"{top.text('description')}; {table.text('description')}",
            rates=table.text("rates", ("peak", "effective")),
            clock=clock,
            memories=memories,
            weight_memories=_places(table, "weights", memories),
            activation_memories=_places(table, "activations", memories),
            active_power=table.quantity("active_power", "W", zero=True),
            overhead=table.quantity("overhead", "s", zero=True),
            throughput=_rates(table),
            unpack=_unpack(table),
            elementwise=_vectors(table),
            fusion=table.text("fusion", FUSIONS) if "fusion" in table.values else "elementwise",
            call=table.quantity("call", "s") if "call" in table.values else None,
            voltage=table.quantity("voltage", "V") if "voltage" in table.values else None,
            reserved=_quantities(table, "reserved", memories, "B"),
            alignment=_quantities(table, "alignment", _ALIGNMENTS, "channel"),
            version=table.text("version") if "version" in table.values else "",
            fit=_fit(table) if "fit" in table.values else None,
        )
    in_cycles = [q.unit for d in found.values() for _, q in d.quantities() if "cycle" in q.unit]
    if in_cycles and clock is None:
        top.quantity("clock", "Hz")  # says what is missing
    if not found:
        top.fail("'runtime' has no entry; it needs at least one, such as [runtime.tflm]")
    if runtime and runtime not in found:
        raise ValueError(f"device {name!r} has no runtime {runtime!r}; it has {', '.join(found)}")
    return found[runtime or next(iter(found))]
