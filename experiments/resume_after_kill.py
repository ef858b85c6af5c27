"""Does a run that is killed again and again end exactly where an undisturbed one ends?

Command   python -m experiments.resume_after_kill --json
Device    CPU, 2 cores, 1 and 8 virtual devices; about 5 minutes
Result    experiments/results/resume_after_kill.json

A small CNN learns the digits of scikit-learn from a teacher, pruned and quantized to int8 while it
trains, on augmented images, with a moving average and accumulated gradients, saved every third step
by Orbax. A first process trains undisturbed; a second run of the same command is killed (SIGKILL)
at random moments and started again each time: of four kills one comes before the process enters the
loop, one while it restores and takes its first steps, two among steps and saves. `kills_in_save`
counts those that left a checkpoint half written. What is compared are the bytes of every leaf of
the final state, and of the log.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments._report import Options, Report, run
from experiments.data import load_digits_split
from experiments.models import digits
from experiments.training import fit as fit_shifted
from jaxcompress.train import augment

BATCH = 64
LEARNING_RATE = 4e-3
SAVE_EVERY = 3
DEVICES = {"one_device": 1, "eight_devices": 8}
TEACHER = "teacher.safetensors"


@dataclasses.dataclass(frozen=True)
class Args(Options):
    kills: int = 20
    """SIGKILLs on each number of devices."""
    steps: int = 300
    """Of the training."""


class Setting(NamedTuple):
    """What a child is told."""

    folder: str
    name: str  # of the run in the folder
    devices: int
    steps: int
    seed: int


def train_teacher(path: Path, args: Args) -> None:
    """The teacher's params, in a file for the children."""
    model = digits.teacher()
    data = load_digits_split(args.seed)
    images = (data.train_images, data.train_labels)
    params = model.init(jax.random.key(args.seed), jnp.asarray(images[0][:1]))["params"]
    tx = optax.adam(LEARNING_RATE)
    step = jc.train.make_step(jc.train.stateless(digits.apply_fn(model)), tx)
    state = jc.train.create(params, jc.identity(), tx)
    steps = 20 if args.short else 400
    jc.export.save(path, fit_shifted(step, state, images, size=BATCH, steps=steps).params)


def child(setting: Setting) -> None:
    """One process of a run: trains on from wherever the one before was killed."""
    folder, name, devices, steps, seed = setting
    jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("data",), ())
    )
    data = load_digits_split(seed)
    model, big = digits.student(), digits.teacher()
    fn = digits.apply_fn(model)
    params = jax.jit(model.init)(jax.random.key(seed), data.train_images[:1])["params"]
    act = jc.quantize.activations(fn, jc.formats.integer(8, symmetric=False))
    recipe = jc.chain(
        jc.prune.magnitude(jc.prune.cubic(0.0, 0.8, start=0, end=steps // 2), scope="global"),
        jc.by_path(
            {".*kernel": jc.quantize.weights(jc.formats.integer(8), axis=-1)},
            default=jc.identity(),
        ),
    )
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    tx = jc.prune.masked_optimizer(optax.MultiSteps(optimizer, 2))  # type: ignore
    step = jc.train.make_step(
        jc.train.stateless(fn),
        tx,
        recipe=recipe,
        loss=jc.train.hinton_loss(temperature=optax.linear_schedule(6.0, 2.0, steps)),
        teacher=digits.apply_fn(big),
        activations=act,
        ema_decay=0.99,
    )
    example = data.train_images[:BATCH]

    @jax.jit  # one program of the cache instead of many small ones
    def create(params):
        statistics = act.init(params, example)
        return jc.train.create(params, recipe, tx, activations=statistics, with_ema=True)

    @jax.jit
    def evaluate(state):
        hits = fn(state.ema, test[0]).argmax(-1) == test[1]
        return {"top1_percent": 100 * jnp.mean(hits)}

    change = augment.on_inputs(lambda key, x: augment.random_crop(key, x, padding=1))
    test = jax.device_put((data.test_images, data.test_labels), everywhere)
    # Before the loop compiles or restores anything: from here on kills come by chance.
    print("training", flush=True)
    state = jc.train.fit(
        step,
        jc.train.place(create(params), everywhere),
        jc.train.batches(
            (data.train_images, data.train_labels),
            size=BATCH,
            seed=seed,
            augment=change,
            sharding=along,
        ),
        steps=steps,
        teacher_params=jc.train.place(jc.export.load(Path(folder) / TEACHER)[0], everywhere),
        log=f"{folder}/{name}.jsonl",
        checkpoints=jc.train.Checkpoints(
            f"{folder}/{name}", every=SAVE_EVERY, about=setting._replace(name="")._asdict()
        ),
        evaluate=evaluate,
        evaluate_every=50,
    )
    print(digest(state), flush=True)


def digest(state: Any) -> str:
    """SHA-256 over path, dtype and bytes of every leaf."""
    whole = hashlib.sha256()
    for path, leaf in jc.core.leaves_with_paths(jax.device_get(state)):
        whole.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return whole.hexdigest()


class Process(NamedTuple):
    """How one child went."""

    digest: str | None  # None: it was killed
    start_s: float  # until it entered the loop
    loop_s: float
    in_save: bool  # it left a checkpoint half written


class Kill(NamedTuple):
    """When: `delay_s` after the child has started, entered its loop or saved the step `after`."""

    delay_s: float
    after: str | int


def process(setting: Setting, kill: Kill | None = None) -> Process:
    """Runs a child, to its end or until it is killed."""
    code = "import sys, json; from experiments.resume_after_kill import *; "
    code += "child(Setting(**json.loads(sys.argv[1])))"
    # The libraries' own settings for numbers, not the tests'.
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY")}
    env["JAX_PLATFORMS"] = "cpu"
    devices = f"--xla_force_host_platform_device_count={setting.devices}"
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {devices}"  # the last of two counts is taken
    saved = Path(setting.folder) / setting.name
    errors = Path(setting.folder) / "errors.txt"
    command = [sys.executable, "-c", code, json.dumps(setting._asdict())]
    started_s, entered_s, reached_s, out = time.perf_counter(), None, None, b""
    with (
        errors.open("w") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=env) as done,
    ):
        assert done.stdout is not None
        os.set_blocking(done.stdout.fileno(), False)
        while done.poll() is None:
            out += done.stdout.read() or b""
            now_s = time.perf_counter()
            if entered_s is None and b"training" in out:
                entered_s = now_s
            if kill is not None and reached_s is None:
                if kill.after == "start":
                    reached_s = started_s
                elif kill.after == "loop":
                    reached_s = entered_s
                elif latest(saved) >= int(kill.after):
                    reached_s = now_s
            if kill is not None and reached_s is not None and now_s >= reached_s + kill.delay_s:
                done.kill()
            time.sleep(0.002)
        out += done.stdout.read() or b""
    if done.returncode not in (0, -9) or (kill is None and done.returncode):
        raise RuntimeError(f"a child ended with status {done.returncode}:\n{errors.read_text()}")
    end_s = time.perf_counter()
    killed = done.returncode == -9
    return Process(
        digest=None if killed else out.decode().split()[-1],
        start_s=(entered_s or end_s) - started_s,
        loop_s=end_s - (entered_s or end_s),
        in_save=killed and any(not p.name.isdigit() for p in saved.glob("*")),
    )


def latest(folder: Path) -> int:
    """The last step with a whole checkpoint."""
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def moment(k: int, whole: Process, args: Args, rng: np.random.Generator) -> Kill:
    """The k-th kill: before the loop, at its begin, or among steps and saves."""
    if k % 4 == 3:
        return Kill(rng.uniform(0, 0.9 * whole.start_s), "start")
    if k % 4 == 2:
        return Kill(rng.uniform(0, 1.5), "loop")
    # Within some saves after a share of the steps that leaves room for the kills to come.
    saves_s = 2 * SAVE_EVERY * whole.loop_s / args.steps
    step = args.steps * (k + rng.uniform()) / (args.kills + 4)
    return Kill(rng.uniform(0, saves_s), int(step))


def compare(setting: Setting, args: Args, report: Report) -> dict[str, Any]:
    """One undisturbed run and one that is killed; the figures of both."""
    rng = np.random.default_rng((args.seed, setting.devices))
    whole = process(setting._replace(name="whole"))
    pieces = setting._replace(name="pieces")
    kills: list[Process] = []
    for k in report.progress(range(args.kills), f"killing, {setting.devices} devices"):
        kills.append(process(pieces, moment(k, whole, args, rng)))
        if kills[-1].digest is not None:
            raise RuntimeError(f"the run ended before kill {k + 1}: give it more --steps")
    reached = latest(Path(pieces.folder) / pieces.name)
    last = process(pieces)
    logs = [Path(setting.folder) / f"{name}.jsonl" for name in ("whole", "pieces")]
    rows = jc.train.read_log(logs[0])
    return {
        "kills": len(kills),
        "kills_in_save": sum(k.in_save for k in kills),
        "kills_before_loop": sum(k.loop_s == 0 for k in kills),
        "steps_before_last_kill": reached,
        "state_identical": last.digest == whole.digest is not None,
        "log_identical": logs[0].read_bytes() == logs[1].read_bytes() and len(rows) > args.steps,
        "top1_percent": rows[-1]["eval_top1_percent"],
    }


def main(args: Args, report: Report) -> dict[str, Any]:
    if args.kills < 1 or args.steps < 50:
        raise ValueError(
            f"--kills must be at least 1 and --steps 50, got {args.kills}, {args.steps}"
        )
    if args.short:
        args = dataclasses.replace(args, kills=3, steps=90)
    figures = {}
    for name, devices in DEVICES.items():
        with tempfile.TemporaryDirectory() as folder:
            train_teacher(Path(folder) / TEACHER, args)
            setting = Setting(folder, "", devices, args.steps, args.seed)
            found = compare(setting, args, report)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    both = [
        all(figures[f"{name}_{part}_identical"] for name in DEVICES) for part in ("state", "log")
    ]
    total = {key: sum(figures[f"{n}_{key}"] for n in DEVICES) for key in ("kills", "kills_in_save")}
    figures = {**total, "bit_identical": all(both), "steps": args.steps, **figures}
    if not all(both):
        raise RuntimeError(f"the killed runs ended elsewhere: {figures}")
    return figures


if __name__ == "__main__":
    run(main, "resume_after_kill")
