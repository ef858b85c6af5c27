"""The streaming quantizer and the command line: exact files, resumption, errors on one line."""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from _trees import bits_equal

import jaxcompress as jc
from jaxcompress.cli import main
from jaxcompress.core.storage.container import of_bytes
from jaxcompress.export import container, load, save
from jaxcompress.export.checkpoint import stream_pack, stream_write
from jaxcompress.export.checkpoint.stream_read import inspect, open_source
from jaxcompress.export.checkpoint.streaming import quantize_file

pytestmark = pytest.mark.broad

INT4: dict[str, Any] = {"format": "int4", "group": 32}
SHAPES = {
    "model.embed.weight": (96, 64),
    "model.layers.0.q.weight": (48, 64),
    "model.layers.0/up": (40, 33),  # rows of codes that end inside a byte
    "model.layers.0.experts": (3, 16, 64),
    "model.norm.weight": (64,),
}


class Stopped(Exception):
    """What stands for a kill."""


def tensors(dtype: Any = np.float32, seed=0):
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    return {**tree, "steps": np.arange(3), "mask": np.array([True, False])}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(tensors(jnp.bfloat16), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards with an index, of the same tensors as `source`."""
    folder, tree = tmp_path / "shards", tensors(jnp.bfloat16)
    folder.mkdir()
    places = {name: f"model-0000{1 + k % 2}.safetensors" for k, name in enumerate(tree)}
    for file in set(places.values()):
        part = {name: tree[name] for name in tree if places[name] == file}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.fixture
def every_commit(monkeypatch):
    monkeypatch.setattr(stream_write, "COMMIT_S", 0.0)


def reference(tree, quantizer):
    """The packed tree in memory, by the library's own compressor."""
    floats = ("float32", "bfloat16", "float16")

    def pack(w):
        if w.ndim < 2 or w.dtype.name not in floats:
            return w
        return quantizer.pack(jnp.asarray(w), quantizer.init(jnp.asarray(w)))

    return {name: pack(w) for name, w in tree.items()}


def only(tmp_path, *names):
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


EMBED, UP, EXPERTS = "model.embed.weight", "model.layers.0/up", "model.layers.0.experts"
TALL = "tall"  # blocks for several runs of double quantization
# format, settings, dtype, tensors: every one costs a compilation per shape
CASES: dict[str, Any] = {
    "int4 in groups": ("int4", {"group": 32}, "bfloat16", (EMBED, UP, EXPERTS)),
    "int8 of Flax": ("int8", {"axis": -1}, "float32", (EMBED,)),
    "uint3 in ragged groups": ("uint3", {"group": 5, "axis": -1}, "float32", (UP,)),
    "one scale": ("int8", {"axis": None}, "float16", (UP,)),
    "middle axis": ("int4", {"axis": 1, "group": 8}, "float32", (EXPERTS,)),
    "mxfp4": ("mxfp4", {}, "bfloat16", (UP,)),
    "mxint8 flat": ("mxint8", {"axis": None}, "float32", (UP,)),
    "nvfp4": ("nvfp4", {}, "bfloat16", (EMBED,)),
    "nf4": ("nf4", {}, "bfloat16", (TALL,)),
    "nf4 flat": ("nf4", {"axis": None, "group": 4}, "float32", (EMBED,)),
    "ternary": ("ternary", {}, "bfloat16", (UP,)),
    "fixed point": ("q2.5", {"axis": None}, "float32", (UP,)),
    "clipped": ("int3", {"group": 16, "calibrate": "percentile:90"}, "bfloat16", (EMBED,)),
    "clipped tensor": ("int3", {"axis": None, "calibrate": "octav"}, "float32", (EMBED,)),
}
WHOLE = {"middle axis", "clipped tensor"}  # no slice has all that its scales need


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_that_of_save_and_slices_change_nothing(tmp_path, monkeypatch, case):
    name, how, dtype, weights = CASES[case]
    tree = tensors(jnp.dtype(dtype))
    tree[TALL] = np.random.default_rng(1).normal(size=(600, 70)).astype(dtype)
    tree = {key: tree[key] for key in (*weights, "model.norm.weight", "steps", "mask")}
    safetensors.numpy.save_file(tree, tmp_path / "in.safetensors")
    rule = stream_pack.calibrator(how["calibrate"]) if "calibrate" in how else None
    format = jc.formats.parse(name)
    where = {"axis": how.get("axis", 0), "group": how.get("group")}
    packed = reference(tree, jc.quantize.weights(format, **where, calibrate=rule))
    size = save(tmp_path / "whole", _nested(packed))
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "a", format=name, **how)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (report.payload_bytes, report.file_bytes) == (size.payload_bytes, size.file_bytes)
    assert (report.tensors, report.quantized) == (len(weights) + 3, len(weights))
    leaves = [x for x in packed.values() if isinstance(x, jc.QTensor)]
    assert report.bits_per_weight == 8 * jc.packed_bytes(leaves) / sum(x.size for x in leaves)

    monkeypatch.setattr(stream_pack, "SLICE_ELEMENTS", 1024)
    settings = stream_pack.Settings(format, jc.formats.granularity_for(format, **where), rule)
    shape = (64, 32, 8) if case == "middle axis" else (1024, 64)
    cut = stream_pack.slicing(shape, jnp.dtype(dtype), settings)
    assert (len(cut.rows) == 1) == (case in WHOLE)
    quantize_file(tmp_path / "in.safetensors", tmp_path / "b", format=name, **how)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "whole").read_bytes()


def _nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def test_load_gives_the_view_bit_for_bit(tmp_path, source):
    quantize_file(source, tmp_path / "out", **INT4)
    loaded, grids, metadata = load(tmp_path / "out")
    assert not grids and metadata == {"format": "pt"}
    params = {k: jnp.asarray(w) for k, w in tensors(jnp.bfloat16).items() if k.endswith("q.weight")}
    comp = jc.quantize.weights(jc.formats.integer(4), axis=0, group=32)
    view = comp.apply(params, comp.init(params))
    assert bits_equal({k: jc.unpack(loaded[k]) for k in view}, view)
    assert loaded["steps"].dtype == np.int64 and loaded["mask"].dtype == bool
    assert loaded["model.norm.weight"].dtype == jnp.bfloat16


def test_shards_and_their_index_give_the_same_file(tmp_path, source, shards):
    index = shards / "model.safetensors.index.json"
    for name, given in {"a": source, "b": shards, "c": index}.items():
        quantize_file(given, tmp_path / name, **INT4)
    index.unlink()
    quantize_file(shards, shards / "packed.safetensors", **INT4)
    # What lies in the folder from an earlier run is no shard.
    quantize_file(shards, shards / "packed.safetensors", **INT4, force=True)
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c", shards / "packed.safetensors"]
    assert len({file.read_bytes() for file in files}) == 1


def test_rules_and_axes_choose_what_is_quantized(tmp_path, source):
    how: dict[str, Any] = {"include": r"model\.(layers|embed).*", "exclude": r".*experts"}
    assert quantize_file(source, tmp_path / "a", **INT4, **how).quantized == 3
    assert isinstance(load(tmp_path / "a").params["model.layers.0.experts"], jax.Array)
    assert quantize_file(source, tmp_path / "b", **INT4, min_dims=3).quantized == 1
    stacked = quantize_file(source, tmp_path / "c", format="int8", axis=(0, 1), min_dims=3)
    assert stacked.bits_per_weight == 8 + 32 / 64
    assert quantize_file(source, tmp_path / "d", **INT4, min_dims=1).quantized == 5


def stop_after(count):
    def progress(at):
        if at.done_tensors >= count:
            raise Stopped

    return progress


def test_interrupted_anywhere_the_file_is_the_same(tmp_path, source, every_commit):
    quantize_file(source, tmp_path / "whole", **INT4)
    reports = []
    for count in (1, 1, 3, 6):
        with pytest.raises(Stopped):
            quantize_file(source, tmp_path / "out", **INT4, progress=stop_after(count))
        only(tmp_path, "in.safetensors", "whole", ".out.part", ".out.journal")
    report = quantize_file(source, tmp_path / "out", **INT4, progress=reports.append)
    assert report.resumed == 6 and reports[0].note == "goes on after 6 tensors"
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    only(tmp_path, "in.safetensors", "whole", "out")
    bytes_done = [at.done_bytes for at in reports]
    assert bytes_done == sorted(bytes_done) and bytes_done[-1] == report.source_bytes


def test_a_killed_process_is_resumed(tmp_path, source):
    quantize_file(source, tmp_path / "whole", **INT4)
    code = (
        "import os, signal, sys; from jaxcompress.export.checkpoint import stream_write, streaming;"
        "stream_write.COMMIT_S = 0.0;"
        "kill = lambda at: at.done_tensors == 4 and os.kill(os.getpid(), signal.SIGKILL);"
        "streaming.quantize_file(*sys.argv[1:], format='int4', group=32, progress=kill)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with (tmp_path / ".out.journal").open("a") as journal:
        journal.write('\n["model.nor')  # a line that the kill has torn
    command = [sys.executable, "-m", "jaxcompress", "quantize", str(source), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--format", "int4", "--group", "32", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "goes on after 4 tensors" in done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["resumed"] == 4 and row["quantized"] == 4 and row["quantize_s"] > 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    only(tmp_path, "in.safetensors", "whole", "out")


def _touch(source):
    os.utime(source, ns=(1, 1))


CHANGES: dict[str, Any] = {
    "settings": (lambda source: None, {"format": "int3", "group": 32}, "have changed"),
    "clipping": (lambda source: None, {**INT4, "calibrate": "min_max"}, "have changed"),
    "source": (_touch, INT4, "have changed"),
    "no resumption": (lambda source: None, {**INT4, "resume": False}, "as asked"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_starts_over(tmp_path, source, every_commit, change):
    act, how, note = CHANGES[change]
    with pytest.raises(Stopped):
        quantize_file(source, tmp_path / "out", **INT4, progress=stop_after(3))
    act(source)
    quantize_file(source, tmp_path / "whole", **how)
    reports = []
    report = quantize_file(source, tmp_path / "out", **how, progress=reports.append)
    assert report.resumed == 0 and note in reports[0].note
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_source_that_changed_with_its_size_and_time_is_seen(tmp_path, source, every_commit):
    with pytest.raises(Stopped):
        quantize_file(source, tmp_path / "out", **INT4, progress=stop_after(5))
    kept = os.stat(source)
    safetensors.numpy.save_file(tensors(jnp.bfloat16, seed=1), source, metadata={"format": "pt"})
    os.utime(source, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as `cp -p` does
    assert os.stat(source).st_size == kept.st_size
    quantize_file(source, tmp_path / "whole", **INT4)
    reports = []
    report = quantize_file(source, tmp_path / "out", **INT4, progress=reports.append)
    assert "4 of them have changed and are written again" in reports[0].note
    assert report.resumed == 1  # `mask` is what it was
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_bit_that_flipped_in_the_part_file_is_seen(tmp_path, source, every_commit):
    quantize_file(source, tmp_path / "whole", **INT4)
    with pytest.raises(Stopped):
        quantize_file(source, tmp_path / "out", **INT4, progress=stop_after(5))
    part = bytearray((tmp_path / ".out.part").read_bytes())
    last = max(place for place, byte in enumerate(part) if byte)
    part[last] ^= 1
    (tmp_path / ".out.part").write_bytes(part)
    quantize_file(source, tmp_path / "out", **INT4)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


LIMITED = """
import os, resource, sys
import numpy as np
import jaxcompress as jc
from jaxcompress.export.checkpoint.streaming import quantize_file
source, target, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
calls = {
    "save": lambda: jc.export.save(target, {"w": np.zeros(100_000, np.float32)}),
    "quantize": lambda: quantize_file(source, target, format="int8"),
    "cache": lambda: jc.distill.cached_outputs(
        os.path.dirname(target), lambda p, x: x @ p, np.ones((3, 900), "f4"), np.ones((30, 3), "f4")
    ),
}
for name, call in calls.items():
    try:
        call()
        print(name, "no error")
    except OSError as error:
        print(name, error.errno, sorted(os.listdir(os.path.dirname(target))))
"""


def test_a_limit_of_file_sizes_leaves_no_part_behind(tmp_path, source):
    pytest.importorskip("resource")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "out" / "file"), "4096"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} 27 []" for name in ("save", "quantize", "cache")]


def test_own_calibrators_and_formats_serve_but_are_not_resumed(tmp_path, source, every_commit):
    how = {
        "format": jc.formats.codebook("three", (-1.0, 0.0, 1.0)),
        "calibrate": jc.quantize.min_max(),
    }
    with pytest.raises(Stopped):
        quantize_file(source, tmp_path / "out", **how, progress=stop_after(3))
    assert quantize_file(source, tmp_path / "out", **how).resumed == 0
    leaf = load(tmp_path / "out", formats=[how["format"]]).params["model.embed.weight"]
    assert leaf.format == how["format"]


def test_a_part_file_of_a_running_process_is_left_alone(tmp_path, source):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".out.part").open("wb") as file:
        file.write(b"of another run")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing this target"):
            quantize_file(source, tmp_path / "out", **INT4)
    assert (tmp_path / ".out.part").read_bytes() == b"of another run"


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, source, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(stream_write.shutil, "disk_usage", lambda path: usage)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--format", "int4"]) == 2
    assert "bytes, 100 are free" in capsys.readouterr().err
    only(tmp_path, "in.safetensors")


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, source):
    touch = lambda at: os.utime(source, ns=(at.done_tensors, at.done_tensors))
    with pytest.raises(ValueError, match="in.safetensors: has changed while it was read"):
        quantize_file(source, tmp_path / "out", **INT4, progress=touch)
    only(tmp_path, "in.safetensors")


def test_not_finite_numbers_name_the_tensor_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_pack, "SLICE_ELEMENTS", 700)
    tree = {"norm": np.ones(3), "q.weight": np.ones((32, 64), np.float32)}
    tree["q.weight"][30, 3] = np.inf
    safetensors.numpy.save_file(tree, tmp_path / "in.safetensors")
    (tmp_path / "out").write_bytes(b"before")
    for name in ("int4", "nvfp4", "nf4"):
        with pytest.raises(ValueError, match="^q.weight: .*finite, got NaN or Inf"):
            quantize_file(tmp_path / "in.safetensors", tmp_path / "out", format=name, force=True)
    only(tmp_path, "in.safetensors", "out")
    assert (tmp_path / "out").read_bytes() == b"before"


def _cut(source):
    source.write_bytes(source.read_bytes()[:-5])


def _wide(source):
    safetensors.numpy.save_file({"a.weight": np.ones((4, 4))}, source)


def _packed(source):
    save(source, {"a": jnp.ones((4, 4))})


def _own_dtype(source):
    raw = source.read_bytes()
    source.write_bytes(raw.replace(b'"BF16"', b'"F4_A"'))


def _below(source):
    safetensors.numpy.save_file({"a": np.ones((4, 4)), "a/b": np.ones((4, 4))}, source)


def _twins(source):
    tree = {"a": np.ones((4, 4), np.float32), "a.codes": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tree, source)


ERRORS = {
    "truncated": (_cut, [], "in.safetensors: truncated"),
    "float64": (_wide, [], "a.weight: float64 needs jax_enable_x64; or exclude"),
    "packed": (_packed, [], "in.safetensors: is packed already"),
    "dtype": (_own_dtype, [], "malformed: dtype 'F4_A' is none of BOOL, U8"),
    "nested names": (_below, [], "leaf 'a/b' lies below leaf 'a'"),
    "clash": (_twins, [], "two leaves are named 'a.codes'"),
    "no source": (lambda s: s.unlink(), [], "No such file"),
    "format": (None, ["--format", "imt4"], "unknown format 'imt4'; known: .* nearest: int4"),
    "axis": (None, ["--axis", "rows"], "--axis must be integers such as 0, -1 or 0,1, or none"),
    "axis range": (None, ["--axis", "2"], r"model\.\S+: axis 2 is out of range for shape"),
    "group": (None, ["--group", "0"], "group must be an integer of at least 1, got 0"),
    "include": (None, ["--include", "model.laiers.*"], "matches no parameter; nearest: 'model.lay"),
    "nothing": (None, ["--include", "steps"], "no tensor to quantize: .* 'steps' matches none"),
    "all excluded": (None, ["--exclude", ".*"], "exclude '.*' takes all that include matches"),
    "shadowed": (None, ["--exclude", ".*", "--include", "m.*"], "rule 'm.*' never applies"),
    "calibrate": (None, ["--calibrate", "mean"], "unknown calibrator 'mean'; known: min_max"),
    "percentile": (None, ["--calibrate", "percentile:20"], "percent must be above 50"),
    "no format": (None, None, "the following arguments are required: --format"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_status_2(tmp_path, source, capsys, case):
    change, flags, message = ERRORS[case]
    if change:
        change(source)
    flags = ["--format", "int4", *flags] if flags is not None else []
    assert main(["quantize", str(source), str(tmp_path / "out"), *flags]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "error: " in line
    assert re.search(message, line), line
    only(tmp_path, *(["in.safetensors"] if source.exists() else []))


def test_targets_are_not_overwritten_unasked(tmp_path, source, capsys):
    run = lambda target, *flags: main(["quantize", str(source), str(target), *map(str, flags)])
    (tmp_path / "out").write_bytes(b"before")
    assert run(tmp_path / "out", "--format", "int4") == 2
    assert "exists; --force" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == b"before"
    assert run(source, "--format", "int4", "--force") == 2
    assert "is a file of the source" in capsys.readouterr().err
    assert run(tmp_path, "--format", "int4", "--force") == 2
    assert "is a folder" in capsys.readouterr().err
    assert run(tmp_path / "out", "--format", "int4", "--force", "--axis", "-1") == 0
    assert "4 of 7 tensors quantized to 4." in capsys.readouterr().out
    assert load(tmp_path / "out").params["model.embed.weight"].granularity.axis == (-1,)


def _rewrite(shards, change):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_indices_that_do_not_fit_are_refused(tmp_path, shards):
    index = shards / "model.safetensors.index.json"
    good = index.read_text()
    cases = {
        "should hold 'ghost', it does not": lambda m: m.update(ghost="model-00001.safetensors"),
        "which .* does not place there": lambda m: m.pop("steps"),
        "shard 'x.safetensors' does not exist": lambda m: m.update(steps="x.safetensors"),
        "must lie in the index's own folder": lambda m: m.update(steps="../x.safetensors"),
    }
    for message, change in cases.items():
        index.write_text(good)
        _rewrite(shards, change)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(shards)
    for text in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="needs an object 'weight_map'"):
            open_source(index)
    index.unlink()
    (shards / "copy.safetensors").write_bytes((shards / "model-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="'model.embed.weight' is in copy.safetensors too"):
        open_source(shards)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        open_source(tmp_path / "empty")


def test_small_floats_and_empty_tensors_pass_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "w": rng.normal(size=(8, 8)).astype(np.float16),
        "e4m3": rng.normal(size=(8, 8)).astype(jnp.float8_e4m3fn),
        "e5m2": rng.normal(size=(8,)).astype(jnp.float8_e5m2),
        "none": np.zeros((0, 8), np.float32),
        "one": np.float32(3).reshape(()),
    }
    (tmp_path / "in").write_bytes(container.encode(tree, {})[0])
    assert quantize_file(tmp_path / "in", tmp_path / "out", format="int8").quantized == 2
    params = load(tmp_path / "out").params
    for name in ("e4m3", "e5m2", "one"):
        assert np.asarray(params[name]).tobytes() == tree[name].tobytes()
        assert params[name].dtype == tree[name].dtype
    assert jc.unpack(params["none"]).shape == (0, 8)
    assert jc.unpack(params["w"]).dtype == jnp.float16


def test_inspect_lists_every_kind_of_leaf(tmp_path, capsys):
    comp = jc.chain(jc.prune.magnitude(0.9), jc.quantize.weights(jc.formats.nf4(), axis=0))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 96)), jnp.bfloat16)}
    pruned = jc.prune.magnitude(0.9)
    tree = {
        "dense": {"sparse": comp.pack(params, comp.init(params))["w"], "bias": jnp.ones(3)},
        "values": pruned.pack(params, pruned.init(params))["w"],
    }
    size = save(tmp_path / "p", tree)
    leaves = {leaf.name: leaf for leaf in inspect(tmp_path / "p")}
    assert sum(leaf.stored_bytes for leaf in leaves.values()) == size.payload_bytes
    sparse = leaves["dense/sparse"]
    assert sparse.format == "nf4" and sparse.sparse and sparse.shape == (64, 96)
    assert sparse.bits_per_weight == tree["dense"]["sparse"].bits_per_weight
    assert leaves["values"].bits_per_weight == tree["values"].bits_per_weight
    assert main(["inspect", str(tmp_path / "p")]) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "format", "shape", "bits/weight", "bytes"]
    assert rows[0].split() == ["dense/bias", "float32", "3", "32.000", "12"]
    assert total.split() == ["3", "leaves", f"{size.payload_bytes:,}"]
    assert main(["inspect", "--json", str(tmp_path / "p")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["payload_bytes"] == size.payload_bytes and len(row["leaves"]) == 3
    assert main(["inspect", str(tmp_path / "q")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_devices_help_and_ctrl_c(tmp_path, source, capsys, monkeypatch):
    assert main(["devices"]) == 0
    assert capsys.readouterr().out.split() == list(jc.cost.devices())
    assert main(["--help"]) == 0 and "quantize" in capsys.readouterr().out
    assert main([]) == 2

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxcompress.cli.quantize_file", stop)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--format", "int4"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_line_that_says_how_to_get_it(
    tmp_path, capsys, monkeypatch
):
    params = {"w": jnp.ones((3, 2))}
    save(tmp_path / "a.safetensors", params)
    (tmp_path / "of_a_user.py").write_text("def apply(p, x):\n    return x @ p['w']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    line = ["export", str(tmp_path / "a.safetensors"), str(tmp_path / "a.tflite")]
    status = main([*line, "--model", "of_a_user:apply", "--input", "float32[1,3]"])
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert error.startswith("error: LiteRT files need the package litert-converter")
    assert not (tmp_path / "a.tflite").exists()


def test_tensors_of_every_dtype_of_the_format_are_copied(tmp_path):
    sizes = {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
             "C64": 64, "U16": 16, "BF16": 16}  # fmt: skip
    rng, header, data = np.random.default_rng(0), {}, b""
    for name, bits in sizes.items():
        for rows in (2, 700):  # in pools, and under their own names
            part = rng.bytes(rows * 8 * bits // 8)
            place = [len(data), len(data) + len(part)]
            shape = {"shape": [rows, 8], "data_offsets": place}
            header[f"{name}.{rows}"] = {"dtype": name, **shape}
            data += part
    kernel = rng.normal(size=(4, 8)).astype(np.float32).tobytes()
    place = [len(data), len(data) + len(kernel)]
    header["w"] = {"dtype": "F32", "shape": [4, 8], "data_offsets": place}
    text = json.dumps(header).encode()
    (tmp_path / "in").write_bytes(len(text).to_bytes(8, "little") + text + data + kernel)
    how = ["--format", "int8", "--exclude", "BF16.*"]
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), *how]) == 0
    found = load(tmp_path / "out").params
    for name, entry in header.items():
        if name != "w":
            first, last = entry["data_offsets"]
            array = np.asarray(found[name])
            assert container.to_bytes(array) == data[first:last], name
            assert list(array.shape) == entry["shape"]
    save(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out").read_bytes()
    # The known codes of the smallest format, the first element in the low bits: 0.5, -6.
    four = of_bytes(np.array([0xF1], np.uint8), np.dtype("float4_e2m1fn"), (2,))
    assert four.astype(np.float32).tolist() == [0.5, -6.0]
    rows = {leaf.name: leaf.stored_bytes for leaf in inspect(tmp_path / "out")}
    assert rows["F6_E2M3.700"] == 700 * 8 * 6 // 8 and rows["F4.2"] == 8


FOREIGN = {
    "plain": (["model.embed.weight", "model.norm.weight"], "a plain safetensors file of 2 tensors"),
    "gptq": (["q.qweight", "q.qzeros", "q.scales", "q.g_idx"], "a GPTQ checkpoint"),
    "awq": (["q.qweight", "q.qzeros", "q.scales"], "an AWQ or GPTQ checkpoint"),
    "compressed-tensors": (["q.weight_packed", "q.weight_scale"], "a compressed-tensors"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_others_are_named_with_what_to_do(tmp_path, capsys, kind):
    names, message = FOREIGN[kind]
    path = tmp_path / "f.safetensors"
    safetensors.numpy.save_file({name: np.ones((2, 2), np.float32) for name in names}, path)
    with pytest.raises(ValueError, match=f"f.safetensors: it is {message}.*jaxcompress quantize"):
        load(path)
    how = ["--model", "math:sqrt", "--input", "float32[1,2]", "--device", "stm32l4r5"]
    assert main(["cost", str(path), *how]) == 2
    assert message in capsys.readouterr().err
    assert main(["inspect", str(path)]) == 0
    seen = capsys.readouterr()
    assert message in seen.err and names[0] in seen.out


def test_files_that_are_no_safetensors_are_named(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(100))
    (tmp_path / "m.bin").write_bytes(b"PK\x03\x04" + bytes(range(200)))
    for name, message in (("m.gguf", "it is a GGUF file"), ("m.bin", "a zip archive")):
        with pytest.raises(ValueError, match=f"{name}: .*{message}.*jaxcompress quantize"):
            load(tmp_path / name)
        assert main(["inspect", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_a_command_quietly(tmp_path):
    save(tmp_path / "p", {f"leaf {k}": np.ones(3, np.float32) for k in range(20_000)})
    command = f"{sys.executable} -m jaxcompress inspect {tmp_path / 'p'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("name") and done.stdout.count("\n") == 1 and not done.stderr


def never(*arguments):
    raise AssertionError("the model was built before the arguments were checked")


COST = ["cost", "{p}", "--model", "test_cli:never()", "--input", "float32[1,3]"]
EXPORT = ["export", "{p}", "--model", "test_cli:never()", "--input", "float32[1,3]"]
WRONG = {
    "device": ([*COST, "--device", "stm32l4"], "unknown device 'stm32l4'"),
    "input": ([*COST[:-1], "float33[1]", "--device", "stm32l4r5"], "--input must be DTYPE"),
    "no file": (["cost", "{p}x", *COST[2:], "--device", "stm32l4r5"], "px: no such file"),
    "target": ([*EXPORT, "{p}.pb"], "target must be"),
    "target is source": ([*EXPORT[:1], "{p}.onnx", *EXPORT[2:], "{p}.onnx"], "the file that is"),
    "dynamic": ([*EXPORT, "{p}.stablehlo", "--dynamic"], "--dynamic is for"),
    "runtime": ([*EXPORT, "{p}.onnx", "--runtime", "micro"], "--runtime is for *.tflite"),
    "dynamic micro": (
        [*EXPORT, "{p}.tflite", "--runtime", "micro", "--dynamic"],
        "--dynamic is not for",
    ),
    "calibration": ([*EXPORT, "{p}.onnx", "--integers", "no.npy"], "no.npy: no such file"),
    "threads": (["bench", "{p}.onnx", "--threads", "0"], "--threads must be at least 1, got 0"),
    "kind": (["bench", "{p}.pt"], "bench reads"),
    "second file": (["bench", "{p}.onnx", "{p}.tflite"], "p.tflite: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_are_checked_before_anything_is_read_or_run(tmp_path, capsys, case):
    path = str(tmp_path / "p")
    save(path, {"w": jnp.ones(3)})
    (tmp_path / "p.onnx").write_bytes(b"none")
    arguments, message = WRONG[case]
    assert main([a.replace("{p}", path) for a in arguments]) == 2
    assert message in capsys.readouterr().err
