"""Question: which ResNet-20 fits a microcontroller with 60 kB of flash for weights?

    python -m experiments.mcu_cifar10 --json

`jaxcompress.search.compress` with labels and a training budget: ResNet-20 from the trained weights,
BatchNorm folded, competes with the same at --macs of its multiply-accumulates (channels cut inside
the blocks, fitted, fine-tuned); every layer gets its bits and zeros by an exact search, activations
have 8 bits, and the winner is trained with its grids. Limits: bytes of weights, latency, energy, by
the cost model of the device; the sites are the convolutions and the last layer. Planned and trained
on training images; top-1 of the packed file, read back, on 10,000 test images.
About 25 minutes on two CPU cores.
Result: experiments/results/mcu_cifar10.json; with --out plan and packed file lie beside it.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from experiments.training import mirror_augment
from jaxcompress.search import Budget, Training, compress, integer_options


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    device: str = "stm32h743"
    """Device of the cost model."""
    weight_bytes: int = 60_000
    """Most bytes of packed weights, scales and biases included."""
    latency_s: float = 0.1
    """Most seconds for one image."""
    energy_j: float = 0.03
    """Most joules for one image."""
    macs: tuple[float, ...] = (1.0, 0.5)
    """Shares of the multiply-accumulates of the networks that compete."""
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    """Bits of the options."""
    images: int = 512
    """Training images to fit and to plan on."""
    steps: int = 1200
    """Steps of training, 128 images each, in all."""
    learning_rate: float = 0.01
    """At the start of each training."""


def main(args: Args, report: Report) -> dict[str, Any]:
    """One call, and what it gave."""
    if args.images < 64:
        raise ValueError(f"--images must be at least 64, got {args.images}")
    fn = resnet_cifar.folded_apply_fn(20)
    variables = resnet_cifar.load_pretrained(20)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    (train, labels), test = load_cifar10("train"), load_cifar10("test")
    count, steps = (64, 2) if args.short else (args.images, args.steps)
    if args.short:
        test = test[0][:200], test[1][:200]
    rows = np.random.default_rng(args.seed).choice(len(train), count, replace=False)
    parts = np.split(rows, -(-count // 128))
    augment = lambda key, images: cifar10_normalise(mirror_augment(key, images))
    budget = Budget(
        weight_bytes=args.weight_bytes, latency_s=args.latency_s, energy_j=args.energy_j
    )
    found = compress(
        fn,
        params,
        [(cifar10_normalise(train[part]),) for part in parts],
        device=args.device,
        budget=budget,
        targets=[jnp.asarray(labels[part], jnp.int32) for part in parts],
        channels=r"layer\d_\d/conv1/.*",
        widths=args.macs[-1:] if args.short else args.macs,
        options=integer_options((2, 4) if args.short else args.bits),
        candidates=2 if args.short else 32,
        training=Training(
            train, labels.astype(np.int32), steps=steps, size=32 if args.short else 128,
            learning_rate=args.learning_rate, augment=augment, seed=args.seed,
        ),
        progress=lambda jobs: report.progress(jobs, "compress"),
    )  # fmt: skip
    for name, limit in budget.limits.items():
        if getattr(found.cost, name) > limit:
            raise RuntimeError(f"{name}: {getattr(found.cost, name)} exceeds {limit}")
    report.console.print(found.plan)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.out or folder)
        file = out / "mcu_cifar10.safetensors"
        size = jc.export.save(file, found.packed, activations=found.grids)
        found.plan.save(out / "mcu_cifar10_plan.json")
        loaded = jc.export.load(file, like=found.packed)
    apply = jc.quantize.with_activations(found.apply_fn)
    shipped = jax.tree_util.Partial(
        lambda grids, tree, x: apply(grids, tree, cifar10_normalise(x)),
        loaded.activations,
        jc.unpack(loaded.params),
    )
    dense = jax.tree_util.Partial(lambda p, x: fn(p, cifar10_normalise(x)), params)
    figures = {
        "float32_top1_percent": top1(dense, *test),
        "top1_percent": top1(shipped, *test),
        "weight_bytes": found.cost.weight_bytes,
        "latency_s": found.cost.latency_s,
        "energy_j": found.cost.energy_j,
        "peak_bytes": found.cost.peak_bytes,
        "macs": found.cost.macs,
        "file_bytes": size.file_bytes,
    }
    limits = {**budget.limits, "top1_percent": ""}
    rows = [(name, figures[name], limits[name]) for name in limits]
    report.table(f"ResNet-20 on {args.device}", ("", "packed", "limit"), rows)
    return figures


if __name__ == "__main__":
    run(main, "mcu_cifar10")
