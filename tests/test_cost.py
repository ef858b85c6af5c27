"""Cost of networks: closed forms by hand, published counts, bytes and bits, reports."""

import functools
import io
import json
import sys
from typing import Any

import _cost
import jax
import jax.numpy as jnp
import pytest
from _cost import SHAPE, dense, one, quantized
from jax import lax

from jaxcompress import cost
from jaxcompress.core.packed import packed_bytes
from jaxcompress.cost.estimation import counts
from jaxcompress.formats import granularity, integer, predicted_bytes


@pytest.fixture
def hand(tmp_path):
    return functools.partial(_cost.hand, tmp_path)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"][None]


def mlp_params(kernel=jnp.float32):
    return {
        "a": {"kernel": SHAPE((8, 4), kernel), "bias": SHAPE((4,), jnp.float32)},
        "b": {"kernel": SHAPE((4, 2), kernel), "bias": SHAPE((2,), jnp.float32)},
    }


def test_mlp_by_hand(hand):
    got = cost.estimate(mlp, mlp_params(), SHAPE((1, 8), jnp.float32), device=hand())
    a, b, other = got.layers
    assert (a.name, b.name, other.name) == ("a/kernel", "b/kernel", "other parameters")
    assert (a.macs, b.macs, got.macs) == (32, 8, 40)
    assert got.flops == 2 * 40 + (4 + 4) + 2  # bias and relu, bias
    assert (a.weight_bytes, b.weight_bytes, other.weight_bytes) == (128, 32, 24)
    assert (a.activation_bytes, b.activation_bytes, got.peak_bytes) == (48, 24, 48)
    # a: 32 MAC / 8, 128 B / 64, 48 B / 16; b: 8 MAC / 8, 32 B / 64, 24 B / 16; each + 0.5 s
    assert (a.compute_s, a.memory_s, a.latency_s, a.bound) == (4.0, 3.0, 4.5, "compute")
    assert (b.compute_s, b.memory_s, b.latency_s, b.bound) == (1.0, 1.5, 2.0, "memory")
    assert (got.latency_s, got.energy_j) == (6.5, 13.0)
    assert str(got.fits()) == (
        "does not fit: flash 184 of 200 B (92.0%), sram 48 of 40 B (120.0%); fullest: sram"
    )
    assert not got.fits()


def test_batch_costs_as_a_batch_and_weights_count_once(hand):
    got = cost.estimate(mlp, mlp_params(), SHAPE((3, 8), jnp.float32), device=hand())
    assert (got.macs, got.weight_bytes, got.activation_bytes) == (120, 184, 3 * 72)
    assert "for inputs of shape (3, 8) as given, not per example" in got.notes


def test_bound_overhead(hand):
    layer = one(hand("9"), SHAPE((8, 4), jnp.float32))
    assert (layer.bound, layer.latency_s, layer.overhead_s) == ("overhead", 13.0, 9.0)


def test_one_memory_is_shared_by_weights_and_activations(hand):
    device = hand(old='activations = "sram"', new='activations = "flash"')
    layer = one(device, SHAPE((8, 4), jnp.float32))
    assert layer.memory_s == (128 + 48) / 64


def resnet20(params, x):
    def conv(x, w, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=numbers)

    x = jax.nn.relu(conv(x, params["stem"]))
    for name, block in params["blocks"].items():
        stride = 2 if block["a"].shape[2] != block["a"].shape[3] else 1
        y = conv(jax.nn.relu(conv(x, block["a"], stride)), block["b"])
        extra = y.shape[-1] - x.shape[-1]
        x = jax.nn.relu(y + jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(0, extra)]))
        del name
    return jnp.mean(x, axis=(1, 2)) @ params["head"]


def resnet20_params():
    blocks, before = {}, 16
    for stage, width in enumerate((16, 32, 64)):
        for i in range(3):
            a, b = (3, 3, before, width), (3, 3, width, width)
            blocks[f"s{stage}b{i}"] = {"a": SHAPE(a, jnp.float32), "b": SHAPE(b, jnp.float32)}
            before = width
    stem, head = SHAPE((3, 3, 3, 16), jnp.float32), SHAPE((64, 10), jnp.float32)
    return {"stem": stem, "blocks": blocks, "head": head}


def test_resnet20_has_the_published_macs_and_totals_are_sums():
    params, x = resnet20_params(), SHAPE((1, 32, 32, 3), jnp.float32)
    got = cost.estimate(resnet20, params, x, device="stm32l4r5", fusion="elementwise")
    assert got.macs == 40_551_040  # published: 40.55 M
    assert got.weight_bytes == packed_bytes(params) and len(got.layers) == 21
    for field in ("macs", "flops", "weight_bytes", "activation_bytes", "latency_s", "energy_j"):
        assert getattr(got, field) == sum(getattr(layer, field) for layer in got.layers)
    assert got.peak_bytes == max(layer.live_bytes for layer in got.layers) == 2 * 4 * 32 * 32 * 16
    assert got.traffic_bytes == {"flash": got.weight_bytes, "sram": got.activation_bytes}
    assert got.fits()
    assert {layer.op for layer in got.layers} == {"conv", "dense", ""}  # "": the mean


def gpt2(params, tokens):
    def block(x, layer):
        q, k, v = jnp.split(x @ layer["qkv"], 3, axis=-1)
        heads = [t.reshape(*t.shape[:-1], 12, 64) for t in (q, k, v)]
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", *heads[:2]))
        x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, heads[2]).reshape(x.shape) @ layer["out"]
        return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"], None

    x = params["wte"][tokens] + params["wpe"][None, : tokens.shape[1]]
    x, _ = lax.scan(block, x, params["layers"])
    return x @ params["wte"].T


def test_gpt2_from_shapes_alone_counts_loops_and_tied_weights():
    sizes = {"qkv": (768, 2304), "out": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    params = {
        "layers": {name: SHAPE((12, *shape), jnp.bfloat16) for name, shape in sizes.items()},
        "wte": SHAPE((50257, 768), jnp.bfloat16),
        "wpe": SHAPE((1024, 768), jnp.bfloat16),
    }
    got = cost.estimate(gpt2, params, SHAPE((1, 1024), jnp.int32), device="h100")
    assert got.macs == pytest.approx(145.824e9, rel=1e-5)  # published count, S = 1024
    layers = {layer.name: layer for layer in got.layers}
    # A stacked weight is read once in all, whatever the number of passes; wte counts at the head.
    up = layers["layers/up"]
    assert up.weight_read_bytes == up.weight_bytes == 12 * 768 * 3072 * 2
    assert layers["wte"].weight_bytes == 50257 * 768 * 2
    assert layers["other parameters"].weight_bytes == 1024 * 768 * 2
    assert [layer.op for layer in got.layers].count("matmul") == 2


def test_a_weight_reused_by_a_loop_is_stored_once_and_read_in_every_pass(hand):
    def loop(params, x):
        return lax.scan(lambda x, _: (x @ params["w"], None), x, None, length=5)[0]

    w, x = SHAPE((4, 4), jnp.float32), SHAPE((1, 4), jnp.float32)
    got = cost.estimate(loop, {"w": w}, x, device=hand())
    assert (got.macs, got.weight_bytes, got.layers[0].weight_read_bytes) == (80, 64, 320)
    assert (got.activation_bytes, got.peak_bytes) == (5 * 32, 32)
    assert got.latency_s == 80 / 8 + 5 * 0.5


def test_shared_weights_count_at_the_first_site(hand):
    def twice(params, x):
        return (x @ params["w"]) @ params["w"]

    w, x = SHAPE((4, 4), jnp.float32), SHAPE((1, 4), jnp.float32)
    got = cost.estimate(twice, {"w": w}, x, device=hand())
    assert [layer.weight_bytes for layer in got.layers] == [64, 0]
    assert any("bytes counted at the first: w" in note for note in got.notes)


def test_packed_bits_and_shapes_of_packed_trees(hand):
    params = {
        "a": {"kernel": quantized((8, 4), 3), "bias": jnp.zeros(4)},
        "b": {"kernel": quantized((4, 2), 8, keep=jnp.eye(4, 2) > 0), "bias": jnp.zeros(2)},
    }
    x, device = SHAPE((1, 8), jnp.float32), hand()
    got = cost.estimate(mlp, params, x, device=device, activations=8)
    abstract = jax.tree.map(lambda leaf: SHAPE(leaf.shape, leaf.dtype), params)
    assert got == cost.estimate(mlp, abstract, x, device=device, activations=8)
    assert got.weight_bytes == packed_bytes(params)
    a, b, _ = got.layers
    assert a.weight_bytes == predicted_bytes((8, 4), integer(3), granularity(-1))
    assert a.weight_bits == 8 * a.weight_bytes / 32
    assert (a.weight_dtype, b.weight_dtype, b.density) == ("int3", "int8", 0.25)


def test_activation_bits_by_name_number_and_format(hand):
    x, device = SHAPE((1, 8), jnp.float32), hand()

    def sizes(activations):
        got = cost.estimate(mlp, mlp_params(), x, device=device, activations=activations)
        return [layer.activation_bytes for layer in got.layers[:2]]

    assert sizes(8) == sizes(integer(8)) == [12, 6]
    assert sizes(4) == [6, 3]
    assert sizes(32) == sizes(None) == sizes({}) == [48, 24]
    assert sizes({"b/kernel": 8}) == [36, 6]  # what b reads, a has written
    with pytest.raises(ValueError, match="activations: 'b/kernal' is no tap or site; nearest: 'b/"):
        sizes({"b/kernal": 8})
    with pytest.raises(ValueError, match="must be a number of bits from 1 to 64 or a format"):
        sizes("int8")


def test_ideal_energy_by_hand(hand):
    got = cost.estimate(
        dense, {"w": SHAPE((8, 4), jnp.int8)}, SHAPE((1, 8), jnp.int8), device=hand()
    )
    ideal = cost.ideal_energy(got)
    # 32 MAC of (0.0029948 * 64 + 0.0010417 * 8 + 0.1) pJ; 32 B from DRAM at 1300 / 8 pJ;
    # 12 B of activations at 100 / 8 pJ
    assert ideal.mac_j == pytest.approx(32e-12 * (0.0029948 * 64 + 0.0010417 * 8 + 0.1))
    assert ideal.weight_j == pytest.approx(32 * 162.5e-12)
    assert ideal.total_j == pytest.approx(sum(ideal.layers)) and len(ideal.layers) == 1
    with pytest.raises(ValueError, match="unknown memory 'l3'; the table has sram_8kb"):
        cost.ideal_energy(got, weight_memory="l3")


def test_reports(hand, monkeypatch):
    x, device = SHAPE((1, 8), jnp.float32), hand()
    got = cost.estimate(mlp, mlp_params(), x, device=device)
    row = json.loads(json.dumps(got.to_dict()))
    assert (row["latency_s"], row["device"], row["fits"]) == (6.5, "hand", False)
    assert row["memory_used_bytes"] == {"flash": 184, "sram": 48} and len(row["layers"]) == 3
    text = str(got)
    assert "hand (only): 6.5 s (2.17 s to 19.5 s), 13 J, 40 MAC" in text and "does not fit" in text
    assert "a/kernel: 4.5 s (69%), compute" in text

    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=120, file=io.StringIO())
    cost.table(got, console)
    cost.table({"before": got, "after": got}, console)
    out = console.file.getvalue()
    assert "a/kernel" in out and "184" in out and "6.5 s" in out and "after" in out
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(ImportError, match=r'pip install "jaxcompress\[experiments\]"'):
        cost.table(got)


@pytest.mark.skipif(not hasattr(lax, "polynomial"), reason="a primitive of JAX 0.12")
def test_new_elementwise_primitives_are_counted():
    x = jnp.ones((3, 4))
    new: Any = lax
    fn = lambda p, x: jnp.log2(new.one_minus_square(new.polynomial(x, (0.5, 0.0, 1.0))))
    found = counts(fn, {}, x)
    # Horner of degree 2: 2 products, 2 sums; a product and a difference; a logarithm
    assert (found.flops, found.transcendentals, found.unruled) == (12 * 6, 12, ())
