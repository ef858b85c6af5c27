"""The README's code runs, its commands parse, its figures are those of the committed results."""

import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "experiments" / "results"


def test_quick_start_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert sum(bool(line) for line in code.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "stm32l4r5" in printed and "814120 -> FileSize(" in printed
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.broad
def test_shipping_runs_as_printed(tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxruntime", "ai_edge_litert", "litert_converter"):
        pytest.importorskip(package)
    (code,) = re.findall(r"## Shipping\n.*?```py\n(.*?)```", README, re.S)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"kernel": normal(3, 3, 3, 8), "dense": normal(8, 5), "bias": normal(5)}

    def apply_fn(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jax.nn.relu(x), (1, 2)) @ params["dense"] + params["bias"]

    recipe = jc.by_path(
        {"kernel|dense": jc.quantize.weights(jc.formats.integer(4), axis=-1)}, default=jc.identity()
    )
    images = normal(16, 8, 8, 3)
    names = {
        "jc": jc,
        "apply_fn": apply_fn,
        "params": params,
        "packed": recipe.pack(params, recipe.init(params)),
        "batches": [images],
        "x": images[:1],
        "images": images,
    }
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names["logits"] = apply_fn(params, images)
        exec(compile(code, "README.md", "exec"), names)
    assert "onnx" in capsys.readouterr().out
    program = names["program"]
    simulated = program.dequantize(program.run(program.quantize_input(images)))
    measured = jc.export.benchmark(
        {"onnx": "int8.onnx", "litert": "int8.tflite"}, images, reference=simulated, repeats=1
    )
    for row in measured.values():  # the same integers, up to the rounding of accumulators
        step = float(program.grids[program.output].qparams.scale)
        assert row.largest_difference is not None and row.largest_difference < 2.5 * step
    assert {f.name for f in tmp_path.iterdir()} == {
        "int8.onnx", "int4.onnx", "dynamic.onnx",
        "int8.tflite", "micro.tflite", "dynamic.tflite", "model.stablehlo",
    }  # fmt: skip


def test_there_are_two_commands_and_ci_runs_the_second():
    commands = re.findall(r"```bash\n(.*?)```", README, re.S)
    first, second = (shlex.split(c) for c in commands[:2])
    assert "experiments.quickstart" in first and "pytest" in second
    assert first[:3] == second[:3] == ["pip", "install", "-e"]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def results():
    """Every committed row, by its path without the ending; NAME_runs.json has parts of rows."""
    files = [f for f in sorted(RESULTS.rglob("*.json")) if not f.stem.endswith("_runs")]
    return {str(f.relative_to(RESULTS).with_suffix("")): json.loads(f.read_text()) for f in files}


def test_figures_are_those_of_the_results():
    rows = results()
    part = re.search(r"<!-- results -->(.*?)<!-- end -->", README, re.S)
    assert part
    cited = re.findall(r"\[([\d.,]+)\]\(experiments/results/(\S+)\.json#(\w+)\)", part[1])
    assert len(cited) >= 30
    for shown, name, key in cited:
        digits = len(shown.partition(".")[2])
        assert f"{rows[name][key]:,.{digits}f}" == shown, (name, key)


def test_committed_results_name_their_commit_and_are_not_short():
    for name, row in results().items():
        assert row["commit"] and not row["short"], name
