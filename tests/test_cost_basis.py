"""What costs rest on: runtime, version, fit and interval of a small device file, by hand."""

import io

import _cost
import jax.numpy as jnp
import pytest
import rich.console
from _cost import SHAPE, dense

from jaxcompress import cost

FIT = """
version = "1.2"
[runtime.only.fit]
kinds = ["dense"]
types = ["float32"]
networks = ["tiny"]
smallest = { value = 16, unit = "MAC", source = "s", grade = "estimate" }
largest = { value = 64, unit = "MAC", source = "s", grade = "estimate" }
error = { value = 0.6931471805599453, unit = "log ratio", source = "left out", grade = "measured" }
"""


def _estimate(device, inputs):
    w, x = SHAPE((inputs, 4), jnp.float32), SHAPE((1, inputs), jnp.float32)
    return cost.estimate(dense, {"w": w}, x, device=device)


def _fitted(tmp_path, **edit):
    text = FIT
    for old, new in edit.items():
        text = text.replace(old, new)
    head = "[[runtime.only.unpack]]"
    version, fit = text.split("[runtime.only.fit]")
    file = tmp_path / "fitted.toml"
    body = _cost.HAND.replace("OVERHEAD", "0.5").replace(
        'description = "one"', 'description = "one"' + version
    )
    file.write_text(body.replace(head, "[runtime.only.fit]" + fit + head))
    return cost.device(file)


def test_interval_version_and_layers_within_the_fit(tmp_path):
    got = _estimate(_fitted(tmp_path), 8)  # 32 MAC / 8 + 0.5 s, a factor of exp(log 2)
    assert (got.runtime, got.version, got.latency_s) == ("only", "1.2", 4.5)
    assert got.interval_s == pytest.approx((2.25, 9.0))
    assert got.layers[0].in_fit and not got.layers[0].outside
    assert "hand" not in str(got) and "(only 1.2): 4.5 s (2.25 s to 9 s)" in str(got)
    assert any("fitted on tiny" in note and "left out" in note for note in got.notes)
    assert got.to_dict()["version"] == "1.2"


@pytest.mark.parametrize("inputs, macs", [(2, 8), (32, 128)])
def test_sizes_outside_the_fit_are_named(tmp_path, inputs, macs):
    got = _estimate(_fitted(tmp_path), inputs)
    assert not got.layers[0].in_fit
    assert got.layers[0].outside == f"{macs} MAC are outside the fit (16 to 64)"
    assert f"outside the fit: w ({got.layers[0].outside})" in got.notes


def test_without_a_fit_the_interval_is_wide_and_says_that_it_is_assumed(tmp_path):
    got = _estimate(_cost.hand(tmp_path), 8)
    assert got.version == "" and got.interval_s == pytest.approx((1.5, 13.5))
    assert not got.layers[0].in_fit
    assert any("names no fit" in note and "assumed" in note for note in got.notes)


def test_kinds_outside_the_fit_are_named(tmp_path):
    got = _estimate(_fitted(tmp_path, dense="conv"), 8)
    assert got.layers[0].outside == "no dense in the fit"


def test_types_outside_the_fit_are_named(tmp_path):
    got = _estimate(_fitted(tmp_path, float32="int8"), 8)
    assert got.layers[0].outside == "no float32 in the fit"


def test_boards_that_ran_mlperf_tiny_name_it():
    w, x = SHAPE((64, 40), jnp.int8), SHAPE((1, 64), jnp.int8)
    got = cost.estimate(dense, {"w": w}, x, device="stm32l4r5")
    assert got.version == "9.0" and [layer.in_fit for layer in got.layers if layer.op] == [True]
    assert got.interval_s == pytest.approx((got.latency_s / 1.8221, got.latency_s * 1.8221), 1e-4)
    assert "ResNet-8 (IC)" in " ".join(got.notes)


def test_wrong_fits_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="'kinds' must be some of conv"):
        _fitted(tmp_path, dense="fast")
    with pytest.raises(ValueError, match="'smallest' must be at most 'largest'"):
        _fitted(tmp_path, **{"value = 64": "value = 4"})


def test_hexagon_has_a_cost_per_layer():
    w, x = SHAPE((64, 4), jnp.int8), SHAPE((1, 64), jnp.int8)
    got = cost.estimate(dense, {"w": w}, x, device="hexagon")
    (layer,) = [x for x in got.layers if x.op]
    assert layer.overhead_s == 1.1e-6 and layer.bound == "overhead"
    assert "SqueezeNet" in " ".join(got.notes) and layer.outside


@pytest.mark.parametrize("name", cost.devices())
def test_every_device_says_what_its_latency_rests_on(name):
    device = cost.device(name)
    types = {(r.weight, r.activation) for r in device.throughput if r.op in ("", "dense", "conv")}
    weight, activation = sorted(types, key=lambda t: (t[0] != "int8", t[1] != "int8", t))[0]
    numbers = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    w = SHAPE((64, 64), numbers.get(weight, jnp.int8))
    x = SHAPE((1, 64), numbers.get(activation, jnp.int8))
    got = cost.estimate(dense, {"w": w}, x, device=device)
    low, high = got.interval_s
    assert got.runtime == device.runtime and 0 < low < got.latency_s < high
    said = [note for note in got.notes if note.startswith(f"runtime {got.runtime} ")]
    assert len(said) == 1 and (got.version or "of unknown version") in said[0]
    assert ("fitted on" in said[0]) == (device.fit is not None)
    table = io.StringIO()
    cost.table(got, rich.console.Console(file=table, width=200))
    words = "fitted on" if device.fit else "the file names no fit to measured networks"
    assert words in " ".join(table.getvalue().split())


def test_a_calibrated_device_says_so_and_no_more_that_it_is_not(tmp_path):
    before = _estimate(_cost.hand(tmp_path), 8)
    assert any("assumed" in note for note in before.notes)
    calibration = cost.calibrate([(before, 2 * before.latency_s)])
    got = _estimate(calibration.apply(before.device), 8)
    assert got.latency_s == pytest.approx(2 * before.latency_s)
    assert got.interval_s == pytest.approx(calibration.interval_s(before))
    assert any("calibrated by 1 measurements of the device" in note for note in got.notes)
    assert not any("assumed" in note or "rates are peaks" in note for note in got.notes)
