"""Convolutions in LiteRT files beside their definition in NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from experiments.situations import converters

pytest.importorskip("litert_converter")
pytest.importorskip("ai_edge_litert")

KINDS = [name for name in converters.EXPORTERS if name.startswith("LiteRT")]


@pytest.mark.parametrize("exporter", KINDS)
@pytest.mark.parametrize("situation", list(converters.SITUATIONS)[:6])
def test_a_file_has_the_numbers_of_the_definition(exporter, situation):
    c = converters.SITUATIONS[situation]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 4, 5, 4)).astype(np.float32)
    w = rng.normal(size=(3, 3, 4 // c.groups, 4)).astype(np.float32)
    found = converters.cell(converters.EXPORTERS[exporter], c, x, w)
    assert found.holds, found.text


def test_holes_in_the_input_stay_in_integers(tmp_path):
    c = converters.SITUATIONS["Flax, stride 2, SAME"]
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 4, 5, 3)) + 1, jnp.float32)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)}
    fn = lambda p, x: converters.apply(c, p, x)
    program = jc.quantize.integer_only(fn, params, [x])
    report = jc.export.litert(program, path=tmp_path / "a.tflite", interface="int8")
    assert report.integer and report.outputs[0].shape == (1, 8, 10, 4)
    recipe = jc.quantize.weights(jc.formats.integer(8), axis=-1)
    packed = recipe.pack(params, recipe.init(params))
    report = jc.export.litert(fn, packed, x, path=tmp_path / "a.tflite", activations="dynamic")
    assert ("CONV_2D", "int8") in {(o.name, o.inputs[1]) for o in report.operators}


@pytest.mark.broad
def test_random_convolutions_are_right_or_refused():
    tally = converters.sweep(12, seed=3)
    assert not [key for key in tally if key[1] == "wrong"]
    assert tally["LiteRT float", "right"] > 8
