"""Question: how small does Deep Compression make a ResNet-20, and at what accuracy?

    python -m experiments.deep_compression --json

The three stages of Han et al. 2016 (arXiv 1510.00149) on the trained CIFAR-10 ResNet-20:
  pruned     the lowest LAMP scores of all layers together become zero, the others are fitted by
             least squares to the outputs of the dense network on training images; with --epochs
             they are fine-tuned too, against labels and dense network
  codebook   BatchNorm is folded, the kept weights of each layer share 16 numbers found by k-means,
             rounded by GPTQ on the same images
  coded      the packed file (codes, positions, codebooks, float32 biases) is one Zstandard frame
`entropy_bytes` is what a Huffman code of each leaf would reach, the header of the file (in
`file_bytes`) not counted. The accuracy is that of the file, read back, on the 10,000 test images.
`ratio`: bytes of the published float32 network over those of the file. About 3 minutes of CPU
time; an epoch takes five to six minutes. Result: experiments/results/deep_compression.json.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from experiments.training import fit, mirror_augment
from jaxcompress.quantize import Spec

DEPTH = 20


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    sparsity: float = 0.6
    """Share of the weights that become zero."""
    bits: int = 4
    """A codebook has 2**bits numbers."""
    images: int = 1024
    """Training images that layers are fitted on."""
    epochs: float = 0
    """Of fine-tuning after pruning."""
    learning_rate: float = 0.02
    """At its start; it falls to 0 along a cosine."""
    compress: str = "zstd"
    """How the file is coded: zstd, zstd:1 to zstd:22."""
    packed: Path = Path("runs/deep_compression/resnet20.safetensors.zst")
    """The file."""


def accuracy(fn: Any, variables: Any, test: tuple[np.ndarray, np.ndarray]) -> float:
    """Top-1 in percent."""
    predict = lambda variables, images: fn(variables, cifar10_normalise(images))
    return top1(jax.tree_util.Partial(predict, variables), *test)


def prune(args: Args, variables: Any, data: list[tuple[jax.Array]]) -> tuple[Any, Any]:
    """The variables with zeros, and the masks of the params."""
    params = variables["params"]
    chosen = jc.prune.lamp(jc.prune.one_shot(args.sparsity))
    masks = jc.prune.masks(chosen.init(params), params)
    everything = jax.tree.map(lambda _: jnp.ones((), bool), variables) | {"params": masks}
    fn = resnet_cifar.standard_apply_fn(DEPTH)
    how = {"masks": everything, "sweeps": 2}
    return jc.prune.sparse_gpt(fn, variables, data, {".*kernel": 0.0}, **how)[0], masks


def fine_tune(args: Args, report: Report, variables: Any, masks: Any, train: Any, teacher: Any):
    """The variables after some epochs with the zeros fixed."""
    model, size = resnet_cifar.ResNetCifar(DEPTH), 64 if args.short else 128
    steps = max(1, round(args.epochs * (len(train[0]) // size)))

    def forward(params, statistics, images):
        variables = {"params": params, "batch_stats": statistics}
        x = cifar10_normalise(images)
        logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    dense = resnet_cifar.standard_apply_fn(DEPTH)
    rate = optax.cosine_decay_schedule(args.learning_rate, steps)
    tx = jc.prune.masked_optimizer(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(1e-4),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )
    )
    recipe = jc.prune.fixed(masks)
    step = jc.train.make_step(
        jc.train.fast_kernel_gradients(forward),
        tx,
        recipe=recipe,
        teacher=lambda params, images: dense(params, cifar10_normalise(images)),
    )
    state = jc.train.create(variables["params"], recipe, tx, model_state=variables["batch_stats"])
    state = fit(
        step,
        state,
        train,
        size=size,
        steps=steps,
        teacher_params=teacher,
        seed=args.seed,
        augment=mirror_augment,
        progress=lambda count: report.progress(count, "fine-tuning", total=steps),
    )
    return {"params": state.params, "batch_stats": state.model_state}


def share_weights(args: Args, params: Any, data: list[tuple[jax.Array]]) -> Any:
    """The packed params: codes of a codebook for each layer, where a weight is not zero."""
    spec = {".*kernel": Spec(jc.formats.k_means(args.bits), axis=None)}
    masks = jax.tree.map(lambda w: w != 0 if w.ndim > 1 else jnp.ones((), bool), params)
    fn = resnet_cifar.folded_apply_fn(DEPTH)
    how = {"masks": masks, "quantize": spec, "sweeps": 2}
    params, state = jc.prune.sparse_gpt(fn, params, data, {".*kernel": 0.0}, **how)
    return jc.chain(jc.quantize.recipe(spec), jc.prune.fixed(masks)).pack(params, state)


def check(args: Args) -> None:
    """Raises ValueError for options that make no sense."""
    if not 0 < args.sparsity < 1 or args.images < 2 or args.epochs < 0:
        raise ValueError(
            f"--sparsity must lie between 0 and 1, --images be at least 2, --epochs not negative, "
            f"got {args.sparsity}, {args.images}, {args.epochs}"
        )


def main(args: Args, report: Report) -> dict[str, Any]:
    """All stages, and what is left."""
    check(args)
    variables = jax.tree.map(jnp.asarray, resnet_cifar.load_pretrained(DEPTH))
    train, test = load_cifar10("train"), load_cifar10("test")
    if args.short:
        args = dataclasses.replace(args, images=64)
        train, test = (train[0][:200], train[1][:200]), (test[0][:200], test[1][:200])
    rows = np.random.default_rng(args.seed).choice(len(train[0]), args.images)
    data = [(cifar10_normalise(train[0][part]),) for part in np.array_split(rows, 2)]
    standard, folded = resnet_cifar.standard_apply_fn(DEPTH), resnet_cifar.folded_apply_fn(DEPTH)

    pruned, masks = prune(args, variables, data)
    if args.epochs:
        pruned = fine_tune(args, report, pruned, masks, train, variables)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(pruned))
    packed = share_weights(args, params, data)
    size = jc.export.save(args.packed, packed, compress=args.compress)
    unpacked = jc.unpack(jc.export.load(args.packed).params)
    report.console.print(f"wrote {args.packed}")

    float32_bytes = jc.packed_bytes(variables)
    return {
        "float32_top1_percent": accuracy(standard, variables, test),
        "pruned_top1_percent": accuracy(standard, pruned, test),
        "top1_percent": accuracy(folded, unpacked, test),
        "sparsity_percent": 100 * jc.prune.sparsity_of(unpacked),
        "float32_bytes": float32_bytes,
        "packed_bytes": size.payload_bytes,
        "plain_file_bytes": size.raw_bytes,
        "entropy_bytes": jc.export.entropy_bytes(packed),
        "file_bytes": size.file_bytes,
        "ratio": float32_bytes / size.file_bytes,
        "coding_ratio": size.ratio,
        "epochs": args.epochs,
    }


if __name__ == "__main__":
    run(main, "deep_compression")
