"""Does a network computed with fewer channels equal the masked one, and how much faster is it?

Command   python -m experiments.benchmarks.shrink --json

Every architecture of `experiments.models.shrinkable` loses a random half of the channels of every
group that can be cut without a trace; masked and shrunk outputs are compared, relative to the
largest output. Then a ResNet-20 of width 16 is run on images of 32 x 32 as it is, masked, and
shrunk. The limit is the same network built at width 8 (`rebuilt_s`): it has a quarter of the
multiply-accumulates, but half the activations to read and write.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments._report import Options, Report, run
from experiments.models.resnet_cifar import ResNetCifar
from experiments.models.shrinkable import NETWORKS, Network, images, linen
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.graph.coupling.dependency_graph import Axes, axes
from jaxcompress.prune.channels.choose import choose_groups, group_macs
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.smaller_networks import Shrunk, shrink
from jaxcompress.prune.masking.mask_state import apply_masks

SHORT = ("mlp", "separable")


@dataclasses.dataclass(frozen=True)
class Args(Options):
    batch: int = 64
    """Images that are timed at once."""
    repeats: int = 15
    """Rounds of timing; the median counts."""


def halved(network: Network, found: Axes, seed: int) -> tuple[object, Shrunk]:
    """The parameters masked to a random half of each group, and the shrunk network."""
    rng = np.random.default_rng(seed)
    exact = [group for group in found.groups.values() if not group.inexact]
    kept = choose_groups({group.name: rng.random(group.size) for group in exact}, 0.5)
    masked = apply_masks(network.params, group_masks(found, kept))
    return masked, shrink(network.apply, network.params, kept, network.inputs, axes=found)


def compare(network: Network, seed: int) -> tuple[float, Shrunk]:
    """The largest difference of masked and shrunk outputs over the largest masked output."""
    found = axes(network.apply, network.params, *network.inputs)
    masked, small = halved(network, found, seed)
    wanted = jax.jit(network.apply)(masked, *network.inputs)
    given = jax.jit(small.fn)(small.params, *network.inputs)
    return float(jnp.max(jnp.abs(given - wanted)) / jnp.max(jnp.abs(wanted))), small


def speed(args: Args) -> dict[str, float]:
    """Seconds of ResNet-20 dense, masked and shrunk, and how many MACs are left."""
    batch = 2 if args.short else args.batch
    network = linen(ResNetCifar(20), images(32, batch))
    found = axes(network.apply, network.params, *network.inputs)
    masked, small = halved(network, found, args.seed)
    rebuilt = linen(ResNetCifar(20, width=8), *network.inputs)
    dense_fn, small_fn, rebuilt_fn = map(jax.jit, (network.apply, small.fn, rebuilt.apply))
    seconds = interleaved(
        {
            "dense_s": lambda: dense_fn(network.params, *network.inputs),
            "masked_s": lambda: dense_fn(masked, *network.inputs),
            "shrunk_s": lambda: small_fn(small.params, *network.inputs),
            "rebuilt_s": lambda: rebuilt_fn(rebuilt.params, *network.inputs),
        },
        repeats=2 if args.short else args.repeats,
    )
    macs = group_macs(found, {}), group_macs(found, small.report.kept)
    return {**seconds, "macs_ratio": macs[0] / macs[1]}


def main(args: Args, report: Report) -> dict:
    if args.batch < 2:
        raise ValueError(f"--batch must be at least 2, got {args.batch}")
    errors: dict[str, float] = {}
    rows = []
    for name in report.progress(SHORT if args.short else tuple(NETWORKS), "comparing"):
        errors[name], small = compare(NETWORKS[name](), args.seed)
        kept = small.report.kept
        rows.append(
            (name, len(kept), small.report.params_before, small.report.params, errors[name])
        )
        if not errors[name] < 1e-5:
            raise RuntimeError(f"{name}: masked and shrunk outputs differ by {errors[name]:.2g}")
    report.table(
        "half the channels", ("network", "groups", "parameters", "shrunk", "relative error"), rows
    )
    figures = speed(args)
    return {
        **figures,
        "half_channels_speedup": figures["dense_s"] / figures["shrunk_s"],
        "masked_speedup": figures["dense_s"] / figures["masked_s"],
        "speedup_limit": figures["dense_s"] / figures["rebuilt_s"],
        "architectures": len(errors),
        "max_relative_error": max(errors.values()),
        "batch": args.batch,
    }


if __name__ == "__main__":
    run(main, "shrink")
