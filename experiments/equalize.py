"""Question: does equalization rescue a depthwise network whose channels have ill-matched scales?

    python -m experiments.equalize

Trains a small depthwise separable network on scikit-learn's 8x8 digits, multiplies its channels by
random scales that the next layer divides out again (the function stays the same), and quantizes
it to int8 with one scale per tensor, weights and activations, without and with cross-layer
equalization. Three seeds. About a minute and a half on two CPU cores; no download.
Results: experiments/results/equalize.json.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import Digits, load_digits_split
from experiments.evaluate import top1
from experiments.training import fit
from jaxcompress.graph.scaling.migration import absorbable, rescale
from jaxcompress.quantize.ptq.cross_layer_equalization import equalize
from jaxcompress.quantize.ptq.leaf_specs import Spec, recipe
from jaxcompress.quantize.ptq.nearest import round_to_nearest

BATCH = 64
LEARNING_RATE = 4e-3
Apply = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Args(Options):
    seeds: int = 3
    """Networks: seeds --seed, --seed + 1, ..."""
    epochs: int = 20
    """Passes over the training images."""
    exponent: float = 1.5
    """Scales are u^-exponent or its inverse, u uniform in (0, 1): a power law."""


class Separable(nn.Module):
    """MobileNet in small: a convolution, depthwise separable blocks, pooling, logits."""

    features: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(self.features[0], (3, 3), name="stem")(x))
        for i, features in enumerate(self.features[1:]):
            n, name = x.shape[-1], f"block{i + 1}"
            depthwise = nn.Conv(
                n, (3, 3), strides=i + 1, feature_group_count=n, name=f"{name}_depthwise"
            )
            x = nn.relu(depthwise(x))
            x = nn.relu(nn.Conv(features, (1, 1), name=f"{name}_pointwise")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10, name="linear")(x.reshape(len(x), -1))


@functools.cache
def network() -> Apply:
    """(params, images [B, 8, 8, 1]) -> logits [B, 10]."""
    model = Separable()
    return lambda params, images: model.apply({"params": params}, images)  # type: ignore


def train(data: Digits, *, epochs: int, seed: int, report: Report) -> Any:
    """The parameters after Adam on all training images."""
    params = Separable().init(jax.random.key(seed), jnp.asarray(data.train_images[:1]))["params"]
    count = epochs * (len(data.train_images) // BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, count))
    step = jc.train.make_step(jc.train.stateless(network()), tx)
    return fit(
        step,
        jc.train.create(params, jc.identity(), tx),
        (data.train_images, data.train_labels),
        size=BATCH,
        steps=count,
        seed=seed,
        progress=lambda steps: report.progress(steps, f"seed {seed}"),
    ).params


def misscaled(params: Any, images: np.ndarray, *, exponent: float, seed: int) -> Any:
    """The same function with a random scale on every channel that may have one."""
    rng = np.random.default_rng(seed)
    for group in absorbable(network(), params, images).groups:
        u = rng.uniform(1e-3, 1.0, group.channels)
        t = u ** (exponent * rng.choice([-1, 1], group.channels))
        params = rescale(params, group, jnp.asarray(t, jnp.float32))
    return params


def int8_accuracy(params: Any, data: Digits, *, equalized: bool) -> float:
    """Top-1 with int8 weights and activations, one scale per tensor."""
    spec = {".*kernel": Spec(jc.formats.integer(8), axis=None)}
    images = [(jnp.asarray(data.train_images[i : i + 128]),) for i in range(0, 512, 128)]
    method = equalize if equalized else round_to_nearest
    params, state = method(network(), params, images, spec)
    view = recipe(spec).apply(params, state)
    quantizer = jc.quantize.activations(network(), jc.formats.integer(8, symmetric=False))
    grids = jc.quantize.calibrate_activations(quantizer, view, images)
    quantized = jax.tree_util.Partial(jc.quantize.with_activations(network()), grids, view)
    return top1(quantized, data.test_images, data.test_labels)


def float32_accuracy(params: Any, data: Digits) -> float:
    """Top-1 in float32."""
    return top1(jax.tree_util.Partial(network(), params), data.test_images, data.test_labels)


def main(args: Args, report: Report) -> dict[str, Any]:
    if args.seeds < 1 or args.epochs < 1:
        raise ValueError(f"--seeds and --epochs must be positive, got {args.seeds}, {args.epochs}")
    figures: dict[str, Any] = {}
    rows = []
    for seed in range(args.seed, args.seed + (1 if args.short else args.seeds)):
        data = load_digits_split(seed)
        params = train(data, epochs=2 if args.short else args.epochs, seed=seed, report=report)
        scaled = misscaled(params, data.train_images[:8], exponent=args.exponent, seed=seed)
        rows.append(
            {
                "float32": float32_accuracy(params, data),
                "int8": int8_accuracy(params, data, equalized=False),
                "misscaled_float32": float32_accuracy(scaled, data),
                "misscaled_int8": int8_accuracy(scaled, data, equalized=False),
                "equalized_int8": int8_accuracy(scaled, data, equalized=True),
            }
        )
        figures |= {f"seed{seed}_{name}_top1_percent": v for name, v in rows[-1].items()}
    report.table(
        "Top-1 in percent, one scale per tensor",
        ("seed", *rows[0]),
        [(args.seed + k, *row.values()) for k, row in enumerate(rows)],
    )
    means = {f"{n}_top1_percent": float(np.mean([row[n] for row in rows])) for n in rows[0]}
    drop = max(row["float32"] - row["equalized_int8"] for row in rows)
    return {**means, "largest_drop_points": drop, **figures}


if __name__ == "__main__":
    run(main, "equalize")
