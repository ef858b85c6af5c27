"""How fast is the exact selection of the largest of ten million scores, and how fast could it be?

Command   python -m experiments.benchmarks.select --json
Device    CPU, 2 cores of an AMD EPYC (5th generation); a minute
Result    0.034 s against 3.48 s: 102 times as fast as argsort, with 1760 bytes of scratch memory;
          2:4 64 times, along the last axis 52 (experiments/results/select.json)

The scores are magnitudes of normal weights in three leaves. The rival concatenates them, sorts
them with jnp.argsort and scatters the mask; both masks must be equal, bit for bit. The physical
limit is one read of the scores at the bandwidth of a copy in the same run (a copy moves each byte
twice); the selection reads them 17 times. `tied_select_s` is the hardest case: all scores alike,
every place decided by position. Of the same number of scores the 2 of every 4 inputs are found too;
the rival sorts each group.
"""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments._report import Options, Report, run
from jaxcompress.core.numerics.top_k import keep_count, top_k_masks
from jaxcompress.cost.timing.clock import interleaved
from jaxcompress.prune import n_m


@dataclasses.dataclass(frozen=True)
class Args(Options):
    elements: int = 10_000_000
    """Number of scores."""
    sparsity: float = 0.9
    """Fraction to drop."""
    repeats: int = 5
    """Rounds of timing; the median counts."""


def normal_scores(elements: int, seed: int) -> dict[str, jax.Array]:
    """A convolution, a matrix and a vector, about 20, 50 and 30 percent of the elements."""
    channels = math.isqrt(elements // 45)
    columns = min(1000, elements)
    shapes = {"conv": (3, 3, channels, channels), "dense": (elements // 2 // columns, columns)}
    shapes["vector"] = (elements - sum(math.prod(shape) for shape in shapes.values()),)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jnp.abs(jax.random.normal(key, shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def argsort_masks(scores, keep):
    """The rival: one stable descending argsort of all the scores."""
    leaves, treedef = jax.tree.flatten(scores)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    kept = jnp.arange(flat.size) < keep
    mask = jnp.zeros(flat.shape, bool).at[jnp.argsort(flat, descending=True)].set(kept)
    parts = jnp.split(mask, np.cumsum([leaf.size for leaf in leaves])[:-1].tolist())
    return treedef.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])


def two_of_four(scores: jax.Array, axis: int) -> jax.Array:
    """The 2:4 mask along an axis."""
    pattern = n_m(2, 4, axis=axis)
    return pattern.expand(jnp.zeros(pattern.pool(scores).shape, bool), scores)


def argsort_two_of_four(scores: jax.Array) -> jax.Array:
    """The rival: a stable descending argsort of every four consecutive scores of the last axis."""
    groups = scores.reshape(-1, 4)
    order = jnp.argsort(groups, axis=-1, descending=True)
    mask = jnp.zeros(groups.shape, bool)
    mask = jnp.put_along_axis(mask, order[:, :2], True, axis=-1, inplace=False)
    return mask.reshape(scores.shape)


def time_two_of_four(elements: int, args: Args) -> dict[str, float]:
    """Seconds of 2:4 along the last axis and the one before, and of the sort."""
    columns = 1000
    scores = jnp.abs(jax.random.normal(jax.random.key(args.seed), (elements // columns, columns)))
    last, first = (jax.jit(lambda s, a=axis: two_of_four(s, a)) for axis in (-1, -2))
    rival = jax.jit(argsort_two_of_four)
    if not bool(jnp.array_equal(last(scores), rival(scores))):
        raise RuntimeError("the 2:4 masks differ from those of argsort")
    seconds = interleaved(
        {
            "two_of_four_s": lambda: first(scores),
            "two_of_four_last_axis_s": lambda: last(scores),
            "argsort_two_of_four_s": lambda: rival(scores),
        },
        repeats=2 if args.short else args.repeats,
    )
    for name in ("two_of_four", "two_of_four_last_axis"):
        rate = seconds["argsort_two_of_four_s"] / seconds[f"{name}_s"]
        seconds[f"{name}_speedup_over_argsort"] = rate
    return seconds


def main(args: Args, report: Report) -> dict:
    elements = min(args.elements, 100_000) if args.short else args.elements
    if elements < 100:
        raise ValueError(f"--elements must be at least 100, got {elements}")
    scores = normal_scores(elements, args.seed)
    tied = jax.tree.map(jnp.ones_like, scores)
    keep = jnp.int32(keep_count(elements, args.sparsity))

    start = time.perf_counter()
    select = jax.jit(top_k_masks).lower(scores, keep).compile()
    compile_s = time.perf_counter() - start
    rival = jax.jit(argsort_masks)
    for case in (scores, tied):
        same = jax.tree.map(jnp.array_equal, select(case, keep), rival(case, keep))
        if not jax.tree.all(same):
            raise RuntimeError(f"the masks differ from those of argsort: {same}")

    source = np.ones(elements, np.float32)
    target = np.empty_like(source)
    seconds = interleaved(
        {
            "select_s": lambda: select(scores, keep),
            "tied_select_s": lambda: select(tied, keep),
            "argsort_s": lambda: rival(scores, keep),
            "copy_s": lambda: np.copyto(target, source),
        },
        repeats=2 if args.short else args.repeats,
    )
    limit_s = seconds["copy_s"] / 2
    names = (("counting", "select_s"), ("counting, all tied", "tied_select_s"))
    names += (("argsort", "argsort_s"), ("copy of the scores", "copy_s"))
    report.table(
        f"{int(keep)} of {elements} scores",
        ("", "ms", "times the limit"),
        [(label, seconds[key] * 1e3, seconds[key] / limit_s) for label, key in names],
    )
    groups = time_two_of_four(max(elements // 4000, 1) * 4000, args)
    report.table(
        "2:4",
        ("", "ms or times"),
        [(k, v * 1e3 if k.endswith("_s") else v) for k, v in groups.items()],
    )
    memory = select.memory_analysis()
    return {
        **seconds,
        "limit_s": limit_s,
        "speedup_over_argsort": seconds["argsort_s"] / seconds["select_s"],
        "select_over_limit": seconds["select_s"] / limit_s,
        "scratch_bytes": memory.temp_size_in_bytes if memory else None,
        "compile_s": compile_s,
        "elements": elements,
        "keep": int(keep),
        "masks_equal": True,
        **groups,
    }


if __name__ == "__main__":
    run(main, "select")
