"""Runs of long experiments: kept, not repeated, shared between processes."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from experiments._runs import Runs

pytestmark = pytest.mark.broad

REPORT: Any = SimpleNamespace(console=Console(file=io.StringIO()))


def never():
    raise AssertionError("computed again")


def test_runs_are_kept_and_what_others_write_too(tmp_path):
    one, other = (Runs(tmp_path, "name", REPORT) for _ in range(2))  # as two processes
    assert one.get("a", lambda: {"top1": 1.0}) == {"top1": 1.0}
    assert other.get("b", lambda: {"top1": 2.0}) == {"top1": 2.0}
    written = json.loads((tmp_path / "name_runs.json").read_text())
    assert written == {"a": {"top1": 1.0}, "b": {"top1": 2.0}}
    again = Runs(tmp_path, "name", REPORT)
    assert again.get("a", never)["top1"] == 1.0 and again.get("b", never)["top1"] == 2.0


def test_without_a_folder_nothing_is_kept():
    runs = Runs(None, "name", REPORT)
    assert runs.get("a", lambda: {"x": 1}) == {"x": 1} == runs.get("a", never)
    with pytest.raises(AssertionError):
        Runs(None, "name", REPORT).get("a", never)
