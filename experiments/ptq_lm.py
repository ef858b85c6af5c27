"""Question: what do 8, 4 and 3 bits cost a small language model, rounded to nearest and with GPTQ?

    python -m experiments.ptq_lm

stories260K (Llama type, 260,032 parameters) on the 790 validation stories of TinyStories, mean
next-token loss in nats. Calibration sees no story: the model's own samples, drawn by the seed.
Weights are symmetric integers in groups of 32 inputs; w8a8 has one scale per output channel and one
asymmetric grid per activation; the KV cache has one scale per token and head. The table of tokens,
which is also the head, is quantized like the other weights. Minutes on two CPU cores, no download.
Result: experiments/results/ptq_lm.json.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import stories
from experiments._report import Options, Report, run
from experiments.models import llama, stories260k
from jaxcompress.quantize import Spec

KERNELS = ".*(kernel|embedding)"
GROUP = 32


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    samples: int = 32
    """Texts that the model writes for calibration."""
    length: int = 256
    """Tokens of each."""
    sweeps: int = 4
    """Passes of coordinate descent after GPTQ."""


def specs(bits: int) -> dict[str, Spec]:
    """Weights [in, out] in groups of inputs; the table [tokens, dim] in groups of its rows."""
    format = jc.formats.integer(bits)
    return {".*kernel": Spec(format, group=GROUP), ".*embedding": Spec(format, axis=0, group=GROUP)}


def main(args: Args, report: Report) -> dict[str, Any]:
    """Evaluates every variant."""
    params = stories260k.load_pretrained()
    fn, texts = llama.apply_fn(), stories.load_stories()
    if args.short:
        texts = texts[:16]
    samples = 4 if args.short else args.samples
    drawn = stories.calibration_tokens(params, samples, length=args.length, seed=args.seed)
    data = [(jnp.asarray(rows),) for rows in np.split(np.asarray(drawn), max(samples // 4, 1))]
    rows: list[tuple[str, float, float]] = []
    figures: dict[str, Any] = {}

    def note(name: str, predict: Any) -> float:
        loss = float(stories.mean_loss(predict, texts))
        rows.append((name, loss, loss - rows[0][1] if rows else 0.0))
        figures[f"{name}_loss_nats"] = loss
        if len(rows) > 1:
            figures[f"{name}_increase_nats"] = rows[-1][2]
        report.console.print(f"{name}: {loss:.4f}")
        return loss

    note("float32", jax.tree_util.Partial(fn, params))
    eight = jc.formats.integer(8)
    note("kv8", jax.tree_util.Partial(llama.apply_fn(kv_format=eight), params))
    for bits in (8, 4, 3):
        spec = specs(bits) if bits < 8 else {KERNELS: Spec(eight)}
        recipe = jc.quantize.recipe(spec)
        methods = {"rtn": jc.quantize.round_to_nearest(fn, params, data, spec)}
        if bits < 8:
            track = lambda layers, bits=bits: report.progress(layers, f"GPTQ, int{bits}")
            methods["gptq"] = jc.quantize.gptq(
                fn, params, data, spec, sweeps=args.sweeps, progress=track
            )
        for method, (found, state) in methods.items():
            view = recipe.apply(found, state)
            if bits < 8:
                note(f"{method}_w{bits}g{GROUP}", jax.tree_util.Partial(fn, view))
                continue
            activations = jc.formats.integer(8, symmetric=False)
            quantizer = jc.quantize.activations(fn, activations, sites=KERNELS)
            grids = jc.quantize.calibrate_activations(quantizer, view, data)
            both = jc.quantize.with_activations(fn)
            note("w8a8", jax.tree_util.Partial(both, grids, view))
        figures[f"w{bits}_bits_per_weight"] = bits_per_weight(recipe, methods["rtn"])
    report.table("stories260K", ("variant", "loss, nats", "increase"), rows)
    return figures


def bits_per_weight(recipe: jc.Compressor, found: Any) -> float:
    """Packed bits over all parameters, scales included."""
    packed = recipe.pack(*found)
    return 8 * jc.packed_bytes(packed) / sum(w.size for w in jax.tree.leaves(found[0]))


if __name__ == "__main__":
    run(main, "ptq_lm")
