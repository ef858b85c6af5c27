"""Question: what do bits chosen per layer give over the same bits everywhere?

    python -m experiments.search_cifar10 --json

ResNet-20 from the trained weights, BatchNorm folded, after training alone. Every layer may be
ternary (five weights to a byte) or have 2 to 8 bits (integers per output channel, ranges of least
squared error), all by GPTQ; activations have 8. Planned on --images training images without labels:
the least sum of the divergences that one layer alone causes, exactly, and of the --candidates best
plans the one that diverges least. Budgets are what --bits everywhere would take; uniform_k is the
largest uniform width within the budget, plan_k the plan. Top-1 on 10,000 test images, whose
standard error is 0.3. About 15 minutes on two CPU cores.
Result: experiments/results/search_cifar10.json; with --out the plans lie beside it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10
from experiments.evaluate import top1
from experiments.models import resnet_cifar
from jaxcompress.quantize import Spec
from jaxcompress.search import Budget, Compressed, Option, Plan, Search, integer_options


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    images: int = 512
    """Training images to plan on."""
    candidates: int = 32
    """Plans that are measured for a budget."""
    bits: tuple[float, ...] = (2, 2.5, 3, 3.5, 4)
    """Budgets: bits per weight, on average, beside the scales and biases."""
    device: str = "stm32h743"
    """Device of the costs."""


def accuracy(found: Compressed, images: Any, labels: Any) -> float:
    """Top-1 of what ships."""
    apply = jc.quantize.with_activations(found.apply_fn)
    predict = jax.tree_util.Partial(
        lambda grids, params, x: apply(grids, params, cifar10_normalise(x)),
        found.grids,
        jc.unpack(found.packed),
    )
    return top1(predict, images, labels)


def main(args: Args, report: Report) -> dict[str, Any]:
    """Sensitivities once, plans for all budgets."""
    if min(args.bits) < 2:
        raise ValueError(f"--bits must be at least 2, the narrowest uniform width, got {args.bits}")
    if args.images < 64:
        raise ValueError(f"--images must be at least 64, got {args.images}")
    fn = resnet_cifar.folded_apply_fn(20)
    variables = resnet_cifar.load_pretrained(20)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    (train, _), (images, labels) = load_cifar10("train"), load_cifar10("test")
    count = 64 if args.short else args.images
    if args.short:
        images, labels = images[:200], labels[:200]
    rows = np.random.default_rng(args.seed).choice(len(train), count, replace=False)
    batches = [(cifar10_normalise(train[part]),) for part in np.split(rows, -(-count // 128))]
    widths = (2, 8) if args.short else range(2, 9)
    uniform = integer_options(widths)
    ternary = {} if args.short else {"ternary": Option(Spec(jc.formats.ternary()))}
    search = Search(
        fn, params, batches, device=args.device, options=ternary | uniform,
        progress=lambda jobs: report.progress(jobs, "search"),
    )  # fmt: skip
    figures: dict[str, Any] = {"sites": len(search.sites), "options": len(search.options)}
    table, curves = [], {"uniform": [], "plan": []}

    def measured(name: str, plan: Plan) -> Compressed:
        found = search.apply(plan)
        figures[f"{name}_top1_percent"] = accuracy(found, images, labels)
        figures[f"{name}_bytes"] = found.cost.weight_bytes
        figures[f"{name}_kl"] = plan.measured["kl"]
        table.append((name, found.cost.weight_bytes, figures[f"{name}_top1_percent"]))
        if args.out is not None:
            plan.save(Path(args.out) / f"search_cifar10_{name}.json")
        return found

    plans = {name: search.uniform(name) for name in uniform}
    bytes_of = lambda name: plans[name].predicted["weight_bytes"]
    low, high = widths[0], widths[-1]
    step = (bytes_of(f"int{high}") - bytes_of(f"int{low}")) / (high - low)
    for k, bits in enumerate(args.bits[: 2 if args.short else None], 1):
        limit = bytes_of(f"int{low}") + round((bits - low) * step)
        largest = max((name for name in uniform if bytes_of(name) <= limit), key=bytes_of)
        plan = search.plans(Budget(weight_bytes=limit), candidates=args.candidates)[0]
        figures[f"budget_{k}_bytes"] = limit
        for name, chosen in (("uniform", plans[largest]), ("plan", plan)):
            found = measured(f"{name}_{k}", chosen)
            curves[name].append((found.cost.weight_bytes, figures[f"{name}_{k}_top1_percent"]))
    report.table("ResNet-20, CIFAR-10, after training", ("", "bytes", "top-1 %"), table)
    if args.out is not None:
        with plot(Path(args.out) / "search_cifar10.png") as ax:
            for name, points in curves.items():
                ax.plot(*zip(*points, strict=True), "o-", label=name)
            ax.set(xlabel="bytes of weights", ylabel="top-1 %", title="ResNet-20, CIFAR-10")
            ax.legend()
    return figures


if __name__ == "__main__":
    run(main, "search_cifar10")
