"""Question: what is left of a trained CIFAR-10 ResNet after quantization without training?

    python -m experiments.compress --model resnet20-cifar10 --weights int8 --activations int8

Evaluates the published weights on the 10,000 test images, folds BatchNorm, calibrates on training
images, quantizes, evaluates again, prints the cost per layer and saves the packed file. The data
are read from $JAXCOMPRESS_DATA, else downloaded. About 30 s on two CPU cores.
Results: experiments/results/compress_*.json.
"""

import dataclasses
import math
import re
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

MODELS = {f"resnet{depth}-cifar10": depth for depth in resnet_cifar.DEPTHS}


@dataclasses.dataclass(frozen=True)
class Args(Options):
    model: str = "resnet20-cifar10"
    """resnet20-, resnet32-, resnet44- or resnet56-cifar10."""
    weights: str = "int8"
    """Format of the weights, per output channel: int8, uint4, q0.7, ternary, mxfp4, float32."""
    activations: str = "int8"
    """Format of what enters each layer, one scale per tensor: int8, uint8, ..., float32."""
    bits: int | None = None
    """Short for --weights intN."""
    sparsity: float = 0.0
    """Share of the weights that global magnitude pruning zeroes first, without training."""
    layers: str = ".*"
    """Regular expression: which layers the table shows."""
    device: str = "stm32l4r5"
    """A name of jc.cost.devices() or a TOML file."""
    calibration_images: int = 512
    """Training images that set the ranges of the activations."""
    packed: Path | None = None
    """The packed file; default runs/compress/MODEL.safetensors."""


def recipe_for(weights: jc.formats.Format | None, sparsity: float) -> jc.Compressor:
    """Global magnitude pruning, then one scale per output channel."""
    steps = []
    if sparsity:
        steps.append(jc.prune.magnitude(sparsity, scope="global"))
    if weights is not None:
        quantizer = jc.quantize.weights(weights, axis=-1)
        steps.append(jc.by_path({".*kernel": quantizer}, default=jc.identity()))
    return jc.chain(*steps)


def predicted_bytes(view: Any, grids: Any, weights: Any, *, masked: bool) -> int:
    """Bytes of the packed network from shapes, formats and non-zero counts alone."""
    total = 0
    for path, w in jc.core.leaves_with_paths(view):
        nnz = int(np.count_nonzero(w)) if masked and w.ndim > 1 else None
        if weights is not None and re.fullmatch(".*kernel", path):
            where = jc.formats.granularity_for(weights, -1)
            total += jc.formats.predicted_bytes(w.shape, weights, where, nnz=nnz)
        elif nnz is not None:
            total += min(4 * w.size, -(-w.size // 8) + 4 * nnz)
        else:
            total += 4 * w.size
    return total + sum(grid.format.metadata_bytes(1) for grid in grids.values())


def format_of(name: str) -> jc.formats.Format | None:
    """The format of a name; None for float32."""
    return None if name == "float32" else jc.formats.parse(name)


def main(args: Args, report: Report) -> dict[str, Any]:
    if args.model not in MODELS:
        raise ValueError(f"unknown --model {args.model!r}; known: {', '.join(MODELS)}")
    if args.bits is not None:
        args = dataclasses.replace(args, weights=f"int{args.bits}")
    weights, act_format = format_of(args.weights), format_of(args.activations)
    recipe = recipe_for(weights, args.sparsity)
    device = jc.cost.device(args.device)
    depth = MODELS[args.model]
    variables = resnet_cifar.load_pretrained(depth)
    test_images, test_labels = load_cifar10("test")
    if args.short:
        test_images, test_labels = test_images[:200], test_labels[:200]

    # The published network, in float32.
    standard = resnet_cifar.standard_apply_fn(depth)
    float32_top1 = accuracy(
        report, "float32", jax.tree_util.Partial(standard), variables, test_images, test_labels
    )

    # Without BatchNorm: its scale and shift move into the convolutions, exactly.
    apply_fn = resnet_cifar.folded_apply_fn(depth)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))

    # Pruned and quantized weights, then the ranges of the activations that they produce.
    state = recipe.init(params)
    view, packed = recipe.apply(params, state), recipe.pack(params, state)
    grids = {}
    if act_format is not None:
        quantizer = jc.quantize.activations(apply_fn, act_format)
        images = calibration_images(args)
        images = report.progress(images, "calibration")
        grids = jc.quantize.calibrate_activations(quantizer, view, images)
    quantized = jax.tree_util.Partial(jc.quantize.with_activations(apply_fn), grids)
    # Partial: grids and params are arguments of one compiled program, not constants in it.
    compressed_top1 = accuracy(report, "compressed", quantized, view, test_images, test_labels)

    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    before = jc.cost.estimate(apply_fn, params, image, device=device)
    after = jc.cost.estimate(apply_fn, packed, image, device=device, activations=grids or None)
    float32_bytes = jc.packed_bytes(variables)
    show(report, args, before, after)
    path = args.packed or Path("runs/compress") / f"{args.model}.safetensors"
    size = jc.export.save(path, packed, activations=grids, metadata={"model": args.model})
    report.console.print(f"{after.fits()}; wrote {path}")
    return {
        "model": args.model,
        "weights": args.weights,
        "activations": args.activations,
        "sparsity": args.sparsity,
        "float32_top1_percent": float32_top1,
        "top1_percent": compressed_top1,
        "packed_bytes": size.payload_bytes,
        "predicted_bytes": predicted_bytes(view, grids, weights, masked=args.sparsity > 0),
        "header_bytes": size.header_bytes,
        "file_bytes": size.file_bytes,
        "float32_bytes": float32_bytes,
        "size_ratio": size.payload_bytes / float32_bytes,
        "file_ratio": size.file_bytes / float32_bytes,
        "parameters": sum(math.prod(w.shape) for w in jax.tree.leaves(params)),
        "zeros_share": jc.prune.sparsity_of(view),
        "macs": after.macs,
        "device": args.device,
        "float32_latency_s": before.latency_s,
        "latency_s": after.latency_s,
        "float32_energy_j": before.energy_j,
        "energy_j": after.energy_j,
    }


def accuracy(report, name, apply_fn, params, images, labels) -> float:
    """Top-1 in percent of apply_fn(params, normalised images)."""
    predict = jax.tree_util.Partial(_predict, apply_fn, params)
    value = top1(predict, images, labels)
    report.console.print(f"{name}: top-1 {value:.2f} % of {len(labels)} test images")
    return value


def _predict(apply_fn, params, images):
    return apply_fn(params, cifar10_normalise(images))


def calibration_images(args: Args) -> list[tuple[jax.Array]]:
    """Batches of 64 normalised training images, drawn by the seed."""
    images, _ = load_cifar10("train")
    count = 64 if args.short else args.calibration_images
    if not 1 <= count <= len(images):
        raise ValueError(f"--calibration-images must be 1 to {len(images)}, got {count}")
    rows = np.random.default_rng(args.seed).choice(len(images), count, replace=False)
    return [(cifar10_normalise(images[rows[i : i + 64]]),) for i in range(0, count, 64)]


def show(report: Report, args: Args, before: jc.cost.Cost, after: jc.cost.Cost) -> None:
    """The cost per layer, before and after."""
    dense = {layer.name: layer for layer in before.layers}
    chosen = [layer for layer in after.layers if re.fullmatch(args.layers, layer.name)]
    if not chosen:
        names = ", ".join(list(dense)[:3])
        raise ValueError(f"--layers {args.layers!r} matches no layer; the first are: {names}")
    rows: list[tuple[str, str, Any, Any]] = [
        (row.name, row.bound, dense[row.name], row) for row in chosen
    ]
    rows.append(("total", "", before, after))
    report.table(
        f"{args.model}, {args.weights} weights, {args.activations} activations, {args.device}",
        ("layer", "MACs", "float32 B", "packed B", "float32 ms", "ms", "mJ", "bound"),
        [
            (
                name.removesuffix("/kernel"),
                new.macs,
                old.weight_bytes,
                new.weight_bytes,
                1e3 * old.latency_s,
                1e3 * new.latency_s,
                1e3 * new.energy_j,
                bound,
            )
            for name, bound, old, new in rows
        ],
    )
    limits = [f"{row.name}: {row.fallback}" for row in chosen if row.fallback]
    if limits:
        more = f" (and so in {len(limits) - 1} more layers)" if len(limits) > 1 else ""
        report.console.print(limits[0] + more)


if __name__ == "__main__":
    run(main, "compress")
