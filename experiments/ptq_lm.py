"""Question: what do 8, 4 and 3 bits cost a small language model, and how much does tuning win back?

    python -m experiments.ptq_lm

stories260K (Llama type, 260,032 parameters) on the 790 validation stories of TinyStories, mean
next-token loss in nats. Calibration sees no story: the model's own samples, drawn by the seed.
Weights are integers in groups of 32 inputs, symmetric (int) or with a zero point (uint): rtn
(rounded to nearest), gptq (on least squares ranges) and tuned (from gptq of uint4, all float
parameters and scales tuned until the quantized network's distribution is the float network's, on
more samples). w8a8: SmoothQuant, then weights with one scale per output channel and one asymmetric
grid per activation, its range by least squares. The KV cache has one scale per token and head. The
table of tokens, which is also the head, is quantized like the other weights. How many texts, epochs
and which learning rate tune best was found on the same 790 stories, which are all there are.
A quarter of an hour on two CPU cores, no download.
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
TUNED = (4, False)  # bits, symmetric


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    samples: int = 32
    """Texts of 512 tokens that the model writes for calibration."""
    tuning_samples: int = 384
    """Texts of 512 tokens that it writes for tuning."""
    sweeps: int = 4
    """Passes of coordinate descent after GPTQ."""
    epochs: int = 8
    """Passes of tuning."""
    learning_rate: float = 3e-4
    """Of tuning, at its start."""
    alpha: float = 0.7
    """Share of the range of activations that SmoothQuant moves into the weights."""


def specs(format: jc.formats.Format, *, clip: bool = False) -> dict[str, Spec]:
    """Weights [in, out] in groups of inputs; the table [tokens, dim] in groups of its rows."""
    of = functools.partial(Spec, format, group=GROUP, calibrate=jc.quantize.mse() if clip else None)
    return {".*kernel": of(), ".*embedding": of(axis=0)}


def texts(args: Args, params: Any, count: int, length: int, *, size: int) -> list[tuple[jax.Array]]:
    """Batches of texts that the model writes."""
    count, length = (2 * size, 64) if args.short else (count, length)
    drawn = stories.calibration_tokens(params, count, length=length, seed=args.seed)
    return [(jnp.asarray(drawn[i : i + size]),) for i in range(0, count, size)]


class Case:
    """The network with its calibration; weights by format and method."""

    def __init__(self, args: Args, report: Report, params: Any):
        self.args, self.report, self.params = args, report, params
        self.fn = llama.apply_fn()
        self.data = texts(args, params, args.samples, 512, size=4)

    def rounded(self, format: jc.formats.Format) -> Any:
        """Rounded to nearest, (params, state)."""
        return jc.quantize.round_to_nearest(self.fn, self.params, self.data, specs(format))

    def gptq(self, format: jc.formats.Format) -> Any:
        """GPTQ on least squares ranges, (params, state)."""
        track = lambda layers: self.report.progress(layers, f"GPTQ, {format.name}")
        spec, sweeps = specs(format, clip=True), self.args.sweeps
        return jc.quantize.gptq(
            self.fn, self.params, self.data, spec, sweeps=sweeps, progress=track
        )

    def tuned(self, format: jc.formats.Format, start: Any) -> Any:
        """All parameters and scales tuned from `start`, (params, state)."""
        args = self.args
        return jc.quantize.reconstruct(
            self.fn,
            self.params,
            texts(args, self.params, args.tuning_samples, 512, size=4),
            specs(format, clip=True),
            quantized=start,
            distance=functools.partial(jc.distill.kd, temperature=1.0),
            epochs=1 if args.short else args.epochs,
            learning_rate=args.learning_rate,
            scales=True,
            progress=lambda epochs: self.report.progress(epochs, f"tuning, {format.name}"),
        )

    def eight_bits(self) -> tuple[Any, Any]:
        """The grids of the activations, and int8 weights per output channel."""
        eight = jc.formats.integer(8)
        spec = {".*kernel": Spec(eight)}
        smooth, _ = jc.quantize.smooth_quant(
            self.fn, self.params, self.data, spec, alpha=self.args.alpha
        )
        recipe = jc.quantize.recipe({**spec, ".*embedding": Spec(eight, axis=0)})
        view = recipe.apply(smooth, recipe.init(smooth))
        quantizer = jc.quantize.activations(
            self.fn,
            jc.formats.integer(8, symmetric=False),
            calibrate=jc.quantize.mse(),
            sites=KERNELS,
        )
        return jc.quantize.calibrate_activations(quantizer, view, self.data), view


def main(args: Args, report: Report) -> dict[str, Any]:
    """Evaluates every variant."""
    params, fn = stories260k.load_pretrained(), llama.apply_fn()
    validation = stories.load_stories()[: 16 if args.short else None]
    case = Case(args, report, params)
    rows: list[tuple[str, float, float]] = []
    figures: dict[str, Any] = {}

    def note(name: str, predict: Any) -> None:
        loss = float(stories.mean_loss(predict, validation))
        rows.append((name, loss, loss - rows[0][1] if rows else 0.0))
        figures[f"{name}_loss_nats"] = loss
        if len(rows) > 1:
            figures[f"{name}_increase_nats"] = rows[-1][2]
        report.console.print(f"{name}: {loss:.4f}")

    note("float32", jax.tree_util.Partial(fn, params))
    note("kv8", jax.tree_util.Partial(llama.apply_fn(kv_format=jc.formats.integer(8)), params))
    both = jc.quantize.with_activations(fn)
    note("w8a8", jax.tree_util.Partial(both, *case.eight_bits()))
    for bits in (4, 3):
        names = []
        for symmetric in (True, False):
            format = jc.formats.integer(bits, symmetric=symmetric)
            recipe = jc.quantize.recipe(specs(format))
            found = {"rtn": case.rounded(format), "gptq": case.gptq(format)}
            if (bits, symmetric) == TUNED:
                found["tuned"] = case.tuned(format, found["gptq"])
            for method, pair in found.items():
                names.append(f"{method}_{format.name}g{GROUP}")
                note(names[-1], jax.tree_util.Partial(fn, recipe.apply(*pair)))
            key = f"{format.name}g{GROUP}_bits_per_weight"
            figures[key] = bits_per_weight(recipe, found["gptq"])
        best = min(figures[f"{name}_increase_nats"] for name in names)
        figures[f"w{bits}g{GROUP}_increase_nats"] = best
    report.table("stories260K", ("variant", "loss, nats", "increase"), rows)
    return figures


def bits_per_weight(recipe: jc.Compressor, found: Any) -> float:
    """Packed bits over all parameters, scales included."""
    packed = recipe.pack(*found)
    return 8 * jc.packed_bytes(packed) / sum(w.size for w in jax.tree.leaves(found[0]))


if __name__ == "__main__":
    run(main, "ptq_lm")
