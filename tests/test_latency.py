"""Rates and roofline: fallbacks, zeros that pay and zeros that do not, measured boards."""

import functools

import _cost
import jax
import jax.numpy as jnp
import pytest
from _cost import SHAPE, one, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from experiments.models.zoo import ZOO
from jaxcompress import cost
from jaxcompress.core import packed
from jaxcompress.cost.timing.roofline import Load, timing

pytestmark = pytest.mark.broad


@pytest.fixture
def hand(tmp_path):
    return functools.partial(_cost.hand, tmp_path)


def two_of_four(shape, axis):
    groups = jnp.arange(shape[axis]) % 4 < 2
    return jnp.broadcast_to(jnp.expand_dims(groups, 1 - axis), shape)


def test_int4_falls_back_to_int8_and_pays_for_unpacking(hand):
    layer = one(hand(), quantized((8, 4), 4), activations=8)
    assert (layer.weight_dtype, layer.activation_dtype) == ("int4", "int8")
    assert layer.weight_bytes == 8 * 2 + 4 * 4  # rows of two bytes, four float32 scales
    assert layer.compute_s == 32 / 32 + 32 * 125 / 1000
    assert layer.fallback == "int4 x int8 computed as int8 x int8 after 4 s of unpacking"
    exact = one(hand(), quantized((8, 4), 8), activations=8)
    assert (exact.compute_s, exact.fallback) == (1.0, "")


def test_int4_on_a_cortex_m4_saves_flash_but_no_time():
    eight, four = (one("stm32l4r5", quantized((64, 32), bits), activations=8) for bits in (8, 4))
    assert four.weight_bytes < eight.weight_bytes and four.latency_s > eight.latency_s
    assert "int4 x int8 computed as int8 x int8" in four.fallback
    # Quantized weights alone do not make a float kernel an integer one.
    assert one("stm32l4r5", quantized((64, 32), 8)).fallback.endswith("as float32 x float32")


def test_types_that_nothing_holds_are_refused(hand):
    with pytest.raises(ValueError, match="'w': device 'hand' .* no rate for float32 weights x"):
        one(hand(old='weight = "float32"', new='weight = "int16"'), SHAPE((8, 4), jnp.float32))
    with pytest.raises(ValueError, match="it has int8 x int8. Quantize the weights, or say how"):
        one("stm32l4r5:tflm", SHAPE((8, 4), jnp.float32))


def test_two_of_four_pays_where_there_is_a_kernel_for_it():
    shape, rows = (256, 128), 4096
    sparse = quantized(shape, 8, keep=two_of_four(shape, 0))
    full, half = (one("h100", w, rows=rows, activations=8) for w in (quantized(shape, 8), sparse))
    assert (half.pattern, half.macs, half.macs_effective) == ("2:4", full.macs, full.macs // 2)
    assert half.compute_s == full.compute_s / 2 and half.fallback == ""
    full, half = (one("stm32l4r5", w, activations=8) for w in (quantized(shape, 8), sparse))
    assert half.latency_s == full.latency_s and half.macs_effective == full.macs
    assert half.weight_bytes < full.weight_bytes
    assert half.fallback == "unstructured zeros (50.0%) save storage, not time"


def test_zeros_along_the_wrong_axis_or_at_random_save_no_time():
    shape = (256, 128)
    full = one("h100", quantized(shape, 8), rows=4096, activations=8)
    masks = two_of_four(shape, 1), jax.random.bernoulli(jax.random.key(1), 0.3, shape)
    for mask in masks:
        layer = one("h100", quantized(shape, 8, keep=mask), rows=4096, activations=8)
        assert (layer.pattern, layer.latency_s) == ("unstructured", full.latency_s)
        assert layer.weight_bytes < full.weight_bytes


@pytest.mark.parametrize("way", ["transpose", "stack", "reshape", "conv"])
def test_two_of_four_is_found_behind_views(way):
    conv = lambda x, w: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    scan = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])
    shape, axis, x, fn = {
        "transpose": ((32, 64), 1, (9, 64), lambda p, x: x @ p["w"].T),
        "stack": ((3, 64, 64), 1, (9, 64), scan),
        "reshape": ((64, 2, 16), 0, (9, 64), lambda p, x: x @ p["w"].reshape(64, 32)),
        "conv": ((3, 3, 8, 4), 2, (1, 5, 5, 8), lambda p, x: conv(x, p["w"])),
    }[way]
    for along in range(len(shape)):
        if shape[along] % 4:
            continue
        keep = jnp.moveaxis(jnp.arange(shape[along]).reshape(-1, *[1] * (len(shape) - 1)), 0, along)
        w = packed.mask_leaf(jnp.broadcast_to(keep % 4 < 2, shape), jnp.ones(shape))
        got = cost.estimate(fn, {"w": w}, SHAPE(x, jnp.float32), device="h100")
        assert got.layers[0].density == 0.5
        assert (got.layers[0].pattern == "2:4") == (along == axis)


def test_depthwise_convolutions_have_their_own_rate():
    def separable(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params["dw"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=8
        )
        return lax.conv_general_dilated(x, params["pw"], (1, 1), "SAME", dimension_numbers=numbers)

    params = {"dw": SHAPE((3, 3, 1, 8), jnp.int8), "pw": SHAPE((1, 1, 8, 4), jnp.int8)}
    got = cost.estimate(separable, params, SHAPE((1, 4, 4, 8), jnp.int8), device="stm32l4r5")
    assert [(layer.op, layer.macs) for layer in got.layers] == [
        ("depthwise", 16 * 8 * 9),
        ("pointwise", 16 * 8 * 4),
    ]
    assert got.layers[0].compute_s == 1152 / (120e6 / 1.371)


def _load(weight, activation, *, pattern="dense", density=1.0, macs=1, weights=1):
    bits = int(weight.removeprefix("int")) if weight.startswith("int") else 32
    full = weights * bits / 8
    return Load(
        "w", "dense", macs, 1, weight, activation, pattern, density, weights,
        full * density + (0 if pattern == "dense" else weights / 8), full, 100,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(("h100", "raspberry-pi-5", "stm32l4r5", "jetson-agx-orin")),
    bits=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted),
    activation=st.sampled_from(("int8", "float32")),
    macs=st.integers(1, 10**9),
    weights=st.integers(1, 10**6),
    density=st.floats(0, 1),
)
def test_fewer_bits_and_more_zeros_never_cost_more(name, bits, activation, macs, weights, density):
    device = cost.device(name)
    kinds = [f"int{b}" for b in bits] + ["float32"]
    times = [timing(device, _load(k, activation, macs=macs, weights=weights)) for k in kinds]
    for narrow, wide in zip(times, times[1:], strict=False):
        # Unpacking is what a narrower weight may cost on top, and no more.
        unpack_s = sum(q.value for q in device.unpack.values()) * weights
        unpack_s /= device.clock.value if device.clock else 1
        assert narrow.latency_s <= wide.latency_s + unpack_s
    args = {"macs": macs, "weights": weights, "density": density}
    sparse = timing(device, _load(kinds[1], activation, pattern="unstructured", **args))
    assert sparse.latency_s == times[1].latency_s and sparse.macs_effective == macs


def test_the_first_memory_that_holds_them_all_is_used(hand):
    device = hand(old='weights = "flash"', new='weights = ["flash", "sram"]')
    layer = one(device, SHAPE((8, 4), jnp.float32))  # 128 B, of 200 B
    assert layer.traffic_bytes == {"flash": 128, "sram": 48}
    # Where no memory holds them they lie in the last.
    got = cost.estimate(
        _cost.dense, {"w": SHAPE((16, 4), jnp.float32)}, SHAPE((1, 16), jnp.float32), device=device
    )
    assert got.weight_memory == "sram" and not got.fits()


def test_channels_are_padded_as_the_device_wants(hand):
    aligned = hand(
        old="[runtime.only]\n",
        new="""[runtime.only.alignment]
inputs = { value = 6, unit = "channel", source = "s", grade = "estimate" }
[runtime.only]
""",
    )
    plain, padded = (one(d, SHAPE((8, 4), jnp.float32)) for d in (hand(), aligned))
    assert padded.compute_s == pytest.approx(plain.compute_s * 12 / 8)
    assert padded.macs == plain.macs


def test_gathering_patches_makes_few_output_channels_slow(hand):
    device = hand(
        old='unit = "MAC/s"',
        new="""unit = "MAC/s"
unfold = { value = 16, unit = "element/s", source = "s", grade = "estimate" }""",
    )
    layer = one(device, quantized((8, 4), 8), activations=8)
    assert layer.compute_s == 32 / 32 + 8 / 16


def test_reserved_bytes_are_not_available(hand):
    device = hand(
        old="[runtime.only]\n",
        new="""[runtime.only.reserved]
sram = { value = 30, unit = "B", source = "s", grade = "estimate" }
[runtime.only]
""",
    )
    assert (device.available("sram"), device.available("flash")) == (10, 200)


@functools.cache
def tiny(network):
    return ZOO[network].build()


# Inferences per second, MLPerf Tiny: IC, KWS, VWW, AD
@pytest.mark.parametrize(
    ("name", "per_s", "tolerance"),
    [
        ("stm32l4r5", (6.056, 23.155, 11.245, 190.086), 0.01),
        ("stm32l4r5:tflm", (1 / 0.70426, 1 / 0.18192, 1 / 0.60054, 99.487), 0.09),
    ],
)
def test_effective_rates_give_back_the_measured_latencies(name, per_s, tolerance):
    networks = ("resnet8", "ds_cnn", "mobilenet_v1_025", "autoencoder")
    for network, measured in zip(networks, per_s, strict=True):
        fn, params, inputs = tiny(network)
        int8 = jax.tree.map(lambda leaf: SHAPE(leaf.shape, jnp.int8), params)
        whole = lambda p, *x, fn=fn: fn(jax.tree.map(lambda w: w.astype(jnp.float32), p), *x)
        got = cost.estimate(whole, int8, *inputs, device=name, activations=8)
        assert got.latency_s == pytest.approx(1 / measured, rel=tolerance), network
        if (name, network) == ("stm32l4r5", "resnet8"):  # 6.919 mJ measured
            assert got.energy_j == pytest.approx(6.919e-3, rel=0.02)


def _network(params, x):
    x = jax.nn.relu(x @ params["a"]) + params["bias"][None]
    return jax.nn.softmax(x @ params["b"])


@functools.cache
def packed_network(inner, bits, density):
    keep = None if density == 1 else jax.random.uniform(jax.random.key(1), (16, inner)) < density
    return {
        "a": quantized((16, inner), bits, keep=keep),
        "b": quantized((inner, 12), bits),
        "bias": jnp.zeros(inner),
    }


@pytest.mark.parametrize("name", cost.devices())
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_false_savings(name, bits):
    def costs(inner, bits, density):
        params, x = packed_network(inner, bits, density), SHAPE((4, 16), jnp.float32)
        got = cost.estimate(_network, params, x, device=name, activations=8)
        for field in ("macs", "flops", "weight_bytes", "activation_bytes", "latency_s", "energy_j"):
            assert getattr(got, field) == sum(getattr(layer, field) for layer in got.layers)
        assert got.weight_bytes == packed.packed_bytes(params)
        return got

    dense, sparse, wide = costs(16, bits, 1), costs(16, bits, 0.3), costs(32, bits, 1)
    for field in ("latency_s", "energy_j", "peak_bytes", "weight_bytes", "activation_bytes"):
        assert getattr(dense, field) <= getattr(wide, field)  # half the channels
    # Random zeros save bytes where the file keeps a mask, time nowhere: no device skips them.
    assert sparse.latency_s == dense.latency_s
    assert sum(layer.macs_effective for layer in sparse.layers) == sparse.macs
    # Fewer bits pay at most for being widened.
    eight = costs(16, 8, 1)
    widened = max((q.value for q in dense.device.unpack.values()), default=0)
    clock = dense.device.clock.value if dense.device.clock else 1
    assert dense.latency_s <= eight.latency_s + widened * (16 * 16 + 16 * 12) / clock
    assert dense.weight_bytes <= eight.weight_bytes
