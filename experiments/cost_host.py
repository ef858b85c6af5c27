"""Does the measured device file of this CPU predict the latency of a network it has not seen?

    python -m experiments.cost_host            (a minute, no download)

Measures the CPU into a device file as `python -m jaxcompress.cost.host` does, predicts float32
ResNet-20 of widths 1, 0.75, 0.5 and 0.25 for one CIFAR image from it, and compares with medians of
their times, taken in the same rounds.
Two widths count as ranked if their measured medians differ by more than 5 %.
"""

import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path

import jax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.models.zoo import DeepResNetCifar
from jaxcompress.cost.host import measure
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.cost.timing.probes import timings

WIDTHS = (1.0, 0.75, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    device: Path | None = None
    """A device file that was measured before."""
    repeats: int = 60
    """Rounds of timing."""


def main(args: Args, report: Report) -> dict:
    """Times device and networks, predicts, compares."""
    repeats = 3 if args.short else args.repeats
    x = jax.random.normal(jax.random.key(args.seed), (1, 32, 32, 3))
    calls, estimates = {}, {}
    for width in WIDTHS:
        model = DeepResNetCifar(20, width=round(16 * width))
        variables = model.init(jax.random.key(args.seed), x, train=False)
        apply_fn = jax.jit(lambda v, x, model=model: model.apply(v, x, train=False))
        calls[f"{width:g}"] = lambda fn=apply_fn, v=variables: fn(v, x)
        estimates[f"{width:g}"] = functools.partial(jc.cost.estimate, apply_fn, variables, x)
    device, measured = measured_device(args, calls, repeats)
    costs = {width: estimate(device=device) for width, estimate in estimates.items()}
    errors = {w: costs[w].latency_s / measured[w] - 1 for w in calls}
    pairs = list(itertools.combinations(calls, 2))
    apart = [(a, b) for a, b in pairs if abs(measured[a] / measured[b] - 1) > 0.05]
    ranked = [
        (costs[a].latency_s > costs[b].latency_s) == (measured[a] > measured[b]) for a, b in apart
    ]
    rows = [(w, measured[w] * 1e3, costs[w].latency_s * 1e3, 100 * errors[w]) for w in calls]
    report.table("ResNet-20", ("width", "measured, ms", "predicted, ms", "error, %"), rows)
    figures: dict = {}
    for w in calls:
        key = f"width_{round(100 * float(w))}"
        figures |= {f"{key}_measured_s": measured[w], f"{key}_predicted_s": costs[w].latency_s}
    return {
        **figures,
        "largest_error": max(map(abs, errors.values())),
        "ranked_pairs": len(apart),
        "ranked_pairs_correct": sum(ranked),
        "processor": device.description.partition(";")[0],
    }


def measured_device(
    args: Args, calls: dict, repeats: int
) -> tuple[jc.cost.Device, dict[str, float]]:
    """The device of --device, else measured now in the rounds that time the networks."""
    if args.device is not None:
        return jc.cost.device(args.device), interleaved(calls, repeats=repeats)
    found = timings(repeats=repeats, short=args.short, beside=calls)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "host.toml"
        file.write_text(measure(found=found))
        return jc.cost.device(file), found.beside


if __name__ == "__main__":
    run(main, "cost_host")
