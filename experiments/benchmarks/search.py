"""How fast are the sweep over all sites and bits, the exact front, and allocation?

    python -m experiments.benchmarks.search --json

The sweep: ResNet-20 with BatchNorm folded, its 20 weights and 20 activations at 2 to 8 bits, one at
a time, --images training images in batches of --batch; `sweep_s` with its compilations,
`sweep_compilations` as JAX's own events count them. `static_s`: one jitted evaluation per
configuration with the bits as static arguments, compiled and run once each; --static of the
configurations, spread over all, are timed and their mean is taken for all (`static_measured`).
`floor_s` is what the evaluations alone take: the multiply-accumulates of the network at the rate of
its plain forward pass in the same run.
The front: 50 layers with 6 choices of whole bytes. Three budgets: 100 layers with 6 choices, limits
on bytes, latency and energy, proved optimal. Medians of --repeats problems.
Re-ranking: a trained network for 8x8 digits whose 5 layers have 4 options each; all 1,024 plans are
measured. For --repeats budgets between the smallest and the largest, the excess of a plan is its
divergence less the least of any plan that fits: of the optimum of the sums, and of the best of 32
candidates; `rerank_excess_ratio` is the second over the first, summed over the budgets.
Result: experiments/results/search.json.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import cifar10_normalise, load_cifar10, load_digits_split
from experiments.models import digits, resnet_cifar
from experiments.training import fit
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.graph import trace
from jaxcompress.search import (
    Budget,
    Choice,
    Problem,
    Search,
    allocate,
    front,
    integer_options,
    kl,
    sensitivity,
)

BITS = range(2, 9)
SITES = ".*"


@dataclasses.dataclass(frozen=True)
class Args(Options):
    images: int = 512
    """Training images."""
    batch: int = 64
    """Images of a batch."""
    static: int = 14
    """Configurations that are compiled one by one."""
    repeats: int = 5
    """Problems of every kind."""


def weights(bits: int) -> jc.Compressor:
    """Integers per output channel, ranges from min to max."""
    return jc.quantize.weights(jc.formats.integer(bits), axis=-1)


def sweep(fn: Callable, params: Any, batches: Any, bits: Any, sites: str) -> tuple[float, int]:
    """Seconds and compilations of all configurations."""
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        sensitivity(
            fn, params, batches, sites=sites,
            weights={f"int{b}": weights(b) for b in bits},
            activations={f"uint{b}": jc.formats.integer(b, symmetric=False) for b in bits},
        )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return time.perf_counter() - start, len(compiled)


def static(fn: Callable, params: Any, batches: Any, jobs: Sequence[tuple[str, str, int]]) -> float:
    """Mean seconds of one configuration: compiled for its bits, and run."""

    def of_weights(site: str, bits: int) -> Callable:
        recipe = jc.by_path({site: weights(bits)}, default=jc.identity())

        def evaluate(params, inputs, known):
            view = recipe.apply(params, recipe.init(params))
            return kl(fn(view, *inputs), known, None)

        return evaluate

    def of_activations(site: str, bits: int) -> Callable:
        form = jc.formats.integer(bits, symmetric=False)
        act = jc.quantize.activations(fn, form, sites=site)
        grids = jc.quantize.calibrate_activations(act, params, batches)
        return lambda params, inputs, known: kl(act.apply(grids, params, *inputs), known, None)

    reference = [fn(params, *inputs) for inputs in batches]
    jax.block_until_ready(reference)
    seconds = []
    for kind, site, bits in jobs:
        start = time.perf_counter()
        evaluate = (of_weights if kind == "weights" else of_activations)(site, bits)
        compiled = jax.jit(evaluate)
        values = [compiled(params, x, y) for x, y in zip(batches, reference, strict=True)]
        jax.block_until_ready(values)
        seconds.append(time.perf_counter() - start)
    return statistics.fmean(seconds)


def random_problem(sites: int, choices: int, names: tuple[str, ...], seed: int) -> Problem:
    """Losses fall and costs rise along the choices of a layer, as with bits."""
    rng = np.random.default_rng(seed)
    found = {}
    for site in range(sites):
        sizes = rng.integers(1, 1000)
        losses = np.sort(rng.random(choices))[::-1] * rng.exponential()
        found[f"layer{site}"] = {
            f"int{k + 2}": Choice(
                float(losses[k]),
                {n: float(sizes * (k + 2) + rng.integers(0, sizes + 1)) for n in names},
            )
            for k in range(choices)
        }
    return Problem(found)


def middle(problem: Problem) -> Budget:
    """Limits half way between the cheapest and the dearest choices."""

    def half(name: str) -> float:
        costs = [[c.costs[name] for c in by.values()] for by in problem.sites.values()]
        return sum((min(site) + max(site)) / 2 for site in costs)

    return Budget(
        weight_bytes=half("weight_bytes"), latency_s=half("latency_s"), energy_j=half("energy_j")
    )


def trained_digits(steps: int, seed: int) -> tuple[Callable, Any, Any]:
    """A network of 5 layers, trained, and batches of training images."""
    data = load_digits_split(seed, standardise=True)
    images = np.asarray(data.train_images, np.float32)
    model = digits.DigitsCNN(features=(8, 16, 32), hidden=32)
    apply_fn, recipe, tx = digits.apply_fn(model), jc.identity(), optax.adam(3e-3)
    params = model.init(jax.random.key(seed), images[:1])["params"]
    step = jc.train.make_step(jc.train.stateless(apply_fn), tx, recipe=recipe)
    state = jc.train.create(params, recipe, tx)
    labels = np.asarray(data.train_labels)
    state = fit(step, state, (images, labels), size=64, steps=steps, seed=seed)
    return apply_fn, state.params, [(part,) for part in np.split(images[:512], 4)]


def rerank_excess(steps: int, budgets: int, options: Any, report: Report, seed: int) -> dict:
    """What the optimum of the sums and the best of 32 candidates lose to brute force."""
    search = Search(*trained_digits(steps, seed), device="stm32l4r5", options=options)
    names = [search.problem.sites[site] for site in search.sites]
    plans = [dict(zip(search.sites, found, strict=True)) for found in itertools.product(*names)]
    losses = [search.measure(plan) for plan in report.progress(plans, "brute force")]
    sizes = [search.problem.costs(plan)["weight_bytes"] for plan in plans]
    shares = np.linspace(0, 1, budgets + 2)[1:-1]
    single, ranked = 0.0, 0.0
    for share in shares:
        limit = min(sizes) + share * (max(sizes) - min(sizes))
        least = min(loss for loss, size in zip(losses, sizes, strict=True) if size <= limit)
        found = [search.plans(Budget(weight_bytes=limit), candidates=k)[0] for k in (1, 32)]
        single += found[0].measured["kl"] - least
        ranked += found[1].measured["kl"] - least
    return {
        "rerank_plans": len(plans),
        "rerank_excess_of_optimum_nats": single / budgets,
        "rerank_excess_of_best_of_32_nats": ranked / budgets,
        "rerank_excess_ratio": ranked / single if single else 0.0,
    }


def main(args: Args, report: Report) -> dict[str, Any]:
    """All three."""
    if min(args.images, args.batch, args.static, args.repeats) < 1:
        raise ValueError("--images, --batch, --static and --repeats must be positive")
    fn = resnet_cifar.folded_apply_fn(20)
    variables = resnet_cifar.load_pretrained(20)
    params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
    images = load_cifar10("train")[0][: 64 if args.short else args.images]
    parts = np.split(images, range(args.batch, len(images), args.batch))
    batches = [(cifar10_normalise(part),) for part in parts]
    bits, repeats = (BITS, args.repeats) if not args.short else ((2, 8), 1)
    sites = "layer1_0/.*" if args.short else SITES
    names = [tap.name for tap in trace(fn, params, *batches[0]).taps]
    if args.short:
        names = [name for name in names if name.startswith("layer1_0/")]
    jobs = list(itertools.product(("weights", "activations"), names, bits))
    chosen = jobs[:: max(1, len(jobs) // (2 if args.short else args.static))]
    figures: dict[str, Any] = {"configurations": len(jobs), "static_measured": len(chosen)}
    figures["sweep_s"], figures["sweep_compilations"] = sweep(fn, params, batches, bits, sites)
    figures["static_s"] = static(fn, params, batches, chosen) * len(jobs)
    figures["sweep_speedup"] = figures["static_s"] / figures["sweep_s"]
    plain = jax.jit(fn)
    once = interleaved(
        {"plain": lambda: [plain(params, *inputs) for inputs in batches]}, repeats=repeats
    )
    figures["floor_s"] = once["plain"] * (len(jobs) + 1)

    def median(function: Callable[[int], Any]) -> float:
        seconds = []
        for seed in range(args.seed, args.seed + repeats):
            start = time.perf_counter()
            function(seed)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    seeds = range(args.seed, args.seed + repeats)
    sized = {seed: random_problem(50, 6, ("weight_bytes",), seed) for seed in seeds}
    figures["front_50x6_s"] = median(lambda seed: front(sized[seed]))
    costs = ("weight_bytes", "latency_s", "energy_j")
    three = {seed: random_problem(100, 6, costs, seed) for seed in seeds}
    figures["three_budgets_s"] = median(lambda seed: allocate(three[seed], middle(three[seed])))
    options = integer_options((2, 8) if args.short else (2, 3, 4, 8))
    figures |= rerank_excess(20 if args.short else 400, repeats, options, report, args.seed)
    columns = ("", "seconds")
    report.table("Search", columns, [(k, v) for k, v in figures.items() if k.endswith("_s")])
    return figures


if __name__ == "__main__":
    run(main, "search")
