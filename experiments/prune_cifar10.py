"""Question: how much of a trained CIFAR-10 ResNet can go, if it is fine-tuned afterwards?

    python -m experiments.prune_cifar10 --json

ResNet-20 and -32 from the trained weights, 10,000 test images. Pruned in one shot, then fine-tuned,
BatchNorm over the batches, on the training images (shifted and mirrored at random) against the
labels and the dense network, by SGD with Nesterov momentum and a cosine learning rate; three seeds
of batches and random masks. Variants:
  unstructuredR  R % of all weights zero: so many of each layer as have the lowest LAMP scores of
                 all layers together (plain magnitudes empty whole layers), chosen by SparseGPT, the
                 others fitted to the outputs of the dense network on 512 images;
                 randomR: at random in the shares of ERK, the others fitted by least squares
  channelsR      R % fewer MACs: inside every block the channels are cut out that the convolution
                 behind them can best do without, so many of each block that the outputs on 512
                 images change least (`search.WidthChoice`), that convolution fitted in the same
                 way, and the module built again with its new widths;
                 randomchannelsR: channels at random, the same share of every block
All are fine-tuned for `--epochs`; channels50 and unstructured80 for `--long-epochs` too (ResNet-20:
three seeds, ResNet-32: one), and so is random80 (ResNet-20, one seed). Those carry the plain names,
the short runs of all "tuned_" before theirs. "cut_": before any fine-tuning. An epoch of ResNet-20
with all its channels takes four to eight minutes on one CPU core. Every run is kept in --out, and
not repeated when it is given again; processes with a core and a part of --variants each may share
it.
Result: experiments/results/prune_cifar10.json.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments._runs import Runs
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from experiments.training import fit, mirror_augment
from jaxcompress.graph import axes
from jaxcompress.prune.channels.choose import group_macs, groups_for_macs
from jaxcompress.prune.channels.coupled import group_masks
from jaxcompress.prune.channels.smaller_networks import shrink

UNSTRUCTURED = (50, 70, 80, 90, 95)
CHANNELS = (20, 35, 50, 65, 80)
CONTROL = "random80"
LONG = ("channels50", "unstructured80", CONTROL)


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    depths: tuple[int, ...] = (20, 32)
    """Which ResNets."""
    seeds: int = 3
    """Seeds of batches and random choices."""
    epochs: float = 0.2
    """Epochs, or a part of one, for every variant."""
    long_epochs: float = 12
    """Epochs for the variants of the headline."""
    long_seeds: tuple[int, ...] = (3, 1)
    """How many of the seeds, for each of --depths, 0 if none; the control: one, of the first."""
    learning_rate: float = 0.05
    """At the start; it falls to 0 along a cosine."""
    variants: tuple[str, ...] = ()
    """Only these, unstructured80 say; none: all."""


class Network:
    """A trained network, its data, and what pruning does to it."""

    def __init__(self, args: Args, report: Report, depth: int):
        self.args, self.report, self.depth = args, report, depth
        self.fn = resnet_cifar.standard_apply_fn(depth)
        self.variables = jax.tree.map(jnp.asarray, resnet_cifar.load_pretrained(depth))
        self.train, self.test = load_cifar10("train"), load_cifar10("test")
        if args.short:
            (x, y), (u, v) = self.train, self.test
            self.train, self.test = (x[:256], y[:256]), (u[:200], v[:200])
        example = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        self.example = example
        self.found = axes(self.fn, self.variables, example)
        # Channels of the residual stream stay: every block reads them.
        self.inner = [name for name in self.found.groups if re.search(r"layer\d_\d/conv1/", name)]
        self.masked_steps: dict[float, Any] = {}
        self.choices: dict[int, jc.search.WidthChoice] = {}

    def accuracy(self, fn: Callable, variables: Any) -> float:
        """Top-1 on the test images in percent."""
        return top1(jax.tree_util.Partial(_normalised(fn), variables), *self.test)

    def total_steps(self, epochs: float) -> int:
        """Batches in so many epochs."""
        return max(1, round(epochs * (len(self.train[0]) // self._batch())))

    def _batch(self) -> int:
        return 64 if self.args.short else 128

    def optimizer(self, epochs: float) -> optax.GradientTransformation:
        """SGD, its learning rate a cosine over all epochs."""
        rate = optax.cosine_decay_schedule(self.args.learning_rate, self.total_steps(epochs))
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(1e-4),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )

    def step(self, model: Any, tx: Any, recipe: jc.Compressor) -> Any:
        """One step of training against labels and the dense network; BatchNorm sees the batch."""

        def forward(params, statistics, images):
            variables = {"params": params, "batch_stats": statistics}
            x = cifar10_normalise(images)
            logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        forward = jc.train.fast_kernel_gradients(forward)
        return jc.train.make_step(forward, tx, recipe=recipe, teacher=_normalised(self.fn))

    def tuned(self, step: Any, state: Any, epochs: float, seed: int, name: str) -> Any:
        """The variables after fine-tuning."""
        total = self.total_steps(epochs)
        what = f"ResNet-{self.depth} {name}"
        state = fit(
            step,
            state,
            self.train,
            size=self._batch(),
            steps=total,
            teacher_params=self.variables,
            seed=seed,
            augment=mirror_augment,
            progress=lambda steps: self.report.progress(steps, what, total=total),
        )
        return {"params": state.params, "batch_stats": state.model_state}

    def masked(self, kind: str, ratio: int, epochs: float, seed: int) -> dict[str, float]:
        """Weights zero, wherever they are."""
        share, params = jc.prune.one_shot(ratio / 100), self.variables["params"]
        if kind == "random":
            chosen = jc.prune.random(share, key=jax.random.key(seed), scope=jc.prune.erk())
        else:
            chosen = jc.prune.lamp(share)
        masks = jc.prune.masks(chosen.init(params), params)
        given = jax.tree.map(lambda _: jnp.ones((), bool), self.variables)
        if kind == "random":
            given, shares = given | {"params": masks}, {".*kernel": 0.0}
        else:
            shares = {
                f"params/{path}": float(1 - mask.mean())
                for path, mask in jc.core.leaves_with_paths(masks)
                if mask.ndim
            }
        variables, pruned = self.compensated(given, shares, seed)
        recipe = jc.prune.fixed(pruned.buffers.masks["params"])
        tx = jc.prune.masked_optimizer(self.optimizer(epochs))
        if epochs not in self.masked_steps:  # masks lie in the state: one program for all of them
            model = resnet_cifar.ResNetCifar(self.depth)
            self.masked_steps[epochs] = self.step(model, tx, recipe)
        state = jc.train.create(
            variables["params"], recipe, tx, model_state=variables["batch_stats"]
        )
        before = self.accuracy(self.fn, variables)
        step = self.masked_steps[epochs]
        variables = self.tuned(step, state, epochs, seed, f"{kind}{ratio}, seed {seed}")
        row = {"cut": before, "tuned": self.accuracy(self.fn, variables)}
        return {**row, "sparsity": 100 * jc.prune.sparsity_of(variables["params"])}

    def shrunk(self, kind: str, ratio: int, epochs: float, seed: int) -> dict[str, float]:
        """Channels cut out, the module built again with its new widths, and fine-tuned."""
        if kind == "randomchannels":
            rng = np.random.default_rng(seed)
            scores = {name: rng.random(self.found.groups[name].size) for name in self.inner}
            kept = groups_for_macs(self.found, scores, 1 - ratio / 100)
        else:
            kept = self.widths(seed).best(1 - ratio / 100)
        masks = group_masks(self.found, kept)
        variables, _ = self.compensated(masks, {".*_[0-9]/conv2/kernel": 0.0}, seed)
        _, small, _ = shrink(self.fn, variables, kept, self.example, axes=self.found)
        params = small["params"]
        blocks = [params[name] for name in sorted(params) if name.startswith("layer")]
        widths = tuple(block["conv1"]["kernel"].shape[-1] for block in blocks)
        model = resnet_cifar.ResNetCifar(self.depth, inner=widths)
        before = self.accuracy(model.apply, small)
        tx, recipe = self.optimizer(epochs), jc.identity()
        state = jc.train.create(params, recipe, tx, model_state=small["batch_stats"])
        step = self.step(model, tx, recipe)
        variables = self.tuned(step, state, epochs, seed, f"{kind}{ratio}, seed {seed}")
        macs = 100 * group_macs(self.found, kept) / group_macs(self.found, {})
        sizes = [
            sum(w.size for w in jax.tree.leaves(tree["params"])) for tree in (small, self.variables)
        ]
        row = {"cut": before, "tuned": self.accuracy(model.apply, variables), "macs": macs}
        return {**row, "params": 100 * sizes[0] / sizes[1]}

    def compensated(self, masks: Any, shares: dict[str, float], seed: int) -> Any:
        """With shares of zeros, the rest fitted to what they and the masks leave; their state."""
        return jc.prune.sparse_gpt(
            self.fn, self.variables, self.calibration(seed), shares, masks=masks, sweeps=2
        )

    def calibration(self, seed: int) -> list[tuple[jax.Array]]:
        """Training images, 512 of them."""
        count = 64 if self.args.short else 512
        rows = np.random.default_rng(seed).choice(len(self.train[0]), count)
        return [(cifar10_normalise(self.train[0][part]),) for part in np.split(rows, 2)]

    def widths(self, seed: int) -> jc.search.WidthChoice:
        """What every width of every block costs, measured at the first call."""
        if seed not in self.choices:
            self.choices[seed] = jc.search.WidthChoice(
                self.found,
                self.fn,
                self.variables,
                self.calibration(seed),
                of=self.inner,
                levels=4 if self.args.short else 16,
                progress=lambda jobs: self.report.progress(jobs, f"ResNet-{self.depth} widths"),
            )
        return self.choices[seed]

    def variant(self, name: str, epochs: float, seed: int) -> dict[str, float]:
        """One run by its name."""
        kind = kind_of(name)
        method = self.shrunk if kind.endswith("channels") else self.masked
        return method(kind, int(name.removeprefix(kind)), epochs, seed)


def _normalised(fn: Callable) -> Callable:
    return lambda params, images: fn(params, cifar10_normalise(images))


def kind_of(name: str) -> str:
    """A variant without its ratio."""
    return name.rstrip("0123456789")


def names(args: Args) -> tuple[str, ...]:
    """All variants that are asked for."""
    masked = [f"{kind}{r}" for kind in ("unstructured", "random") for r in UNSTRUCTURED]
    cut = [f"{kind}{r}" for kind in ("channels", "randomchannels") for r in CHANNELS]
    known = (*masked, *cut)
    if args.short:
        known = LONG
    unknown = set(args.variants) - set(known)
    if unknown:
        raise ValueError(f"unknown --variants {sorted(unknown)}; known: {', '.join(known)}")
    return tuple(args.variants) or known


def key_of(args: Args, depth: int, name: str, epochs: float, seed: int) -> str:
    """All settings of a run."""
    key = f"resnet{depth} {name} epochs={epochs:g} rate={args.learning_rate} seed={seed}"
    return key + " short" * args.short


def main(args: Args, report: Report) -> dict[str, Any]:
    """All networks, variants and seeds."""
    if args.seeds < 1 or min(args.epochs, args.long_epochs) <= 0:
        raise ValueError("--seeds, --epochs and --long-epochs must be positive")
    if min(args.long_seeds, default=0) < 0:
        raise ValueError(f"--long-seeds must not be negative, got {args.long_seeds}")
    chosen, runs = names(args), Runs(args.out, "prune_cifar10", report)
    epochs, long_epochs = (1, 2) if args.short else (args.epochs, args.long_epochs)
    seeds = range(args.seed, args.seed + (1 if args.short else args.seeds))
    figures: dict[str, Any] = {}
    for place, depth in enumerate(args.depths[:1] if args.short else args.depths):
        network = Network(args, report, depth)
        prefix = "" if depth == 20 else f"resnet{depth}_"
        dense = network.accuracy(network.fn, network.variables)
        figures[f"{prefix}float32_top1_percent"] = dense
        many = args.long_seeds[place] if place < len(args.long_seeds) else 0
        long = dict.fromkeys(LONG, many) | {CONTROL: min(many, int(place == 0))}
        plans = [(name, "", long_epochs) for name in chosen if long.get(name)]
        plans += [(name, "tuned_", epochs) for name in chosen]
        # Seed by seed, so that what is there after some hours is a whole experiment.
        found = {plan: [] for plan in plans}
        for seed in seeds:
            for plan in plans:
                name, stage, passes = plan
                if not stage and seed - args.seed >= long[name]:
                    continue
                compute = functools.partial(network.variant, name, passes, seed)
                key = key_of(args, depth, name, passes, seed)
                found[plan].append(runs.get(key, compute))
        figures |= summary(prefix, found)
        show(report, depth, dense, found)
        if args.out is not None:
            draw(args.out / f"prune_cifar10_{depth}.png", depth, dense, found)
    return figures


def summary(prefix: str, found: dict[tuple[str, str, float], list[dict[str, float]]]) -> dict:
    """Means and deviations over the seeds."""
    figures: dict[str, Any] = {}
    for (name, stage, _), rows in found.items():
        tuned = [row["tuned"] for row in rows]
        figures[f"{prefix}{stage}{name}_top1_percent"] = float(np.mean(tuned))
        if len(tuned) > 1:
            figures[f"{prefix}{stage}{name}_std_percent"] = deviation(tuned)
        if stage:
            cut = float(np.mean([row["cut"] for row in rows]))
            figures[f"{prefix}cut_{name}_top1_percent"] = cut
        for key in {"macs", "sparsity"} & set(rows[0]):
            figures[f"{prefix}{name}_{key}_percent"] = float(np.mean([row[key] for row in rows]))
    return figures


def deviation(values: list[float]) -> float:
    """Of a sample; 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def show(report: Report, depth: int, dense: float, found: dict) -> None:
    """A table of all runs."""
    rows = [("dense", "", dense, 0.0, 0.0)]
    for (name, _, epochs), runs in found.items():
        tuned = [row["tuned"] for row in runs]
        rows.append((name, epochs, float(np.mean(tuned)), min(tuned), max(tuned)))
    columns = ("variant", "epochs", "top-1 %, mean", "least", "most")
    report.table(f"ResNet-{depth}, CIFAR-10", columns, rows)


def draw(path: Path, depth: int, dense: float, found: dict) -> None:
    """Accuracy by ratio, a line for each kind."""
    lines: dict[tuple[str, bool], list[tuple[int, float, float]]] = {}
    for (name, stage, _), runs in found.items():
        kind, tuned = kind_of(name), [row["tuned"] for row in runs]
        point = int(name.removeprefix(kind)), float(np.mean(tuned)), deviation(tuned)
        lines.setdefault((kind, not stage), []).append(point)
    colors = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kind for kind, _ in lines))}
    with plot(path, columns=2, size=(10, 4)) as pair:
        for ax, cut in zip(np.atleast_1d(pair), (False, True), strict=True):
            for (kind, long), points in lines.items():
                if ("channels" in kind) is cut:
                    x, y, spread = zip(*sorted(points), strict=True)
                    label, mark = (f"{kind}, long", "*") if long else (kind, "o-")
                    ax.errorbar(x, y, spread, fmt=mark, label=label, color=colors[kind], ms=8)
            ax.axhline(dense, color="k", lw=0.8, ls="--", label="dense")
            label = "MACs removed, %" if cut else "weights removed, %"
            ax.set(xlabel=label, ylabel="top-1 %", title=f"ResNet-{depth}")
            ax.legend()


if __name__ == "__main__":
    run(main, "prune_cifar10")
