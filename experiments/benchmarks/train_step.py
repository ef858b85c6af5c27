"""What does a training step cost more when masks, quantizers and a teacher are in it?

    python -m experiments.benchmarks.train_step --json

ResNet-20 with BatchNorm folded, from the trained weights, ResNet-32 as teacher, batches of CIFAR-10
training images, SGD with Nesterov momentum. `plain_s` is a float32 step of `make_step` without a
teacher, `teacher_s` the forward pass of the teacher, `composed_s` a step with 50 % of the weights
masked, int4 weights in every layer, int8 activations whose ranges are renewed in every step, and
the loss of distillation; `compressed_s` is the same without the teacher. Interleaved, medians. Fake
quantization adds no multiply-accumulates, but passes over weights and activations; a teacher inside
the step fills the cores where the student leaves them idle, so that the ratio can fall below 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.models import resnet_cifar
from jaxcompress.cost.timing.clock import interleaved


@dataclasses.dataclass(frozen=True)
class Args(Options):
    batch: int = 128
    """Images of a step."""
    repeats: int = 15
    """Rounds of timing; the median counts."""


def folded(depth: int) -> tuple[Any, Any]:
    """A trained network: apply_fn on normalised images, and its parameters."""
    variables = resnet_cifar.load_pretrained(depth)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    return resnet_cifar.folded_apply_fn(depth), params


def recipe() -> jc.Compressor:
    """Half of the weights zero, the others int4 with one scale per output channel."""
    return jc.chain(
        jc.prune.magnitude(jc.prune.one_shot(0.5), scope="global"),
        jc.by_path(
            {".*kernel": jc.quantize.weights(jc.formats.integer(4), axis=-1)},
            default=jc.identity(),
        ),
    )


class Stepped:
    """A step and its state, which every call renews."""

    def __init__(self, step: Any, state: Any, teacher_params: Any, batch: Any):
        self.step, self.state, self.rest = step, state, (teacher_params, batch)

    def __call__(self) -> Any:
        self.state, metrics = self.step(self.state, *self.rest)
        return self.state, metrics


def main(args: Args, report: Report) -> dict[str, Any]:
    if args.batch < 1:
        raise ValueError(f"--batch must be positive, got {args.batch}")
    size = 8 if args.short else args.batch
    images, labels = load_cifar10("train")
    batch = jax.jit(cifar10_normalise)(images[:size]), jnp.asarray(labels[:size])
    (fn, params), (teacher, teacher_params) = folded(20), folded(32)
    tx = optax.sgd(1e-3, momentum=0.9, nesterov=True)
    fast = jc.train.fast_kernel_gradients

    plain = jc.train.make_step(jc.train.stateless(fast(fn)), tx)
    bare = jc.train.create(params, jc.identity(), tx)

    act = jc.quantize.activations(fn, jc.formats.integer(8, symmetric=False))
    masked = jc.prune.masked_optimizer(tx)

    def compressed(teacher_params: Any, **kwargs: Any) -> Stepped:
        step = jc.train.make_step(
            jc.train.stateless(fn),
            masked,
            recipe=recipe(),
            activations=act._replace(train=fast(act.train)),
            **kwargs,
        )
        ranges = act.init(params, batch[0])
        state = jc.train.create(params, recipe(), masked, activations=ranges)
        return Stepped(step, state, teacher_params, batch)

    known = jax.jit(teacher)
    with report.console.status("timing"):
        seconds = interleaved(
            {
                "plain_s": Stepped(plain, bare, (), batch),
                "teacher_s": lambda: known(teacher_params, batch[0]),
                "compressed_s": compressed(()),
                "composed_s": compressed(teacher_params, teacher=teacher),
            },
            repeats=2 if args.short else args.repeats,
        )
    both = seconds["plain_s"] + seconds["teacher_s"]
    ratio = seconds["composed_s"] / both
    rows = [(name, value) for name, value in seconds.items()]
    report.table("one step", ("what", "seconds"), [*rows, ("composed / (plain + teacher)", ratio)])
    return {**seconds, "overhead_over_plain_plus_teacher": ratio, "batch": size}


if __name__ == "__main__":
    run(main, "train_step")
