"""Device files: every number has a source, wrong files say what is wrong, number types nest."""

import importlib.resources
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import cost
from jaxcompress.cost import dtypes
from jaxcompress.cost.device_model import GRADES
from jaxcompress.cost.energies import mac_pj, node_table

pytestmark = pytest.mark.broad

TOY = """
description = "round numbers"
[clock]
value = 1000
unit = "Hz"
source = "test"
grade = "estimate"
[memory.ram]
capacity = { value = 100, unit = "B", source = "test", grade = "estimate" }
bandwidth = { value = 10, unit = "B/s", source = "test", grade = "estimate" }
[runtime.first]
description = "one"
rates = "effective"
weights = "ram"
activations = "ram"
active_power = { value = 2, unit = "W", source = "test", grade = "estimate" }
overhead = { value = 0, unit = "s", source = "test", grade = "estimate" }
[[runtime.first.throughput]]
weight = "int8"
activation = "int8"
op = ["conv", "dense"]
value = 4
unit = "cycle/MAC"
source = "test"
grade = "estimate"
"""


def _files():
    folder = importlib.resources.files("jaxcompress.cost")
    # The table of errors is the output of one experiment, not numbers with a source each.
    files = [f for sub in ("devices", "tables") for f in (folder / sub).iterdir()]
    return [f for f in files if f.name != "calibration.toml"]


def _numbers(node, path=()):
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, int | float):
                yield (*path, key), node
            yield from _numbers(value, (*path, key))
    if isinstance(node, list):
        for i, value in enumerate(node):
            assert not isinstance(value, int | float), (path, "a bare number in a list")
            yield from _numbers(value, (*path, str(i)))


@pytest.mark.parametrize("file", _files(), ids=lambda f: f.name)
def test_every_number_has_unit_source_and_grade(file):
    numbers = list(_numbers(tomllib.loads(file.read_text("utf-8"))))
    assert len(numbers) >= 7
    for path, table in numbers:
        assert path[-1] == "value", path
        assert table["grade"] in GRADES, path
        assert table["unit"] and len(table["source"].split()) >= 4, path


def test_shipped_devices_load_under_the_names_they_are_listed_by():
    assert {"stm32l4r5", "stm32l4r5:tflm", "raspberry-pi-5", "h100"} <= set(cost.devices())
    for name in cost.devices():
        device = cost.device(name)
        assert name in (device.name, f"{device.name}:{device.runtime}")
        assert all(quantity.grade in GRADES for _, quantity in device.quantities())
        assert cost.device(device) is device


def test_unknown_devices_name_what_there_is():
    with pytest.raises(ValueError, match="unknown device 'stm32l4r6'; nearest: 'stm32l4r5'"):
        cost.device("stm32l4r6")
    with pytest.raises(ValueError, match="available: apple-ane, .*or the path of a .toml file"):
        cost.device("?")
    with pytest.raises(ValueError, match="has no runtime 'tvm'; it has x-cube-ai, tflm"):
        cost.device("stm32l4r5:tvm")
    with pytest.raises(ValueError, match="'/no/such.toml' does not exist"):
        cost.device("/no/such.toml")
    with pytest.raises(TypeError, match="device: must be a name, .* or a Device, got NoneType"):
        cost.device(None)  # type: ignore[arg-type]


def test_a_file_of_the_user(tmp_path):
    file = tmp_path / "toy.toml"
    file.write_text(TOY)
    toy = cost.device(file)
    assert (toy.name, toy.runtime, toy.memories["ram"].capacity.value) == ("toy", "first", 100)
    assert [rate.op for rate in toy.throughput] == ["conv", "dense"]
    assert toy.macs_per_s(toy.throughput[0]) == 1000 / 4
    assert cost.device(f"{file}:first") == toy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('unit = "B/s", ', "", r"\[memory.ram.bandwidth\]: 'unit' is missing; it needs value"),
        ('unit = "B/s"', 'unit = "GB/s"', r"'unit' must be one of B/s, got 'GB/s'"),
        ("value = 10,", "value = -1,", r"\[memory.ram.bandwidth\]: 'value' must be above 0"),
        ("value = 10,", "value = 0,", r"\[memory.ram.bandwidth\]: 'value' must be above 0"),
        ("value = 10,", 'value = "10",', r"'value' must be a number, got '10'"),
        ('Hz"\nsource = "test"\ngrade = "estimate"', 'Hz"\nsource = "test"\ngrade = "rumour"',
         r"\[clock\]: 'grade' must be one of datasheet, measured, derived, estimate"),
        ("overhead = {", "overheads = {", r"\[runtime.first\]: unknown key 'overheads'; did you"),
        ('rates = "effective"\n', "", r"\[runtime.first\]: 'rates' is missing"),
        ('weights = "ram"', 'weights = "rom"',
         r"'weights' must be one or several of ram, got 'rom'"),
        ('weight = "int8"', 'weight = "q8"', r"throughput 0\]: 'weight': unknown number type 'q8'"),
        ('"conv", ', '"convolution", ', r"'op' must be any, or some of conv, pointwise, depthwise"),
        ('op = ["conv"', 'pattern = "half"\nop = ["conv"', r"must be dense, unstructured or N:M"),
        ('["conv", "dense"]', '["conv", "conv"]', r"a second rate for int8 int8 dense conv"),
        ('[clock]\nvalue = 1000\nunit = "Hz"\nsource = "test"\ngrade = "estimate"', "",
         r"'clock' is missing; it needs value, unit = 'Hz', source, grade"),
        ("[clock]", "[clock", "is not TOML"),
    ],
)  # fmt: skip
def test_wrong_files_say_what_is_wrong(tmp_path, old, new, message):
    assert old in TOY
    file = tmp_path / "toy.toml"
    file.write_text(TOY.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        cost.device(file)
    assert "toy.toml" in str(error.value)


def _numbers_of(name, *, in_float):
    # All numbers of a small type. Codes of b bits less a zero point reach +-(2**b - 1).
    if name.startswith("int"):
        bits = int(name[3:])
        low, high = (1 - 2**bits, 2**bits) if in_float else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        return set(range(low, high))
    dtype = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}.get(name, name)
    bits = jnp.finfo(dtype).bits
    codes = np.arange(2**bits, dtype=np.dtype(f"uint{bits}")).view(jnp.dtype(dtype))
    with np.errstate(invalid="ignore"):
        values = codes.astype(np.float64)
    return set(values[np.isfinite(values)].tolist())


@pytest.mark.parametrize("wide", ["int8", "float8_e4m3", "float8_e5m2", "float16", "bfloat16"])
@pytest.mark.parametrize("narrow", ["int2", "int4", "int8", "float8_e4m3", "float8_e5m2"])
def test_holds_agrees_with_the_sets_of_numbers(wide, narrow):
    in_float = not wide.startswith("int")
    numbers = _numbers_of(narrow, in_float=in_float)
    assert dtypes.holds(wide, narrow) == (numbers <= _numbers_of(wide, in_float=in_float))


def test_tables_are_held_by_floats_only():
    assert dtypes.holds("bfloat16", "table4") and not dtypes.holds("int8", "table4")
    assert not dtypes.holds("float8_e4m3", "table4")
    with pytest.raises(ValueError, match="unknown number type 'int'"):
        dtypes.kind("int")
    with pytest.raises(ValueError, match="arrays of void32 have no cost: numbers and keys do"):
        dtypes.of_array(np.dtype("V4"))


def test_the_45nm_table_gives_back_the_published_figures():
    # Horowitz: int8 multiplication 0.2 pJ, int32 multiplication 3.1 pJ, int32 addition 0.1 pJ
    assert mac_pj("int8", "int8") == pytest.approx(0.2 + 0.1, rel=1e-3)
    assert mac_pj("int32", "int32") == pytest.approx(3.1 + 0.1, rel=1e-3)
    assert mac_pj("float32", "float32") == pytest.approx(3.7 + 0.9)
    assert mac_pj("table4", "bfloat16") == mac_pj("bfloat16", "bfloat16")
    assert node_table("45nm")["memory"]["dram"].value == 1300


def test_the_7nm_table_is_cheaper_and_scales_with_bits():
    # Jouppi et al.: int8 multiplication 0.07 pJ, int32 1.48 pJ, int32 addition 0.03 pJ
    assert mac_pj("int8", "int8", node="7nm") == pytest.approx(0.07 + 0.03, rel=1e-3)
    assert mac_pj("int32", "int32", node="7nm") == pytest.approx(1.48 + 0.03, rel=1e-3)
    for node in ("45nm", "7nm"):
        energies = [mac_pj(f"int{bits}", "int8", node=node) for bits in (1, 2, 4, 8, 16, 32)]
        assert energies == sorted(energies)
        # Ternary and binary weights need no product.
        assert energies[0] == energies[1] == node_table(node)["integer"]["add"].value
    with pytest.raises(ValueError, match="unknown node '3nm'; there are tables for 45nm, 7nm"):
        node_table("3nm")


def test_every_shipped_number_has_its_source():
    names = {name.partition(":")[0] for name in cost.devices()}
    assert len(names) >= 14
    for name in cost.devices():
        device = cost.device(name)
        assert dict(device.quantities())["active_power"].unit == "W"
        for key, quantity in device.quantities():
            assert quantity.grade in GRADES and len(quantity.source) > 10, (name, key)


def test_the_template_is_a_device(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(cost.template())
    device = cost.device(file)
    assert device.alignment["inputs"].value == 4 and device.available("sram") == 245_760
    file.write_text(cost.template().replace('"activation"\n', '"all"\n', 1))
    with pytest.raises(ValueError, match="'fusion' must be one of none, loops, activation"):
        cost.device(file)
    slower_first = cost.template().replace('weights = "flash"', 'weights = ["flash", "sram"]')
    file.write_text(slower_first)
    with pytest.raises(ValueError, match="'weights' must name the fastest memory first"):
        cost.device(file)
