"""Every pass meets every operation between two layers: no cell of the table gets worse."""

import json
from pathlib import Path

import jax
import pytest

from experiments.situations.passes import NETWORKS, ORDER, PASSES, cell, network

TABLE = json.loads(Path(__file__).with_name("passes.json").read_text())
VERSION = ".".join(jax.__version__.split(".")[:2])
# A third on the other interpreter, and what is new there.
FAST = {*list(NETWORKS)[::3], "log2", "polynomial", "one_minus_square"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.broad) for n in NETWORKS]
)
def test_no_cell_gets_worse(name):
    known = TABLE.get(VERSION) or TABLE[max(TABLE, key=lambda v: [int(n) for n in v.split(".")])]
    found = {kind: cell(kind, *network(name)) for kind in PASSES}
    worse = {
        kind: f"{found[kind]}, was {known[name][kind]}"
        for kind in PASSES
        if ORDER.index(found[kind]) < ORDER.index(known[name][kind])
    }
    assert not worse


def test_the_table_has_every_network_and_pass():
    for table in TABLE.values():
        assert list(table) == list(NETWORKS)
        assert all(
            tuple(row) == PASSES and set(row.values()) <= set(ORDER) for row in table.values()
        )
