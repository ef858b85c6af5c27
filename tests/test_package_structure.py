"""What a primitive means is written down once, and folders show what is inside."""

import ast
import collections
from pathlib import Path

import pytest

import jaxcompress
from experiments.primitive_names import naming, tables

ROOT = Path(jaxcompress.__file__).parent
FOLDERS = [ROOT, *(p for p in ROOT.rglob("*") if p.is_dir() and any(p.glob("*.py")))]
BANNED = "trial follow ports given positions smallest condensed phases".split()


@pytest.mark.parametrize("name, most", [("transpose", 3), ("gather", 5), ("dot_general", 9)])
def test_few_places_name_a_primitive(name, most):
    assert len(set(naming(name))) <= most


def test_few_files_have_tables_of_primitives():
    assert len(set(tables())) <= 8


def test_folders_are_small_and_names_are_of_the_field():
    for folder in FOLDERS:
        assert len(list(folder.glob("*.py"))) <= 15, folder
        assert not [p for p in folder.glob("*.py") if p.stem in BANNED], folder


def test_no_two_files_have_one_name():
    names = collections.Counter(p.name for p in ROOT.rglob("*.py") if p.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_hides_its_module(folder):
    init = folder / "__init__.py"
    exported = set()
    for node in ast.parse(init.read_text()).body if init.exists() else ():
        if isinstance(node, ast.ImportFrom):
            parent = ROOT.parent / (node.module or "").replace(".", "/")
            modules = {a.name for a in node.names if (parent / a.name).with_suffix(".py").exists()}
            modules |= {a.name for a in node.names if (parent / a.name / "__init__.py").exists()}
            exported |= {a.asname or a.name for a in node.names if a.name not in modules}
    inside = {p.stem for p in folder.glob("*.py")}
    inside |= {p.name for p in folder.iterdir() if (p / "__init__.py").exists()}
    assert not exported & inside
