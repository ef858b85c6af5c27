"""Question: can a digit classifier fit a microcontroller's budget and keep its accuracy?

    python -m experiments.quickstart --device stm32l4r5 --weight-bytes 8000

Trains a teacher on scikit-learn's 8x8 digits, distils a student, then prunes, quantizes and
distils the student further until its packed file fits the budget. Writes the packed file, a
report and a plot to runs/quickstart/, and reloads the file in a fresh process. About a minute on
two CPU cores; no download. Results: experiments/results/quickstart.json.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from experiments._plot import plot
from experiments._report import Options, Report, run, write_json
from experiments.data import Digits, load_digits_split
from experiments.evaluate import top1
from experiments.models import digits
from experiments.training import fit

BATCH = 64
LEARNING_RATE = 4e-3
FILE = "student.safetensors"


@dataclasses.dataclass(frozen=True)
class Args(Options):
    device: str = "stm32l4r5"
    """A name of jc.cost.devices() or a TOML file."""
    weight_bytes: int = 8000
    """Budget of the packed file, header included."""
    bits: int = 4
    """Bits of the weights, 2 to 8."""
    run_dir: Path = Path("runs/quickstart")
    """Folder of the packed file, the report and the plot."""


class Network(NamedTuple):
    """One line of the result: what a network is, and how to run it."""

    name: str
    apply_fn: Any  # (params, images) -> logits
    params: Any  # arrays
    packed: Any  # what ships
    activations: Any = None  # grids of the activations; None: float32


def student_model() -> digits.DigitsCNN:
    """The student: 18,154 parameters, a fifth of the teacher's."""
    return digits.DigitsCNN(features=(16, 32), hidden=96)


def recipe_for(bits: int, sparsity: float, *, steps: int) -> jc.Compressor:
    """Global magnitude pruning up to `sparsity`, then `bits` bits per output channel."""
    schedule = jc.prune.cubic(0.0, sparsity, start=0, end=max(steps // 2, 1), every=10)
    return jc.chain(
        jc.prune.magnitude(schedule, scope="global"),
        jc.by_path(
            {".*kernel": jc.quantize.weights(jc.formats.integer(bits), axis=-1)},
            default=jc.identity(),
        ),
    )


def file_bytes(packed: Any, grids: Any, bits: int) -> int:
    """Bytes on disk of a network and of the scales of its activations."""
    return jc.export.file_size(packed, activations=grids, metadata=metadata(bits)).file_bytes


def sparsity_for(params: Any, grids: Any, *, bits: int, budget: int) -> float:
    """The least sparsity, in steps of 1 %, whose file fits the budget, known before training.

    However the kept weights spread over the leaves, bitmask and codes take no more than
    sum_i ceil(n_i / 8) + ceil(kept * bits / 8) bytes and one per leaf.

    Raises:
      ValueError: no sparsity does; the message says by how much.
    """
    half = recipe_for(bits, 0.5, steps=1)
    state = half.update(params, half.init(params))
    packed = half.pack(params, state)
    sizes = [w.size for path, w in jc.core.leaves_with_paths(params) if path.endswith("kernel")]
    codes = sum(
        jc.packed_bytes(leaf.bitmask) + jc.packed_bytes(leaf.values.codes)
        for leaf in jax.tree.leaves(packed, is_leaf=jc.core.is_packed)
        if isinstance(leaf, jc.Masked)
    )
    # All that is not bitmask or codes, and room for longer numbers in the header.
    rest = file_bytes(packed, grids, bits) - codes + 64
    bound = [
        rest + len(sizes) + sum(-(-n // 8) for n in sizes) + -(-kept * bits // 8)
        for kept in (round((1 - percent / 100) * sum(sizes)) for percent in range(100))
    ]
    bound[0] = min(bound[0], rest + sum(-(-n * bits // 8) for n in sizes) + len(sizes))
    for percent, size in enumerate(bound):
        if size <= budget:
            return percent / 100
    raise ValueError(
        f"--weight-bytes {budget}: the smallest file of this network at {bits} bits has "
        f"{bound[-1]} bytes, {bound[-1] - budget} more than the budget"
    )


def planned_sparsity(args: Args, data: Digits) -> float:
    """`sparsity_for` of the untrained student: bytes depend on shapes, not on values."""
    model = student_model()
    image = jnp.asarray(data.train_images[:1])
    params = model.init(jax.random.key(args.seed), image)["params"]
    act = quantizer(digits.apply_fn(model))
    grids = act.grids(act.observe(act.init(params, image), params, image))
    return sparsity_for(params, grids, bits=args.bits, budget=args.weight_bytes)


def metadata(bits: int) -> dict[str, str]:
    """What the file says about itself."""
    return {"model": "digits_cnn", "weights": f"int{bits}"}


def quantizer(apply_fn: Any) -> jc.quantize.ActivationQuantizer:
    """Unsigned 8-bit activations: what enters every layer is an image or behind a relu."""
    return jc.quantize.activations(apply_fn, jc.formats.integer(8, symmetric=False))


def train_dense(model: Any, data: Digits, *, epochs: int, seed: int, report: Report, **teacher):
    """Adam on all training images; with `teacher` and `teacher_params` by distillation."""
    apply_fn = digits.apply_fn(model)
    params = model.init(jax.random.key(seed), jnp.asarray(data.train_images[:1]))["params"]
    teacher_params = teacher.pop("teacher_params", ())
    count = epochs * (len(data.train_images) // BATCH)
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, count))
    step = jc.train.make_step(jc.train.stateless(apply_fn), tx, **teacher)
    state = jc.train.create(params, jc.identity(), tx)
    name = "student" if teacher else "teacher"
    return fit(
        step,
        state,
        (data.train_images, data.train_labels),
        size=BATCH,
        steps=count,
        seed=seed,
        teacher_params=teacher_params,
        progress=lambda steps: report.progress(steps, name),
    ).params


def compress(
    teacher: Network,
    student: Network,
    data: Digits,
    args: Args,
    report: Report,
    *,
    sparsity: float,
):
    """Prunes, quantizes and distils the trained student into the budget."""
    epochs = 2 if args.short else 120
    count = epochs * (len(data.train_images) // BATCH)
    act = quantizer(student.apply_fn)
    statistics = act.init(student.params, data.train_images[:BATCH])
    recipe = recipe_for(args.bits, sparsity, steps=count)
    tx = jc.prune.masked_optimizer(optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, count)))
    step = jc.train.make_step(
        jc.train.stateless(student.apply_fn),
        tx,
        recipe=recipe,
        teacher=teacher.apply_fn,
        activations=act,
    )
    state = jc.train.create(student.params, recipe, tx, activations=statistics)
    history: list[tuple[int, float]] = []

    def evaluate(state):
        zeros = jc.prune.sparsity_of(recipe.apply(state.params, state.compress))
        history.append((int(state.step), zeros))
        return {"zeros": zeros}

    state = fit(
        step,
        state,
        (data.train_images, data.train_labels),
        size=BATCH,
        steps=count,
        seed=args.seed + 2,
        teacher_params=teacher.params,
        evaluate=evaluate,
        evaluate_every=max(count // 60, 1),
        progress=lambda steps: report.progress(steps, "compressed student"),
    )
    # Scales belong to the weights they were measured on: refresh them after the last step.
    final = recipe.update(state.params, state.compress)
    return recipe.pack(state.params, final), act.grids(state.activations), history


def predict_packed(packed: Any, grids: Any) -> jax.tree_util.Partial:
    """images -> logits of a packed student with quantized activations."""
    quantized = jc.quantize.with_activations(digits.apply_fn(student_model()))
    return jax.tree_util.Partial(quantized, grids, jc.unpack(packed))


def accuracy_of_file(path: Path) -> float:
    """Top-1 on the test images, of a packed file alone."""
    packed, grids, _ = jc.export.load(path)
    data = load_digits_split(0)
    return top1(predict_packed(packed, grids), data.test_images, data.test_labels)


def accuracy_in_fresh_process(path: Path) -> float:
    """The same, in another process that knows nothing but the file."""
    code = "import sys; from experiments.quickstart import *; print(accuracy_of_file(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main(args: Args, report: Report) -> dict[str, Any]:
    device = jc.cost.device(args.device)
    data = load_digits_split(args.seed)
    sparsity = planned_sparsity(args, data)  # before training: an impossible budget fails here
    dense = {"epochs": 2 if args.short else 80, "report": report}
    big, small = digits.teacher(), student_model()
    big_fn, small_fn = digits.apply_fn(big), digits.apply_fn(small)
    teacher_params = train_dense(big, data, seed=args.seed, **dense)
    teacher = Network("teacher", big_fn, teacher_params, teacher_params)
    student_params = train_dense(
        small, data, seed=args.seed + 1, teacher=big_fn, teacher_params=teacher_params, **dense
    )
    student = Network("student", small_fn, student_params, student_params)
    packed, grids, history = compress(teacher, student, data, args, report, sparsity=sparsity)
    small_network = Network("compressed student", small_fn, jc.unpack(packed), packed, grids)
    accuracies = [
        top1(jax.tree_util.Partial(n.apply_fn, n.params), data.test_images, data.test_labels)
        for n in (teacher, student)
    ] + [top1(predict_packed(packed, grids), data.test_images, data.test_labels)]
    networks = (teacher, student, small_network)
    rows = [
        describe(n, accuracy, device, args.bits)
        for n, accuracy in zip(networks, accuracies, strict=True)
    ]
    return ship(args, report, rows, packed, grids, sparsity, history)


def describe(network: Network, accuracy: float, device: Any, bits: int) -> dict:
    """One row of the table: measured accuracy and bytes, estimated cost of one image."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    cost = jc.cost.estimate(
        network.apply_fn, network.packed, image, device=device, activations=network.activations
    )
    return {
        "network": network.name,
        "top1_percent": accuracy,
        "memory_bytes": jc.packed_bytes((network.packed, network.activations)),
        "file_bytes": file_bytes(network.packed, network.activations, bits),
        "macs": cost.macs,
        "latency_s": cost.latency_s,
        "energy_j": cost.energy_j,
        "fits": str(cost.fits()),
    }


def ship(args, report, rows, packed, grids, sparsity, history) -> dict[str, Any]:
    """Writes packed file, report and plot; reloads the file elsewhere; prints the table."""
    teacher, student, small = rows
    path = args.run_dir / FILE
    size = jc.export.save(path, packed, activations=grids, metadata=metadata(args.bits))
    reloaded = accuracy_in_fresh_process(path)
    figures = {
        "teacher_top1_percent": teacher["top1_percent"],
        "dense_student_top1_percent": student["top1_percent"],
        "student_top1_percent": small["top1_percent"],
        "reloaded_top1_percent": reloaded,
        "packed_bytes": size.file_bytes,
        "payload_bytes": size.payload_bytes,
        "header_bytes": size.header_bytes,
        "budget_bytes": args.weight_bytes,
        "sparsity": sparsity,
        "weight_bits": args.bits,
        "teacher_bytes": teacher["file_bytes"],
        "macs": small["macs"],
        "latency_s": small["latency_s"],
        "energy_j": small["energy_j"],
        "device": args.device,
    }
    write_json(args.run_dir / "report.json", {**figures, "networks": rows})
    for folder in {args.run_dir, args.out} - {None}:
        draw(folder / "quickstart.png", rows, history, args)
    columns = ("network", "top-1 %", "memory B", "disk B", "MACs", "latency ms", "energy µJ")
    report.table(
        f"Handwritten digits on {args.device}: {sparsity:.0%} pruned, int{args.bits} weights, "
        f"uint8 activations, budget {args.weight_bytes} B",
        columns,
        [
            (
                *(r[k] for k in ("network", "top1_percent", "memory_bytes", "file_bytes", "macs")),
                1e3 * r["latency_s"],
                1e6 * r["energy_j"],
            )
            for r in rows
        ],
    )
    report.console.print(f"{small['fits']}; wrote {path} (again {reloaded:.1f} % when reloaded)")
    return figures


def draw(path: Path, rows: list[dict], history: list[tuple[int, float]], args: Args) -> None:
    """Accuracy against bytes on disk, and the sparsity that training went through."""
    with plot(path, columns=2, size=(9, 3.6)) as (left, right):
        for row in rows:
            left.plot(
                row["file_bytes"], row["top1_percent"], "o", markersize=9, label=row["network"]
            )
        left.axvline(args.weight_bytes, color="0.5", linestyle="--", label="budget")
        left.set(xscale="log", xlabel="bytes on disk", ylabel="top-1 on 500 test images, %")
        left.set_ylim(min(row["top1_percent"] for row in rows) - 2, 100.2)
        left.legend()
        right.plot(*zip(*history, strict=True))
        right.set(xlabel="step", ylabel="zeros among the weights", ylim=(0, 1))


if __name__ == "__main__":
    run(main, "quickstart")
