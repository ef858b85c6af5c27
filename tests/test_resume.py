"""Killed and resumed, on one and on eight devices, as the experiment does it in its short form."""

import json

import jax
import pytest

from experiments import resume_after_kill
from experiments._report import run

pytestmark = pytest.mark.broad


@pytest.fixture(autouse=True)
def _as_a_user_runs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(capsys):
    run(resume_after_kill.main, "resume_after_kill", argv=["--short", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["kills"] == 6 and row["bit_identical"]
    for name in ("one_device", "eight_devices"):
        assert row[f"{name}_state_identical"] and row[f"{name}_log_identical"]


def test_bad_flags_are_refused(capsys):
    with pytest.raises(SystemExit):
        run(resume_after_kill.main, "resume_after_kill", argv=["--kills", "0"])
    assert "--kills must be at least 1 and --steps 50, got 0, 300" in capsys.readouterr().err
