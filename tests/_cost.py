"""A device with round numbers, packed weights and one-layer networks for the tests of costs."""

import jax
import jax.numpy as jnp

from jaxcompress import cost
from jaxcompress.core import packed
from jaxcompress.formats import granularity, integer

SHAPE = jax.ShapeDtypeStruct

HAND = """
description = "round numbers"
clock = { value = 1000, unit = "Hz", source = "s", grade = "estimate" }
[memory.flash]
capacity = { value = 200, unit = "B", source = "s", grade = "estimate" }
bandwidth = { value = 64, unit = "B/s", source = "s", grade = "estimate" }
[memory.sram]
capacity = { value = 40, unit = "B", source = "s", grade = "estimate" }
bandwidth = { value = 16, unit = "B/s", source = "s", grade = "estimate" }
[runtime.only]
description = "one"
rates = "effective"
weights = "flash"
activations = "sram"
active_power = { value = 2, unit = "W", source = "s", grade = "estimate" }
overhead = { value = OVERHEAD, unit = "s", source = "s", grade = "estimate" }
[[runtime.only.throughput]]
weight = "int8"
activation = "int8"
op = "any"
value = 32
unit = "MAC/s"
source = "s"
grade = "estimate"
[[runtime.only.throughput]]
weight = "float32"
activation = "float32"
op = "dense"
value = 8
unit = "MAC/s"
source = "s"
grade = "estimate"
[[runtime.only.unpack]]
weight = "int4"
value = 125
unit = "cycle/weight"
source = "s"
grade = "estimate"
"""


def hand(tmp_path, overhead="0.5", old="", new=""):
    """The device above, with `old` replaced by `new`."""
    file = tmp_path / "hand.toml"
    file.write_text(HAND.replace("OVERHEAD", overhead).replace(old, new))
    return cost.device(file)


def quantized(shape, bits, *, keep=None, key=0):
    x = jax.random.normal(jax.random.key(key), shape)
    format, where = integer(bits), granularity(-1)
    low, high = jnp.min(x, axis=(0,), keepdims=True), jnp.max(x, axis=(0,), keepdims=True)
    leaf = packed.quantize(x, format.qparams(low, high), format=format, granularity=where)
    return leaf if keep is None else packed.mask_leaf(keep, leaf)


def dense(params, x):
    return x @ params["w"]


def one(device, w, *, rows=1, activations=None):
    x = SHAPE((rows, w.shape[0]), jnp.float32)
    return cost.estimate(dense, {"w": w}, x, device=device, activations=activations).layers[0]
