"""Question: are the MACs and parameters counted here those that are published?

    python -m experiments.count

Counts the multiply-accumulates (MACs) and the parameters of published networks from shapes alone,
for a batch of one, and compares them with the figures printed by others (`source` of each network
in experiments/models/zoo.py). A figure printed with few digits is met if the count rounds to them.
Products with padding count, as everywhere; those of squeeze-and-excitation and inside the attention
too. Fails if one network differs. FLOPs without padding are compared with XLA's count of the
lowered program, which spells out erf and logistic functions as polynomials and counts those.
Arenas are of int8 inference by liveness, without additions in place. A minute on two CPU cores; no
weights are allocated.
Result: experiments/results/count.json.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.models.zoo import ZOO, Network
from jaxcompress.graph import trace

TINY = ("resnet8", "ds_cnn", "mobilenet_v1_025", "autoencoder")
SHORT_PARAMS = 300_000  # `--short` leaves larger networks out


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Only what every experiment takes."""


class Count(NamedTuple):
    """MACs of a batch of one, parameters, and whether they are the published ones."""

    macs: int
    params: int
    equal: bool


def count(network: Network) -> Count:
    """Counts one network; a figure that nobody prints is not compared.

    >>> from experiments.models.zoo import ZOO
    >>> count(ZOO["ds_cnn"])
    Count(macs=2656768, params=23756, equal=True)
    """
    apply_fn, variables, inputs = network.build()
    macs = trace(apply_fn, variables, *inputs).macs
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    equal = network.published_params.equals(params)
    if network.published_macs is not None:
        equal = equal and network.published_macs.equals(macs)
    return Count(macs, params, equal)


def flops_over_xla(network: Network) -> float:
    """FLOPs without padding over those that XLA counts in the lowered program."""
    apply_fn, variables, inputs = network.build()
    flops = jc.cost.counts(apply_fn, variables, *inputs, fold=False).valid_flops
    lowered: Any = jax.jit(apply_fn).lower(variables, *inputs).cost_analysis()
    return flops / lowered["flops"]


def arena_bytes(network: Network) -> int:
    """Peak bytes of activations in int8."""
    apply_fn, variables, inputs = network.build()
    cost = jc.cost.estimate(
        apply_fn, variables, *inputs, device="stm32l4r5", activations=8, fusion="activation"
    )
    return cost.peak_bytes


def seconds_to_cost(network: Network) -> float:
    """How long an estimate takes."""
    apply_fn, variables, inputs = network.build()
    start = time.perf_counter()
    jc.cost.estimate(apply_fn, variables, *inputs, device="h100")
    return time.perf_counter() - start


def input_text(network: Network) -> str:
    """The shapes of the inputs without the batch: '224x224x3', or '3 x 128' for three alike."""
    first, *others = network.inputs
    text = "x".join(str(size) for size in first.shape[1:])
    return f"{1 + len(others)} x {text}" if others else text


def main(args: Args, report: Report) -> dict[str, Any]:
    networks = {
        key: network
        for key, network in ZOO.items()
        if not args.short or network.published_params.value <= SHORT_PARAMS
    }
    counts = {key: count(network) for key, network in report.progress(networks.items(), "networks")}
    ratios = {key: flops_over_xla(network) for key, network in networks.items()}
    rows = []
    for key, network in networks.items():
        macs, params, equal = counts[key]
        cells = f"{macs:,}", network.macs or "-", f"{params:,}", network.params
        verdict = "yes" if equal else "NO"
        rows.append((network.name, input_text(network), *cells, verdict, f"{ratios[key]:.4f}"))
    report.table(
        "MACs and parameters",
        ("network", "input", "MACs", "published", "parameters", "published", "equal", "FLOPs/XLA"),
        rows,
    )
    differ = [networks[key].name for key, found in counts.items() if not found.equal]
    if differ:
        raise ValueError(f"not as published: {', '.join(differ)}")
    figures: dict[str, Any] = {}
    for key, found in counts.items():
        figures |= {f"{key}_macs": found.macs, f"{key}_params": found.params}
        figures[f"{key}_flops_over_xla"] = ratios[key]
    for key in TINY:
        figures[f"{key}_arena_bytes"] = arena_bytes(ZOO[key])
    as_xla = [abs(ratio - 1) < 1e-3 for ratio in ratios.values()]
    return figures | {
        "networks_equal_to_xla": sum(as_xla),
        "gpt2_small_cost_s": seconds_to_cost(ZOO["gpt2_small"]),
        "networks": len(counts),
        "networks_equal": sum(c.equal for c in counts.values()),
    }


if __name__ == "__main__":
    run(main, "count")
