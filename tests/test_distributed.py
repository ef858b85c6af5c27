"""Two processes on this machine train together to the state of one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from _xla import COMPILE_QUICKLY

import jaxcompress as jc

pytestmark = pytest.mark.broad

CHILD = """
import json, os, sys
import jax, numpy as np, optax
import jax.numpy as jnp
folder, processes, index, steps, port = sys.argv[1], *map(int, sys.argv[2:])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
import jaxcompress as jc

assert jax.process_count() == processes and jax.device_count() == 2
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
along, everywhere = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("data",), ())
)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(48, 4, 4, 1)).astype(np.float32), rng.integers(0, 3, 48)
shapes = [{"w": (16, n), "v": (n, 3)} for n in (8, 16)]
weights = [
    {name: rng.normal(size=shape).astype(np.float32) for name, shape in network.items()}
    for network in shapes
]
fn = lambda p, x: jax.nn.relu(x.reshape(len(x), -1) @ p["w"]) @ p["v"]
recipe = jc.chain(
    jc.prune.magnitude(0.5), jc.by_path({".*": jc.quantize.weights(jc.formats.integer(8), axis=-1)})
)
tx = jc.prune.masked_optimizer(optax.sgd(0.05, momentum=0.9))
step = jc.train.make_step(jc.train.stateless(fn), tx, recipe=recipe, teacher=fn)
state = jc.train.create(jax.tree.map(jnp.asarray, weights[0]), recipe, tx)
crop = lambda k, x: jc.train.augment.random_crop(k, x, padding=1)
state = jc.train.fit(
    step,
    jc.train.place(state, everywhere),
    jc.train.batches(
        (x, y), size=8, seed=0, augment=jc.train.augment.on_inputs(crop), sharding=along
    ),
    steps=steps,
    teacher_params=jc.train.place(weights[1], everywhere),
    log=f"{folder}/log.jsonl",
    checkpoints=jc.train.Checkpoints(f"{folder}/saved", every=3),
)
if index == 0:
    found = jc.core.leaves_with_paths(jax.device_get(state))
    np.savez(f"{folder}/state.npz", **{path: leaf for path, leaf in found})
"""


PACKED = """
import os, sys
import jax, numpy as np
import jax.numpy as jnp
folder, processes, index, _, port = sys.argv[1], *map(int, sys.argv[2:])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
import jaxcompress as jc

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
axes = {"a": ("data",), "b": (None, "data"), "c": ()}
rng = np.random.default_rng(0)
params = {
    name: jc.train.place(
        rng.normal(size=shape).astype(np.float32),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes[name])),
    )
    for name, shape in {"a": (8, 200), "b": (64, 6), "c": (6,)}.items()
}
assert params["a"].is_fully_addressable == (processes == 1)
int8 = jc.quantize.weights(jc.formats.integer(8), axis=-1)
recipes = {
    "plain": jc.identity(),
    "int4": jc.quantize.weights(jc.formats.integer(4), axis=-1),
    "lsq": jc.quantize.lsq(4, axis=-1),
    "sparse": jc.chain(jc.prune.magnitude(0.7), int8),
    "sparse float": jc.prune.magnitude(0.97),
}
for name, recipe in recipes.items():
    packed = recipe.pack(params, recipe.update(params, recipe.init(params)))
    size = jc.export.save(f"{folder}/{name}", packed, activations={}, metadata={"of": name})
    assert size.file_bytes == os.path.getsize(f"{folder}/{name}")  # in every process
try:
    jc.export.save(f"/dev/null/{name}", params)
    raise SystemExit("written below a file")
except OSError as error:
    assert "process 0 could not" in str(error) or index == 0, error
"""


def test_two_processes_write_the_packed_files_of_one(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        run(PACKED, tmp_path / name, processes)
    files = sorted(os.listdir(tmp_path / "one"))
    assert len(files) == 5 and files == sorted(os.listdir(tmp_path / "two"))
    for name in files:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, name
        assert jc.export.load(tmp_path / "two" / name).metadata == {"of": name}


def train(folder, processes, steps):
    """The state and the log after `steps`, by processes with two devices between them."""
    run(CHILD, folder, processes, steps)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with np.load(folder / "state.npz") as file:
        return dict(file), rows


def run(code, folder, processes, steps=0):
    """Runs code in processes that have two devices between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY")}
    devices = f"--xla_force_host_platform_device_count={2 // processes}"
    env["XLA_FLAGS"] = f"{COMPILE_QUICKLY} {devices}"
    env["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "programs")
    command = [sys.executable, "-c", code, str(folder), str(processes)]
    children = [
        subprocess.Popen(
            [*command, str(index), str(steps), str(port)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        for child in children:
            _, errors = child.communicate(timeout=240)
            assert child.returncode == 0, errors
    finally:
        for child in children:
            child.kill()


def test_two_processes_train_and_resume_to_the_state_of_one(tmp_path):
    one, rows = train(tmp_path / "one", 1, 8)
    train(tmp_path / "two", 2, 4)
    two, split_rows = train(tmp_path / "two", 2, 8)  # from the checkpoint of step 4
    assert one.keys() == two.keys() and int(two["step"]) == 8
    for path, leaf in one.items():
        np.testing.assert_array_equal(two[path], leaf, err_msg=path)
    assert [row["step"] for row in split_rows] == list(range(1, 9))
    assert [row["loss"] for row in split_rows] == [row["loss"] for row in rows]
