"""Question: what do 8, 4 and 3 bits cost a small language model, and how much does tuning win back?

    python -m experiments.ptq_lm

stories260K (Llama type, 260,032 parameters) on the 790 validation stories of TinyStories, mean
next-token loss in nats. Calibration sees no story: the model's own samples, drawn by the seed.
Weights are symmetric integers in groups of 32 inputs: rtn (rounded to nearest), gptq (on least
squares ranges) and tuned (from gptq, all float parameters tuned until the quantized network's
distribution is the float network's, on more samples). w8a8 has one scale per output channel and one
asymmetric grid per activation, its range a percentile; the KV cache has one scale per token and
head. The table of tokens, which is also the head, is quantized like the other weights.
Half an hour on two CPU cores, no download.
Result: experiments/results/ptq_lm.json.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments import stories
from experiments._report import Options, Report, run
from experiments.models import llama, stories260k
from jaxcompress.quantize import Spec

KERNELS = ".*(kernel|embedding)"
GROUP = 32
BATCH = 4  # texts of a step


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    samples: int = 32
    """Texts that the model writes for calibration."""
    tuning_samples: int = 512
    """Texts that it writes for tuning, those of the calibration among them."""
    length: int = 512
    """Tokens of each."""
    sweeps: int = 4
    """Passes of coordinate descent after GPTQ."""
    epochs: int = 8
    """Passes of tuning."""
    learning_rate: float = 1e-3
    """Of tuning, at its start."""
    percentile: float = 99.99
    """Of the activations of w8a8, that their range holds at either end."""


def specs(bits: int, *, clip: bool = False) -> dict[str, Spec]:
    """Weights [in, out] in groups of inputs; the table [tokens, dim] in groups of its rows."""
    common = {"group": GROUP, "calibrate": jc.quantize.mse() if clip else None}
    format = jc.formats.integer(bits)
    return {".*kernel": Spec(format, **common), ".*embedding": Spec(format, axis=0, **common)}


def samples(args: Args, params: Any) -> list[tuple[jax.Array]]:
    """Batches of texts that the model writes."""
    count, length = (8, 64) if args.short else (args.tuning_samples, args.length)
    drawn = stories.calibration_tokens(params, count, length=length, seed=args.seed)
    return [(jnp.asarray(drawn[i : i + BATCH]),) for i in range(0, count, BATCH)]


def low_bits(args: Args, report: Report, bits: int, params: Any, data: list) -> dict[str, Any]:
    """The weights that each method gives, as the network sees them; and the packed bits."""
    fn, spec, clipped = llama.apply_fn(), specs(bits), specs(bits, clip=True)
    recipe = jc.quantize.recipe(spec)
    few = data[: max(args.samples // BATCH, 1)]
    found = {"rtn": jc.quantize.round_to_nearest(fn, params, few, spec)}
    track = lambda layers: report.progress(layers, f"GPTQ, int{bits}")
    found["gptq"] = jc.quantize.gptq(fn, params, few, clipped, sweeps=args.sweeps, progress=track)
    found["tuned"] = jc.quantize.reconstruct(
        fn,
        params,
        data,
        clipped,
        quantized=found["gptq"],
        distance=functools.partial(jc.distill.kd, temperature=1.0),
        epochs=1 if args.short else args.epochs,
        learning_rate=args.learning_rate,
        progress=lambda epochs: report.progress(epochs, f"tuning, int{bits}"),
    )
    views = {f"{name}_w{bits}g{GROUP}": recipe.apply(*pair) for name, pair in found.items()}
    return {**views, "bits_per_weight": bits_per_weight(recipe, found["tuned"])}


def eight_bits(args: Args, params: Any, data: list) -> tuple[Any, Any]:
    """int8 weights per output channel, and the grids of the activations."""
    eight = jc.formats.integer(8)
    spec = {".*kernel": Spec(eight), ".*embedding": Spec(eight, axis=0)}
    fn = llama.apply_fn()
    view = jc.quantize.recipe(spec).apply(*jc.quantize.round_to_nearest(fn, params, data, spec))
    quantizer = jc.quantize.activations(
        fn,
        jc.formats.integer(8, symmetric=False),
        calibrate=jc.quantize.percentile(args.percentile),
        sites=KERNELS,
    )
    return jc.quantize.calibrate_activations(quantizer, view, data), view


def main(args: Args, report: Report) -> dict[str, Any]:
    """Evaluates every variant."""
    params, fn = stories260k.load_pretrained(), llama.apply_fn()
    texts = stories.load_stories()[: 16 if args.short else None]
    data = samples(args, params)
    rows: list[tuple[str, float, float]] = []
    figures: dict[str, Any] = {}

    def note(name: str, predict: Any) -> None:
        loss = float(stories.mean_loss(predict, texts))
        rows.append((name, loss, loss - rows[0][1] if rows else 0.0))
        figures[f"{name}_loss_nats"] = loss
        if len(rows) > 1:
            figures[f"{name}_increase_nats"] = rows[-1][2]
        report.console.print(f"{name}: {loss:.4f}")

    note("float32", jax.tree_util.Partial(fn, params))
    note("kv8", jax.tree_util.Partial(llama.apply_fn(kv_format=jc.formats.integer(8)), params))
    grids, view = eight_bits(args, params, data[: max(args.samples // BATCH, 1)])
    note("w8a8", jax.tree_util.Partial(jc.quantize.with_activations(fn), grids, view))
    for bits in (4, 3):
        found = low_bits(args, report, bits, params, data)
        figures[f"w{bits}_bits_per_weight"] = found.pop("bits_per_weight")
        for name, view in found.items():
            note(name, jax.tree_util.Partial(fn, view))
        best = min(figures[f"{name}_increase_nats"] for name in found)
        figures[f"w{bits}g{GROUP}_increase_nats"] = best
    report.table("stories260K", ("variant", "loss, nats", "increase"), rows)
    return figures


def bits_per_weight(recipe: jc.Compressor, found: Any) -> float:
    """Packed bits over all parameters, scales included."""
    packed = recipe.pack(*found)
    return 8 * jc.packed_bytes(packed) / sum(w.size for w in jax.tree.leaves(found[0]))


if __name__ == "__main__":
    run(main, "ptq_lm")
