"""Question: in how many places is it written down what a JAX primitive means?

    python -m experiments.primitive_names --json

Counts, over the package's syntax trees:
  transpose, gather, dot_general   files that name the primitive, in a string that is no docstring
                                   or by a name of `compat` (DOT, CONTRACTIONS, ...)
  tables           files with collections of at least four names of primitives
  interpreters     functions that go through the equations of a jaxpr and read their results
Each place is listed. Seconds on one core. Results: experiments/results/primitive_names.json.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jaxcompress
from experiments._report import Options, Report, run
from jaxcompress.graph.primitives import rows

ROOT = Path(jaxcompress.__file__).parent
NAMES = frozenset(row.name for row in rows())
COUNTED = ("transpose", "gather", "dot_general")
# What `compat` calls contractions.
ALIASES = {
    "DOT": ("dot_general",),
    "PRODUCTS": ("dot_general",),
    "CONTRACTIONS": ("dot_general",),
}
# Too common as words, or as names of other things, to say that a string is of primitives.
PLAIN = frozenset("name copy pin call not and or".split())


@dataclasses.dataclass(frozen=True)
class Args(Options):
    """Options."""


def main(args: Args, report: Report) -> dict:
    """Prints who names what."""
    del args
    found = {name: sorted({str(path) for path in naming(name)}) for name in COUNTED}
    found["tables"] = sorted(set(tables()))
    found["interpreters"] = sorted(interpreters())
    report.table(
        "places", ("what", "count", "where"),
        [(what, len(where), "\n".join(where)) for what, where in found.items()],
    )  # fmt: skip
    return {what: len(where) for what, where in found.items()}


def naming(name: str) -> Iterator[Path]:
    """The files that name a primitive."""
    for path, tree in _trees():
        aliases = {alias for alias, names in ALIASES.items() if name in names}
        for node in _without_docstrings(tree):
            if isinstance(node, ast.Attribute) and node.attr in aliases:
                yield path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if name in node.value.split() and _of_primitives(node.value):
                    yield path


def tables() -> Iterator[str]:
    """The files with a collection of at least four names of primitives."""
    for path, tree in _trees():
        for node in _without_docstrings(tree):
            texts: list[str] = []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts = node.value.split() if _of_primitives(node.value) else []
            elif isinstance(node, ast.Set | ast.Tuple | ast.List | ast.Dict):
                items = node.keys if isinstance(node, ast.Dict) else node.elts
                texts = [_text(item) for item in items]
            if len(NAMES.intersection(texts)) >= 4:
                yield str(path)


def interpreters() -> Iterator[str]:
    """Every function that goes through the equations of a jaxpr."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            loops = [n for n in ast.walk(node) if isinstance(n, ast.For | ast.comprehension)]
            if any(_reads(loop.iter, "eqns") for loop in loops) and _reads(node, "outvars"):
                yield f"{path}:{node.name}"


def _reads(node: ast.AST, attribute: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == attribute for n in ast.walk(node))


def _of_primitives(text: str) -> bool:
    # A string of names alone: "reshape", or "reshape transpose slice".
    words = text.split()
    return bool(words) and all(word in NAMES for word in words) and bool(set(words) - PLAIN)


def _text(node: ast.AST | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def _without_docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return (node for node in ast.walk(tree) if id(node) not in said)


if __name__ == "__main__":
    run(main, "primitive_names")
