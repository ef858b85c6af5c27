"""Question: does a mixture of experts survive 4-bit weights and 8-bit activations?

    python -m experiments.moe --json

scikit-learn's 8x8 digits, 500 test images. Two layers of a top-2 mixture of 8 experts, which
`lax.ragged_dot` multiplies: rows are sorted by expert, group sizes say how many each expert takes.
  float              as trained (with the balance loss of Switch Transformers)
  w4a8               every weight matrix, router and experts too, in 4 bits by GPTQ, each expert
                     calibrated with just the rows that reach it; activations on 8-bit grids. How
                     ranges are found is chosen by the loss on a fifth of the training images, which
                     the network was not trained on
  planned            4 or 8 bits for each leaf by `search.compress`, in 0.15 of the float bytes
`planned_weights_percent` is the share of all weights that the plan stores; the rest are norms and
the biases. `least_expert_rows`: rows of the calibration data that the least used expert took.
About a minute on two CPU cores. Result: experiments/results/moe.json.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import load_digits_split
from jaxcompress.core import packed_bytes
from jaxcompress.graph.layers.matrices import layers
from jaxcompress.graph.layers.statistics import capture
from jaxcompress.quantize import Spec, gptq, min_max, mse
from jaxcompress.quantize import recipe as recipe_of

EXPERTS, TOP, WIDTH, HIDDEN, LAYERS = 8, 2, 64, 128, 2
DEVICE = "raspberry-pi-4"
MATRICES = ".*(router|up|down|embed|head)"


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    steps: int = 600
    """Steps of Adam, each on 128 images."""
    learning_rate: float = 2e-3
    """At the start; it falls to 0 along a cosine."""
    balance: float = 0.01
    """Weight of the loss that spreads rows over experts."""


def start(key: Array) -> dict[str, Any]:
    """Random parameters."""
    keys = iter(jax.random.split(key, 2 + 3 * LAYERS))
    draw = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])
    block = lambda: {
        "scale": jnp.ones(WIDTH),
        "router": draw(WIDTH, EXPERTS),
        "up": draw(EXPERTS, WIDTH, HIDDEN),
        "down": draw(EXPERTS, HIDDEN, WIDTH),
    }
    blocks = {f"block{i}": block() for i in range(LAYERS)}
    bias = jnp.zeros(10)
    return {"embed": draw(64, WIDTH), **blocks, "head": draw(WIDTH, 10), "bias": bias}


def mixture(p: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """(each row through the experts that it chooses [B, D], balance loss)."""
    shares = jax.nn.softmax(x @ p["router"])
    top, chosen = lax.top_k(shares, TOP)  # [B, TOP]
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS)
    taken = jnp.repeat(x, TOP, axis=0)[order]
    y = lax.ragged_dot(jax.nn.relu(lax.ragged_dot(taken, p["up"], sizes)), p["down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(-1, TOP, WIDTH)
    # E sum_e (share of the rows) (mean probability): 1 if all experts are used alike
    balance = EXPERTS * jnp.sum(sizes / expert.size * jnp.mean(shares, axis=0))
    return jnp.sum(y * top[..., None], axis=1), balance


def forward(p: dict[str, Any], images: Array) -> tuple[Array, Array]:
    """(logits [B, 10], balance loss) of images [B, 64]."""
    x, balance = images @ p["embed"], jnp.float32(0)
    for i in range(LAYERS):
        block = p[f"block{i}"]
        size = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        y, unequal = mixture(block, x * size * block["scale"][None])
        x, balance = x + y, balance + unequal / LAYERS
    return x @ p["head"] + p["bias"][None], balance


def logits(p: dict[str, Any], images: Array) -> Array:
    """Logits [B, 10]."""
    return forward(p, images)[0]


def cross_entropy(outputs: Array, labels: Array) -> Array:
    """Mean over a batch, nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))


def train(args: Args, report: Report, images: Array, labels: Array) -> dict[str, Any]:
    """Trained parameters."""
    steps = 30 if args.short else args.steps
    optimizer = optax.adam(optax.cosine_decay_schedule(args.learning_rate, steps))
    params = start(jax.random.key(args.seed))

    def loss(p, x, y):
        outputs, balance = forward(p, x)
        return cross_entropy(outputs, y) + args.balance * balance

    @jax.jit
    def step(p, state, key):
        rows = jax.random.choice(key, len(images), (128,))
        updates, state = optimizer.update(jax.grad(loss)(p, images[rows], labels[rows]), state)
        return optax.apply_updates(p, updates), state

    state = optimizer.init(params)
    for key in report.progress(jax.random.split(jax.random.key(args.seed + 1), steps), "training"):
        params, state = step(params, state, key)
    return params


def w4a8(params: Any, batches: list[tuple[Array]], calibrate: Any) -> tuple[Any, Any]:
    """(packed weights, grids) of 4-bit weights by GPTQ and 8-bit activations."""
    four = jc.formats.integer(4)
    dense = Spec(four, calibrate=calibrate)
    spec = {".*(up|down)": Spec(four, axis=(0, 2), calibrate=calibrate), MATRICES: dense}
    eight = jc.quantize.activations(logits, jc.formats.integer(8, symmetric=False))
    rounded, state = gptq(logits, params, batches, spec, sweeps=2)
    recipe = recipe_of(spec)
    view = recipe.apply(rounded, state)
    grids = jc.quantize.calibrate_activations(eight, view, batches)
    return recipe.pack(rounded, state), grids


def main(args: Args, report: Report) -> dict:
    """Trains, compresses, plans."""
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    data = load_digits_split(args.seed)
    flat = lambda x: jnp.asarray(x).reshape(len(x), 64)
    images, labels = flat(data.train_images), jnp.asarray(data.train_labels)
    test = flat(data.test_images), jnp.asarray(data.test_labels)
    held = len(images) // 5
    choosing = images[:held], labels[:held]
    params = train(args, report, images[held:], labels[held:])
    batches = [(images[held : held + 512],), (images[held + 512 : held + 1024],)]
    quantized = jax.jit(jc.quantize.with_activations(logits))

    def judged(packed, grids, where):
        outputs = quantized(grids, jc.unpack(packed), where[0])
        hits = jnp.mean(jnp.argmax(outputs, axis=-1) == where[1])
        return float(cross_entropy(outputs, where[1])), 100 * float(hits)

    made = [w4a8(params, batches, calibrate) for calibrate in (min_max(), mse())]
    packed, grids = min(made, key=lambda pair: judged(*pair, choosing)[0])
    found = layers(logits, params, *batches[0]).layers
    moments = capture(logits, params, batches, layers=found, gram=False)
    rows = min(int(m.count.min()) for m in moments.values())
    cost = jc.cost.estimate(logits, jax.eval_shape(lambda: packed), test[0][:1], device=DEVICE)
    floats = packed_bytes(params)
    plan = jc.search.compress(
        logits,
        params,
        [(images[held : held + 512],)],
        targets=[labels[held : held + 512]],
        device=DEVICE,
        budget=jc.Budget(weight_bytes=int(0.15 * floats)),
        options=jc.search.integer_options((4, 8)),
        candidates=2 if args.short else 8,
        progress=lambda items: report.progress(items, "searching"),
    )
    sizes = {path: w.size for path, w in jc.core.leaves_with_paths(params)}
    planned = sum(sizes[path] for path in plan.plan.weights)
    figures: dict[str, Any] = {}
    for name, (weights, on) in {
        "float": (params, {}),
        "w4a8": (packed, grids),
        "planned": (plan.packed, plan.grids),
    }.items():
        figures[f"{name}_loss"], figures[f"{name}_top1_percent"] = judged(weights, on, test)
    return figures | {
        "float_bytes": floats,
        "packed_bytes": packed_bytes(packed),
        "predicted_bytes": cost.weight_bytes,
        "planned_bytes": packed_bytes(plan.packed),
        "planned_weights_percent": 100 * planned / sum(sizes.values()),
        "least_expert_rows": rows,
    }


if __name__ == "__main__":
    run(main, "moe")
