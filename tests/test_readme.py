"""The README's code runs, its commands parse, its figures are those of the committed results."""

import json
import re
import shlex
from pathlib import Path

import jax

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
