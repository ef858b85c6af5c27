"""Question: what does a teacher give a small, compressed network that has few labels?

    python -m experiments.distill_digits --json

scikit-learn's 8x8 digits, 500 test images. Per seed a teacher (87,178 parameters) is trained on all
1,297 training images with their labels. The student (10,858 parameters) sees the labels of --labels
images, ten of each class by default; the others it sees without labels, through the teacher alone.
Variants: dense; int8 weights and activations with half of the weights zero; int4 weights, 8-bit
activations and three quarters zero; magnitude pruning along a cubic schedule, all from the start
of training. Each is trained twice from the same start: with cross-entropy on the labelled images,
and with the loss of Hinton et al. on all images, cross-entropy only where there is a label; the
same number of steps, labelled images and batches. `gain_points` is the mean over the seeds of the
paired difference of top-1, with its standard error. `all_labels_`: the dense student with all
labels, the default recipe `hinton_loss()` against cross-entropy.
The step of a variant is compiled once for all seeds.
Result: experiments/results/distill_digits.json.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import load_digits_split
from experiments.evaluate import top1
from experiments.models import digits
from experiments.training import shift_augment

VARIANTS = {"dense": (None, 0.0), "int8_sparse50": (8, 0.5), "int4_sparse75": (4, 0.75)}
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    seeds: int = 16
    """Paired runs of every variant."""
    labels: int = 100
    """Labelled images of the student."""
    steps: int = 1500
    """Steps of a student, each on 64 labelled and 64 other images."""
    teacher_steps: int = 1500
    """Steps of a teacher."""
    learning_rate: float = 3e-3
    """Of Adam at the start; it falls to 0 along a cosine."""


def few_labels_loss(
    temperature: float = 4.0, kd_weight: float = 0.9, ce_weight: float = 0.1
) -> Callable[..., Any]:
    """Cross-entropy on the first half of the batch, distillation on all of it."""

    def loss(outputs, labels, known, step):
        del step
        ce = jc.train.cross_entropy(outputs[: len(labels)], labels)
        if known is None:
            return ce, {}
        soft = jc.distill.kd(outputs, known, temperature=temperature)
        return ce_weight * ce + kd_weight * soft, {}

    return loss


def recipe_for(bits: int | None, sparsity: float, steps: int) -> jc.Compressor:
    """Magnitude pruning, then integers per output channel."""
    if bits is None:
        return jc.identity()
    schedule = jc.prune.cubic(0.0, sparsity, start=0, end=steps // 2, every=10)
    weights = jc.quantize.weights(jc.formats.integer(bits), axis=-1)
    return jc.chain(
        jc.prune.magnitude(schedule, scope="global"),
        jc.by_path({".*kernel": weights}, default=jc.identity()),
    )


class Protocol:
    """Data of all seeds, and training."""

    def __init__(self, args: Args, count: int):
        data = load_digits_split(args.seed)
        self.args, self.count = args, count
        self.images, self.labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
        self.test = data.test_images, data.test_labels
        self.keys = jax.random.split(jax.random.key(args.seed), count)
        self.few = [self._stratified(args.seed + seed) for seed in range(count)]

    def _stratified(self, seed: int) -> np.ndarray:
        labels, rng = np.asarray(self.labels), np.random.default_rng(seed)
        each = -(-self.args.labels // 10)
        rows = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in range(10)]
        return np.stack(rows, 1).reshape(-1)[: self.args.labels]

    def train(
        self,
        report: Report,
        what: str,
        model: digits.DigitsCNN,
        *,
        steps: int,
        labelled: list[np.ndarray],
        loss: Callable[..., Any],
        variant: tuple[int | None, float] = (None, 0.0),
        teachers: list[Any] | None = None,
        others: bool = True,
    ) -> tuple[list[Any], np.ndarray]:
        """(params, top-1 in percent) of one network per seed; the step is compiled once.

        labelled: for each seed the rows of the training images with labels; a batch has 64 of
        them, and with `others` 64 of all images.
        """
        bits, sparsity = variant
        apply_fn = digits.apply_fn(model)
        rate = optax.cosine_decay_schedule(self.args.learning_rate, steps)
        tx = jc.prune.masked_optimizer(optax.adam(rate))
        recipe = recipe_for(bits, sparsity, steps)
        act = None
        if bits is not None:
            act = jc.quantize.activations(apply_fn, jc.formats.integer(8, symmetric=False))
        step = jc.train.make_step(
            jc.train.stateless(apply_fn),
            tx,
            recipe=recipe,
            loss=loss,
            teacher=digits.apply_fn(digits.teacher()) if teachers is not None else None,
            activations=act,
        )

        @jax.jit
        def batch(key, rows, index):
            pick, other, shift = jax.random.split(jax.random.fold_in(key, index), 3)
            chosen = jax.random.choice(pick, rows, (BATCH,))
            labels = self.labels[chosen]
            if others:
                more = jax.random.randint(other, (BATCH,), 0, len(self.images))
                chosen = jnp.concatenate([chosen, more])
            return shift_augment(shift, self.images[chosen]), labels

        init = jax.jit(lambda key: model.init(key, self.images[:1])["params"])
        shipped = apply_fn if act is None else act.apply
        all_params, accuracies = [], []
        for seed in report.progress(range(self.count), what):
            start, stream = jax.random.split(self.keys[seed])
            params, rows = init(start), jnp.asarray(labelled[seed])
            ranges = () if act is None else act.init(params, self.images[:1])
            state = jc.train.fit(
                step,
                jc.train.create(params, recipe, tx, activations=ranges),
                functools.partial(batch, stream, rows),
                steps=steps,
                teacher_params=() if teachers is None else teachers[seed],
            )
            view = jc.unpack(recipe.pack(state.params, state.compress))
            given = (view,) if act is None else (act.grids(state.activations), view)
            accuracies.append(top1(jax.tree_util.Partial(shipped, *given), *self.test))
            all_params.append(state.params)
        return all_params, np.asarray(accuracies)


def paired(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean of second - first, and its standard error."""
    gains = second - first
    error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else 0.0
    return float(gains.mean()), error


def main(args: Args, report: Report) -> dict[str, Any]:
    """All variants."""
    if min(args.seeds, args.steps, args.teacher_steps) < 1:
        raise ValueError("--seeds, --steps and --teacher-steps must be positive")
    if not 10 <= args.labels <= 1000:
        raise ValueError(f"--labels must be 10 to 1000, got {args.labels}")
    count, steps, teacher_steps = args.seeds, args.steps, args.teacher_steps
    if args.short:
        count, steps, teacher_steps = 2, 20, 20
    protocol = Protocol(args, count)
    every = [np.arange(len(protocol.images))] * count
    student, ce = digits.student(), few_labels_loss()
    teachers, known = protocol.train(
        report,
        "teachers",
        digits.teacher(),
        steps=teacher_steps,
        labelled=every,
        loss=ce,
        others=False,
    )
    figures: dict[str, Any] = {"seeds": count, "labels": args.labels}
    figures["teacher_top1_percent"] = float(known.mean())
    rows = []

    def compare(name: str, loss: Callable[..., Any], **how: Any) -> None:
        _, plain = protocol.train(report, name, student, steps=steps, loss=ce, **how)
        _, distilled = protocol.train(
            report, f"{name}, distilled", student, steps=steps, loss=loss, teachers=teachers, **how
        )
        gain, error = paired(plain, distilled)
        figures[f"{name}_top1_percent"] = float(plain.mean())
        figures[f"{name}_distilled_top1_percent"] = float(distilled.mean())
        figures[f"{name}_gain_points"] = gain
        figures[f"{name}_gain_standard_error"] = error
        rows.append((name, float(plain.mean()), float(distilled.mean()), gain, error))

    for name, variant in VARIANTS.items():
        if args.short and name != "int8_sparse50":
            continue
        compare(name, few_labels_loss(), labelled=protocol.few, variant=variant)
    if not args.short:
        compare("all_labels", jc.train.hinton_loss(), labelled=every, others=False)
    columns = ("student", "cross-entropy", "distilled", "gain", "standard error")
    report.table(f"top-1 %, {count} seeds, {args.labels} labels", columns, rows)
    return figures


if __name__ == "__main__":
    run(main, "distill_digits")
