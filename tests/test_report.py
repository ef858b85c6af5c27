"""The frame of the experiments: one JSON line, one error line, whole files or none."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _report
from experiments._report import Options, Report, checked, commit, run, write_json
from experiments.benchmarks import select as select_benchmark
from jaxcompress.cost.timing.clock import interleaved

pytestmark = pytest.mark.broad


@dataclasses.dataclass(frozen=True)
class Args(Options):
    epochs: int = 2
    """Passes over the data."""


def train(args: Args, report: Report) -> dict:
    print("a library prints")
    report.console.print("a table")
    steps = sum(report.progress(range(args.epochs), "training"))
    if args.epochs > 9:
        raise ValueError(f"too\nmany epochs: {args.epochs}")
    return {"top1_percent": jnp.float32(91.5), "steps": steps, "quick": args.short}


def test_json_is_the_last_line_and_the_only_one(capsys):
    row = run(train, "demo", argv=["--json", "--seed", "3", "--short", "--epochs", "4"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and json.loads(out) == row
    assert "a table" in err and "a library prints" in err
    expected = {"top1_percent": 91.5, "steps": 6, "quick": True, "seed": 3, "short": True}
    assert expected.items() <= row.items() and row["name"] == "demo"
    versions = {f"{p}_version" for p in ("jax", "flax", "optax", "jaxcompress", "python")}
    assert versions | {"commit"} <= set(row)
    assert row["python_version"] == sys.version.split()[0]


def test_without_json_the_figures_are_a_table(capsys):
    run(train, "demo", argv=[])
    out, err = capsys.readouterr()
    assert "a table" in out and "top1_percent" in out and "91.5" in out and not err


def test_out_holds_the_row_and_nothing_else(tmp_path, capsys):
    folder = tmp_path / "made" / "results"
    row = run(train, "demo", argv=["--out", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["demo.json"]
    assert json.loads((folder / "demo.json").read_text()) == row
    capsys.readouterr()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors_are_one_line_and_write_nothing(flags, tmp_path, capsys):
    folder = tmp_path / "results"
    with pytest.raises(SystemExit) as stopped:
        run(train, "demo", argv=["--epochs", "10", "--out", str(folder), *flags])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: too many epochs: 10" and "Traceback" not in err
    assert "{" not in out and not folder.exists()


def test_out_that_is_a_file_stops_the_run_before_it_starts(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit):
        run(train, "demo", argv=["--out", str(tmp_path / "taken")])
    out, err = capsys.readouterr()
    assert "error: --out must be a folder" in err and "a library prints" not in out


def test_bugs_keep_their_traceback():
    def broken(args: Options, report: Report) -> dict:
        del args, report
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(broken, "demo", argv=[])


def test_unknown_flags_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        run(train, "demo", argv=["--sed", "3"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        run(train, "demo", argv=["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "one error line" in out and "Passes over the data." in out and "--json" in out


def test_checked_figures():
    assert checked({"a_s": np.float64(1), "b2": np.bool_(True), "c": jnp.int32(2), "d": None}) == {
        "a_s": 1.0,
        "b2": True,
        "c": 2,
        "d": None,
    }
    for key in ("latencyS", "two__bars", "2nd", "seed", "jax_version"):
        with pytest.raises(ValueError, match=f"figure '{key}' must be snake_case"):
            checked({key: 1})
    with pytest.raises(ValueError, match="figure 'loss' is nan"):
        checked({"loss": jnp.nan})
    with pytest.raises(ValueError, match="figure 'losses' must be one number"):
        checked({"losses": [1, 2]})


def test_write_json_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(_report.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_commit(tmp_path, monkeypatch):
    assert commit(tmp_path) is None
    for variable in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(variable)

    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True)

    git("init", "--quiet")
    assert commit(tmp_path) is None  # nothing committed yet
    git("commit", "--quiet", "--allow-empty", "--no-verify", "-m", "first")
    head = commit(tmp_path)
    assert head is not None and len(head) == 40
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None  # inside somebody else's checkout
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None


def test_interleaved_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    medians = interleaved(functions, repeats=2)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert list(medians) == ["a", "b", "c"] and min(medians.values()) >= 0
    with pytest.raises(ValueError, match="repeats=0"):
        interleaved(functions, repeats=0)


def test_select_benchmark(capsys):
    row = run(select_benchmark.main, "select", argv=["--json", "--short", "--repeats", "1"])
    assert row["masks_equal"] and row["keep"] == 10_000
    for key in ("select_s", "argsort_s", "copy_s", "limit_s", "speedup_over_argsort"):
        value = row[key]
        assert isinstance(value, float) and value > 0
    capsys.readouterr()
