"""Question: what do few bits cost a trained ResNet-20 if weights and activations are trained?

    python -m experiments.qat_cifar10 --json

ResNet-20 from the trained weights, 10,000 test images. Weights per output channel and activations
per tensor have step sizes that are trained (LSQ), started at the least squares; the first and the
last layer have 8 bits, as in the papers. BatchNorm follows the batches: with folded BatchNorm two
bits learn far more slowly. SGD with Nesterov momentum and a cosine learning rate on shifted and
mirrored training images. Each width is trained on the labels, and on labels and a ResNet-32
("_distilled"), with the same batches. `init_` is the accuracy before training, the curve the one
after each part of the run, of the packed weights and with running statistics. No run may take more
than --minutes of training; on two CPU cores that is some 3,500 steps without the teacher.
Result: experiments/results/qat_cifar10.json.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments._runs import Runs
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from experiments.training import fit, mirror_augment

FIRST, LAST = "conv1/kernel", "linear/kernel"
RUNS = ("w4a4", "w2a2", "w4a4_distilled", "w2a2_distilled")


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    runs: tuple[str, ...] = RUNS
    """Which of them."""
    epochs_w4a4: float = 3.0
    """Epochs, or a part of one."""
    epochs_w2a2: float = 4.0
    """Epochs, or a part of one."""
    rate_w4a4: float = 0.01
    """Learning rate at the start; it falls to 0 along a cosine."""
    rate_w2a2: float = 0.02
    """The same, for two bits."""
    step_rate: float = 0.1
    """Learning rate of step sizes, relative to that of the weights."""
    minutes: float = 40.0
    """At most, of training; what is left of the epochs is not trained."""
    batch: int = 128
    """Images of a step."""
    parts: int = 4
    """Points of the curve."""


class Setup:
    """Data and the two trained networks."""

    def __init__(self, args: Args):
        self.train, self.test = load_cifar10("train"), load_cifar10("test")
        if args.short:
            (x, y), (u, v) = self.train, self.test
            self.train, self.test = (x[:256], y[:256]), (u[:200], v[:200])
        variables = resnet_cifar.load_pretrained(20)
        self.params, self.statistics = (
            jax.tree.map(jnp.asarray, variables[part]) for part in ("params", "batch_stats")
        )
        self.teacher, self.teacher_params = folded(32)


MODEL = resnet_cifar.ResNetCifar(20)


def forward(params: Any, statistics: Any, images: Any) -> tuple[Any, Any]:
    """ResNet-20 in training: BatchNorm over the batch, and its running statistics."""
    variables = {"params": params, "batch_stats": statistics}
    x = cifar10_normalise(images)
    logits, new = MODEL.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, new["batch_stats"]


def inference(variables: Any, images: Any) -> Any:
    """ResNet-20 in inference."""
    params, statistics = variables
    variables = {"params": params, "batch_stats": statistics}
    return MODEL.apply(variables, cifar10_normalise(images))


def folded(depth: int) -> tuple[Any, Any]:
    """A trained network with BatchNorm folded, on bytes; and its parameters."""
    variables = resnet_cifar.load_pretrained(depth)
    fn = resnet_cifar.folded_apply_fn(depth)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    return lambda params, images: fn(params, cifar10_normalise(images)), params


def recipe_for(bits: int) -> jc.Compressor:
    """LSQ for all kernels, one step per output channel."""
    rule = lambda bits: jc.quantize.lsq(bits, axis=-1, calibrate=jc.quantize.mse())
    return jc.by_path({f"{FIRST}|{LAST}": rule(8), ".*kernel": rule(bits)}, default=jc.identity())


def plan(args: Args, name: str) -> tuple[float, float]:
    """Epochs and learning rate of a run."""
    if name.startswith("w2a2"):
        return args.epochs_w2a2, args.rate_w2a2
    return args.epochs_w4a4, args.rate_w4a4


def optimizer(args: Args, learning_rate: float, total: int) -> optax.GradientTransformation:
    """SGD, its learning rate a cosine; no weight decay on steps and biases."""
    decayed = lambda trainable: jax.tree.map(lambda w: w.ndim > 1, trainable)

    def sgd(factor: float) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(factor * learning_rate, total)
        return optax.sgd(rate, momentum=0.9, nesterov=True)

    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.partition(
            {
                "params": optax.chain(optax.add_decayed_weights(1e-4, mask=decayed), sgd(1.0)),
                "learned": sgd(args.step_rate),
            },
            jc.train.label_learned,
        ),
    )


class Clock:
    """Seconds of training, evaluation left out; ends a run that takes too long."""

    def __init__(self, limit: float):
        self.limit, self.before, self.start = limit, 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self.start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time in here does not count."""
        self.before = self.seconds
        yield
        self.start = time.perf_counter()

    def while_left(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps, as long as there is time."""
        return itertools.takewhile(lambda _: self.seconds < self.limit, steps)


def trained(args: Args, report: Report, setup: Setup, name: str) -> dict[str, Any]:
    """One run: accuracy before, along and after training, and the bytes of what ships."""
    bits, distilled = int(name[1]), name.endswith("_distilled")
    epochs, rate = plan(args, name)
    size = 64 if args.short else args.batch
    total = 4 if args.short else max(round(epochs * (len(setup.train[0]) // size)), 1)
    recipe, tx = recipe_for(bits), optimizer(args, rate, total)
    widths = {f"{FIRST}|{LAST}": 8, ".*": bits}
    act = jc.quantize.lsq_activations(forward, widths, calibrate=jc.quantize.mse())
    view = recipe.apply(setup.params, recipe.init(setup.params))
    state = jc.train.create(
        setup.params,
        recipe,
        tx,
        model_state=setup.statistics,
        activations=act.init(view, setup.statistics, setup.train[0][:256]),
    )
    shipped = jc.quantize.with_activations(inference)
    step = jc.train.make_step(
        forward,
        tx,
        recipe=recipe,
        teacher=setup.teacher if distilled else None,
        loss=jc.train.hinton_loss(temperature=1.0, kd_weight=0.9, ce_weight=0.1),
        activations=act._replace(train=jc.train.fast_kernel_gradients(act.train)),
    )

    def accuracy(state: Any) -> float:
        packed = recipe.pack(state.params, state.compress)
        grids = {f"0/{name}": grid for name, grid in act.grids(state.activations).items()}
        variables = jc.unpack(packed), state.model_state
        return top1(jax.tree_util.Partial(shipped, grids, variables), *setup.test)

    row: dict[str, Any] = {"init": accuracy(state), "curve": []}
    clock = Clock(60 * args.minutes)

    def evaluate(state: Any) -> dict[str, float]:
        with clock.stopped():
            row["curve"].append((int(state.step), accuracy(state)))
        return {}

    state = fit(
        step,
        state,
        setup.train,
        size=size,
        steps=total,
        seed=args.seed,
        augment=mirror_augment,
        teacher_params=setup.teacher_params if distilled else (),
        progress=lambda steps: clock.while_left(report.progress(steps, name, total=total)),
        evaluate=evaluate,
        evaluate_every=-(-total // args.parts),
    )
    done = int(state.step)
    if row["curve"][-1][0] != done:
        evaluate(state)
    packed = recipe.pack(state.params, state.compress)
    row |= {"top1": row["curve"][-1][1], "minutes": clock.seconds / 60, "steps": done}
    return {
        **row,
        "bytes": jc.packed_bytes((packed, state.model_state, act.grids(state.activations))),
    }


def key_of(args: Args, name: str) -> str:
    """All settings of a run."""
    epochs, rate = plan(args, name)
    key = f"{name} epochs={epochs:g} rate={rate:g} steps={args.step_rate:g}"
    return f"{key} batch={args.batch} seed={args.seed}" + " short" * args.short


def main(args: Args, report: Report) -> dict[str, Any]:
    """All runs."""
    unknown = set(args.runs) - set(RUNS)
    if unknown:
        raise ValueError(f"unknown --runs {sorted(unknown)}; known: {', '.join(RUNS)}")
    for option in ("epochs_w4a4", "epochs_w2a2", "minutes", "batch", "parts"):
        if getattr(args, option) <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive")
    setup, runs = Setup(args), Runs(args.out, "qat_cifar10", report)
    figures: dict[str, Any] = {
        "float32_top1_percent": top1(
            jax.tree_util.Partial(inference, (setup.params, setup.statistics)), *setup.test
        ),
        "teacher_top1_percent": top1(
            jax.tree_util.Partial(setup.teacher, setup.teacher_params), *setup.test
        ),
    }
    rows, curves = [], {}
    for name in args.runs:
        row = runs.get(key_of(args, name), lambda name=name: trained(args, report, setup, name))
        figures[f"{name}_top1_percent"] = row["top1"]
        figures[f"{name}_init_top1_percent"] = row["init"]
        figures[f"{name}_minutes"], figures[f"{name}_steps"] = row["minutes"], row["steps"]
        figures[f"{name}_packed_bytes"] = row["bytes"]
        curves[name] = [(0, row["init"]), *row["curve"]]
        for number, (step, accuracy) in enumerate(row["curve"], 1):
            figures[f"{name}_curve{number}_steps"] = step
            figures[f"{name}_curve{number}_top1_percent"] = accuracy
        rows.append((name, row["init"], row["top1"], row["steps"], row["minutes"]))
    columns = ("run", "top-1 % before", "after", "steps", "minutes")
    report.table("ResNet-20, CIFAR-10, LSQ", columns, rows)
    if args.out is not None:
        with plot(Path(args.out) / "qat_cifar10.png") as ax:
            for name, curve in curves.items():
                ax.plot(*zip(*curve, strict=True), "o-", label=name)
            ax.axhline(figures["float32_top1_percent"], color="k", lw=0.8, ls="--", label="float32")
            ax.set(xlabel="steps", ylabel="top-1 %", title="ResNet-20, CIFAR-10, LSQ")
            ax.legend()
    return figures


if __name__ == "__main__":
    run(main, "qat_cifar10")
