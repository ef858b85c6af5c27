"""Files come into being whole, whoever writes beside: threads, processes, full disks."""

import errno
import os
import stat
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.core.files import replacing
from jaxcompress.search.plan import Plan, load_plan


def test_writers_beside_each_other_give_readers_whole_files(tmp_path):
    path = tmp_path / "model.safetensors"
    trees = [{"w": np.full(200_000 >> k, k, np.float32)} for k in range(4)]
    jc.export.save(path, trees[0])
    going, faults = threading.Event(), []

    def write(tree):
        try:
            for _ in range(6):
                jc.export.save(path, tree)
        except Exception as error:  # seen by the main thread
            faults.append(error)

    def read():
        while not going.is_set():
            try:
                (w,) = jc.export.load(path).params.values()
                assert w.size == 200_000 >> int(w[0])
            except Exception as error:
                faults.append(error)
                return

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(tree,)) for tree in trees]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    going.set()
    reader.join()
    assert not faults and os.listdir(tmp_path) == [path.name]


def test_temporary_files_differ_within_one_process(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        one.write(b"first, and longer")
        two.write(b"second")
        assert one.name != two.name
        assert len(os.listdir(tmp_path)) == 2
    assert (tmp_path / "a").read_bytes() == b"first, and longer"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("when", ["write", "flush", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, when):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*args):
        raise full

    if when == "flush":
        monkeypatch.setattr(os, "fsync", fails)
    if when == "replace":
        monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"), replacing(path) as file:
        file.write(b"new")
        if when == "write":
            fails()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_rights_are_those_that_open_gives_and_names_may_be_long(tmp_path):
    old = os.umask(0o027)
    try:
        path = tmp_path / ("n" * 240)
        with replacing(path) as file:
            file.write(b"x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(old)


BAD_PLANS = {
    '{"weights": {"w": "int4"}, "loss": "0.5"}': r"loss must be a finite number, got '0.5'",
    '{"weights": {"w": "int4"}, "loss": NaN}': r"loss must be a finite number, got nan",
    '{"weights": {}, "predicted": {"macs": true}}': r"predicted\['macs'\] must be a finite number",
    '{"weights": {}, "predicted": {"macs": -1}}': r"predicted\['macs'\] must be at least 0, got -1",
    '{"weights": {}, "measured": {"kl": Infinity}}': r"measured\['kl'\] must be a finite number",
    '{"weights": {}, "measured": [1]}': r"measured must be an object of numbers, got \[1\]",
    '{"weights": {}, "activations": 8}': r"activations must be a format's name or null, got 8",
    '{"weights": {}, "device": null}': r"device must be a name, got None",
    "": "no JSON",
}


@pytest.mark.parametrize("text", BAD_PLANS)
def test_a_plan_s_numbers_are_checked(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=f"plan.json: {BAD_PLANS[text]}"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_comes_back(tmp_path):
    plan = Plan({"w": "int4"}, "uint8", "host", {"macs": 3}, -0.25, {"kl": 0.5})
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert dict(load_plan(tmp_path / "plan.json").predicted) == {"macs": 3}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": 3}', None])
def test_an_emptied_or_damaged_cache_of_a_search_names_its_file(tmp_path, text):
    x, params = jnp.ones((2, 3)), {"w": jnp.ones((3, 2))}
    given: Any = dict(
        weights={"int4": jc.quantize.weights(jc.formats.integer(4))}, cache=tmp_path / "cache.json"
    )
    run = lambda: jc.search.sensitivity(lambda p, x: x @ p["w"], params, [(x,)], **given)
    if text is None:  # a number that changed
        found = run()
        assert run() == found
        text = (tmp_path / "cache.json").read_text().replace("0.0", "0.5", 1)
        assert "0.5" in text
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ValueError, match="cache .*cache.json: (it is|damaged)"):
        run()
