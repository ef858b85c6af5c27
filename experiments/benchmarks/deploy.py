"""How small and how fast are the files in the runtimes that people deploy, and do they agree?

Command   python -m experiments.benchmarks.deploy --json
Device    CPU, 2 cores, 6 GB of memory, about 15 minutes
Result    experiments/results/deploy.json

ResNet-20 with BatchNorm folded, in int8 by `quantize.integer_only` on 512 training images, as ONNX
(ONNX Runtime), LiteRT and StableHLO (JAX) files, beside float32 files of the same runtime; one
image at a time on --threads threads, all files in turn. Half the channels: of every group the half
with the smallest norms is cut out, not fine-tuned, so that only its speed counts. Agreement is
measured on the test images: `argmax` with the simulation in JAX (float32 with grids), `integers`
with the codes of the integer program, which rounds every accumulator twice as TensorFlow Lite's
reference kernels do, `rounded_once` with the same integers rounded once as these runtimes do.
all-MiniLM-L6-v2: int8 weights with activations quantized at run time, and int4 weights in blocks of
32, embeddings quantized too; Spearman on STS-Benchmark dev in ONNX Runtime and of the same weights
in JAX. jax_: one row times 4096 x 4096, as `experiments.benchmarks.matmul`. Files lie in --out if
it is given.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import sts
from experiments._report import Options, Report, run
from experiments.benchmarks import matmul
from experiments.data import cifar10_normalise, load_cifar10
from experiments.models import minilm, resnet_cifar
from jaxcompress.export.benchmarks import benchmark, outputs
from jaxcompress.export.litert_format.marked_program import marked_program
from jaxcompress.export.sessions import Session, session
from jaxcompress.graph import axes
from jaxcompress.prune.channels.choose import choose_groups
from jaxcompress.prune.channels.gate_scores import group_norms

TABLES = "(words|positions|segments)/embedding"


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""

    threads: int = 1
    """Of ONNX Runtime and LiteRT."""
    images: int = 10_000
    """Test images to compare on."""
    repeats: int = 200
    """Rounds of timing; the median counts."""


class Networks:
    """ResNet-20 as trained, and with half its channels, in float32 and as integer programs."""

    def __init__(self, args: Args):
        self.fn = resnet_cifar.folded_apply_fn(20)
        variables = resnet_cifar.load_pretrained(20)
        self.params = jax.tree.map(jnp.asarray, resnet_cifar.fold_batch_norm(variables))
        train = load_cifar10("train")[0]
        rows = np.random.default_rng(args.seed).choice(len(train), 512, replace=False)
        rows = rows[: 64 if args.short else None]
        batches = [cifar10_normalise(train[part]) for part in np.split(rows, len(rows) // 64)]
        self.program = jc.quantize.integer_only(self.fn, self.params, batches)
        found = axes(self.fn, self.params, batches[0])
        kept = choose_groups(dict(group_norms(found, self.params)), 0.5)
        half = jc.prune.shrink(self.fn, self.params, kept, batches[0], axes=found)
        self.half_fn, self.half_params = half.fn, half.params
        self.half = jc.quantize.integer_only(half.fn, half.params, batches)


def write_files(networks: Networks, folder: Path) -> dict[str, Path]:
    """All files by name, RUNTIME_WHAT."""
    one = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    suffixes = {"onnx": ".onnx", "litert": ".tflite", "jax": ".stablehlo"}
    writers = {"onnx": jc.export.onnx, "litert": jc.export.litert, "jax": jc.export.stablehlo}
    free = {"onnx": {"shapes": None}, "litert": {}, "jax": {}}
    files = {}
    for runtime, write in writers.items():
        sources: dict[str, tuple[Any, ...]] = {
            "float32": (networks.fn, networks.params, one),
            "int8": (networks.program,),
            "half_channels_float32": (networks.half_fn, networks.half_params, one),
            "half_channels_int8": (networks.half,),
        }
        for name, source in sources.items():
            path = folder / f"resnet20_{name}{suffixes[runtime]}"
            write(*source, path=path, **free[runtime] if len(source) == 3 else {})
            files[f"{runtime}_{name}"] = path
    return files


def of_resnet(args: Args, report: Report, folder: Path) -> dict[str, Any]:
    """Sizes, latencies and agreement of all files."""
    networks = Networks(args)
    files = write_files(networks, folder)
    images = load_cifar10("test")[0][: 100 if args.short else args.images]
    x = np.asarray(cifar10_normalise(images), np.float32)
    repeats = 3 if args.short else args.repeats
    found = benchmark(files, x[:1], threads=args.threads, repeats=repeats)
    figures, rows = {}, []
    for name, row in found.items():
        base = found[f"{name.split('_')[0]}_float32"]
        figures[f"{name}_bytes"], figures[f"{name}_latency_s"] = row.file_bytes, row.latency_s
        if not name.endswith("_float32") or "half" in name:
            figures[f"{name}_size_ratio"] = row.file_bytes / base.file_bytes
            figures[f"{name}_latency_ratio"] = row.latency_s / base.latency_s
        ratios = row.file_bytes / base.file_bytes, row.latency_s / base.latency_s
        rows.append((name, row.file_bytes, ratios[0], 1e3 * row.latency_s, ratios[1]))
    half = "half_channels_litert_int8_latency_ratio"
    figures[half] = figures["litert_half_channels_int8_latency_ratio"]
    columns = ("file", "bytes", "of float32", "ms, one image", "of float32")
    report.table("ResNet-20", columns, rows)
    return figures | agreement(report, networks, files, x)


def agreement(
    report: Report, networks: Networks, files: dict[str, Path], x: np.ndarray
) -> dict[str, Any]:
    """How often the int8 files say what the simulations say."""
    program = networks.program
    simulate, figures = jax.jit(marked_program(program)), {}
    parts = np.split(x, range(100, len(x), 100))
    simulated = np.concatenate([simulate(part) for part in report.progress(parts, "simulation")])
    integers = np.concatenate(
        [
            program.dequantize(program.run(program.quantize_input(jnp.asarray(part))))
            for part in report.progress(parts, "integers")
        ]
    )
    once = rounded_once(report, program, parts)
    step = float(program.grids[program.output].qparams.scale)
    for name in ("onnx_int8", "litert_int8", "jax_int8"):
        given = outputs(session(files[name]), x)
        figures[f"{name}_argmax_agreement"] = _same(given, simulated)
        figures[f"{name}_argmax_agreement_with_integers"] = _same(given, integers)
        figures[f"{name}_argmax_agreement_with_integers_rounded_once"] = _same(given, once)
        for what, known in (("integers", integers), ("integers_rounded_once", once)):
            apart = np.abs(np.rint((given - known) / step))
            figures[f"{name}_codes_apart_from_{what}_most"] = float(apart.max())
            figures[f"{name}_codes_equal_to_{what}"] = float((apart == 0).mean())
    return figures


def rounded_once(report: Report, program: Any, parts: Any) -> np.ndarray:
    """The outputs of the integers, every accumulator rounded once instead of twice."""

    def simulated(part: np.ndarray) -> np.ndarray:
        codes = program.simulate(program.quantize_input(jnp.asarray(part)), rounding="once")
        return np.asarray(program.dequantize(codes))

    first = simulated(parts[0])  # alone: it compiles what the threads share
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rest = report.progress(pool.map(simulated, parts[1:]), "rounded once")
        return np.concatenate([first, *rest])


def _same(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.argmax(-1) == b.argmax(-1)).mean())


def in_jax(loaded: Session) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The embeddings of a file as a function that a JAX program can call."""

    def embed(ids: jax.Array, mask: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((len(ids), 384), jnp.float32)
        run = lambda *inputs: loaded.run(*(np.asarray(x) for x in inputs))[0]
        return jax.pure_callback(run, shape, ids, mask)

    return embed


def of_minilm(args: Args, report: Report, folder: Path) -> dict[str, Any]:
    """Sizes and Spearman of float32, dynamic int8 and int4 blocks."""
    params, tokenizer, fn = minilm.load_pretrained(), minilm.load_tokenizer(), minilm.apply_fn()
    pairs = sts.load_sts("dev")
    if args.short:
        pairs = sts.Pairs(pairs.first[:32], pairs.second[:32], pairs.scores[:32])
    integer, weights = jc.formats.integer, jc.quantize.weights
    recipes = {
        "float32": jc.identity(),
        "int8": jc.by_path(
            {".*kernel": weights(integer(8), axis=-1), TABLES: weights(integer(8), axis=0)},
            default=jc.identity(),
        ),
        "int4": jc.by_path(
            {
                ".*kernel": weights(integer(4), axis=-1, group=32),
                TABLES: weights(integer(4), axis=0, group=32),
            },
            default=jc.identity(),
        ),
    }
    shape = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    figures, rows = {}, []
    for name, recipe in recipes.items():
        packed = recipe.pack(params, recipe.init(params))
        path = folder / f"minilm_{name}.onnx"
        jc.export.onnx(
            fn, packed, shape, shape, path=path, shapes=("batch, time", "batch, time"),
            constraints=("time <= 512",), products="float" if name == "float32" else "dynamic",
        )  # fmt: skip
        loaded = session(path, threads=args.threads)
        simulated = sts.sts_spearman(jax.tree_util.Partial(fn, jc.unpack(packed)), pairs, tokenizer)
        found = sts.sts_spearman(in_jax(loaded), pairs, tokenizer)
        figures[f"minilm_{name}_bytes"] = path.stat().st_size
        figures[f"minilm_{name}_spearman"] = float(found)
        figures[f"minilm_{name}_simulated_spearman"] = float(simulated)
        ratio = figures[f"minilm_{name}_bytes"] / figures["minilm_float32_bytes"]
        figures[f"minilm_{name}_size_ratio"] = ratio
        rows.append((name, figures[f"minilm_{name}_bytes"], ratio, found, simulated))
    columns = ("weights", "bytes", "of float32", "Spearman, file", "Spearman, JAX")
    report.table("all-MiniLM-L6-v2, ONNX Runtime", columns, rows)
    return figures


def main(args: Args, report: Report) -> dict[str, Any]:
    """Everything in one table each."""
    if min(args.threads, args.images, args.repeats) < 1:
        raise ValueError("--threads, --images and --repeats must be positive")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.out or temporary)
        figures = of_resnet(args, report, folder) | of_minilm(args, report, folder)
    products = matmul.main(matmul.Args(short=args.short, seed=args.seed), report)
    speedups = ("jax_w8a8_speedup", "jax_w4a8_speedup")
    return figures | {name: products[name] for name in speedups}


if __name__ == "__main__":
    run(main, "deploy")
