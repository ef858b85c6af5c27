"""What a function is made of: names and numbers of its closure, so that two can be compared.

A compressor, an optimizer or a schedule is a closure: its settings lie in the cells of functions.
`describe` walks functions, their cells and defaults, partial applications, containers, dataclasses
and objects, and writes one row for each: a number as itself, an array as the hash of its bytes, a
function by its name, and by its code where it is not of an installed package (whose names say what
they do). Where something runs (devices, meshes, shardings) is no part of what it is. What has no
contents to look at (an open file, a lock, a generator) is listed as unidentified.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import io
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import numpy as np

from jaxcompress.core.pytrees import host

_PLAIN = (bool, int, float, complex, str, type(None), type(Ellipsis), slice, range, PurePath)
_PLACES = (jax.sharding.Sharding, jax.sharding.Mesh, jax.sharding.AbstractMesh, jax.Device)
_INSTALLED = tuple(
    os.path.join(os.path.realpath(folder), "")
    for folder in (
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parent.parent,
    )
)
_CALLABLES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Description(NamedTuple):
    """What a value is made of.

    Attributes:
      rows: {place: what is there}, in the order of the walk.
      unidentified: places of what has no contents to look at, with its type.
    """

    rows: dict[str, str]
    unidentified: tuple[str, ...]


def describe(value: Any) -> Description:
    """Names and numbers of a value, a function say: equal where the same code made it.

    >>> def scaled(factor):
    ...     return lambda x: factor * x
    >>> describe(scaled(0.5)).rows["factor"], describe(scaled(0.9)).rows["factor"]
    ('0.5', '0.9')
    >>> describe(open).unidentified, len(describe(iter([1])).unidentified)
    ((), 1)
    """
    walk = _Walk()
    walk.add("", value)
    return Description(walk.rows, tuple(walk.unidentified))


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """`place: value there, value here` for all rows that differ, numbers and names first."""
    found = [
        (not _says(there.get(place, ""), here.get(place, "")), place)
        for place in {**there, **here}
        if there.get(place) != here.get(place)
    ]
    return [
        f"{_short(place)}: {there.get(place, 'nothing')} there, {here.get(place, 'nothing')} here"
        for _, place in sorted(found, key=lambda row: row[0])
    ]


def _short(place: str) -> str:
    # Of the functions inside functions between a recipe and its number, the ends say enough.
    parts = place.split(".")
    return place if len(parts) <= 6 else ".".join([*parts[:3], "", *parts[-2:]])


def _says(there: str, here: str) -> bool:
    # A hash and a reference to another row say little to a reader.
    return bool(there and here) and not re.search(r"sha256|^as ", there + here)


def array_text(array: Any) -> str:
    """Dtype, shape and SHA-256 of an array's bytes; a single number as itself."""
    values = host(array)
    head = f"{getattr(array, 'dtype', values.dtype)}{list(values.shape)}"
    if values.dtype.hasobject:
        raise TypeError("an array of objects")
    if values.ndim == 0:
        return f"{values.item()} ({head})"
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return f"{head} sha256 {hashlib.sha256(flat.data).hexdigest()[:32]}"


class _Walk:
    """Rows by place; what was met before is a reference to its place, which ends cycles too."""

    def __init__(self):
        self.rows: dict[str, str] = {}
        self.unidentified: list[str] = []
        self._seen: dict[int, tuple[str, Any]] = {}  # the value is held, so that its id stays its

    def add(self, place: str, value: Any) -> None:
        if isinstance(value, _PLACES):
            return
        if (text := _plain(value)) is not None:
            self.rows[place] = text
        elif id(value) in self._seen:
            self.rows[place] = f"as {self._seen[id(value)][0] or 'the whole'}"
        else:
            self._seen[id(value)] = place, value
            self._open(place, value)

    def _open(self, place: str, value: Any) -> None:
        if isinstance(value, np.ndarray | jax.Array | np.generic):
            self._array(place, value)
        elif isinstance(value, Mapping):
            self._parts(place, {str(k): value[k] for k in sorted(value, key=str)})
        elif isinstance(value, tuple | list):
            names = getattr(value, "_fields", range(len(value)))
            self._parts(place, dict(zip(map(str, names), value, strict=True)))
        elif isinstance(value, set | frozenset):
            self._parts(place, {f"{k}": v for k, v in enumerate(sorted(value, key=repr))})
        elif isinstance(value, functools.partial):
            self._parts(place, {"func": value.func, "args": value.args, **value.keywords})
        elif isinstance(value, types.MethodType):
            self._parts(place, {"": value.__func__, "self": value.__self__})
        elif isinstance(value, types.FunctionType):
            self._function(place, value)
        elif isinstance(value, type):
            self._class(place, value)
        else:
            self._object(place, value)

    def _array(self, place: str, value: Any) -> None:
        try:
            self.rows[place] = array_text(value)
        except (TypeError, jax.errors.JAXTypeError):  # traced, or of objects
            self._unknown(place, value)

    def _unknown(self, place: str, value: Any) -> None:
        self.rows[place] = f"a {type(value).__qualname__}"
        self.unidentified.append(f"{place or 'the function'} (a {type(value).__qualname__})")

    def _parts(self, place: str, parts: Mapping[str, Any]) -> None:
        if not parts:
            self.rows[place] = "nothing"
        for name, part in parts.items():
            self.add(f"{place}.{name}".strip("."), part)

    def _function(self, place: str, function: types.FunctionType) -> None:
        installed = function.__code__.co_filename.startswith(_INSTALLED)
        self.rows[place] = function.__qualname__ if installed else _code_text(function)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        parts = {name: cell.cell_contents for name, cell in cells if _filled(cell)}
        if function.__defaults__:
            parts["defaults"] = function.__defaults__
        parts |= function.__kwdefaults__ or {}
        if not installed:
            parts |= {
                name: function.__globals__[name]
                for name in _globals(function.__code__)
                if name in function.__globals__
            }
        for name, part in parts.items():
            self.add(f"{place}.{name}".strip("."), part)

    def _class(self, place: str, value: type) -> None:
        self.rows[place] = value.__qualname__
        if not _installed(value.__module__):
            for name, part in vars(value).items():
                if isinstance(part, types.FunctionType):
                    self.add(f"{place}.{name}".strip("."), part)

    def _object(self, place: str, value: Any) -> None:
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and not _is_rule(value):
            self.add(place, wrapped)  # jit and lru_cache: what they keep is none of its settings
            return
        fields = _fields(value)
        if fields is None:
            self._unknown(place, value)
            return
        self.rows[place] = f"{type(value).__qualname__}"
        for name, part in fields.items():
            self.add(f"{place}.{name}".strip("."), part)
        if not _installed(type(value).__module__):
            self.add(f"{place}.class".strip("."), type(value))


def _plain(value: Any) -> str | None:
    """The text of what is its own name or number."""
    if isinstance(value, enum.Enum):
        return str(value)
    if type(value) in (tuple, list, frozenset, set):
        # In one row: whether two equal constants are one object is up to the interpreter.
        texts = [text for item in value if (text := _plain(item)) is not None]
        if len(texts) < len(value):
            return None
        inside = ", ".join(sorted(texts) if isinstance(value, set | frozenset) else texts)
        return f"({inside})"
    if isinstance(value, _PLAIN) and type(value).__repr__ is not object.__repr__:
        return repr(value)
    if isinstance(value, bytes):
        return f"bytes sha256 {hashlib.sha256(value).hexdigest()[:32]}"
    if isinstance(value, np.dtype | jax.ShapeDtypeStruct | jax.tree_util.PyTreeDef | re.Pattern):
        return str(value)
    if isinstance(value, jec.Jaxpr | jec.ClosedJaxpr):
        return f"jaxpr sha256 {hashlib.sha256(str(value).encode()).hexdigest()[:32]}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    return _public_name(value)


def _public_name(value: Any) -> str | None:
    """`numpy.sin` for what an installed module gives by that name; None for all else."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if isinstance(value, np.ufunc):
        module = "numpy"
    if not isinstance(module, str) or not isinstance(name, str) or not _installed(module):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else None


def _installed(module: str | None) -> bool:
    """Whether a module is of the standard library, an installed package or this one."""
    if module is None or module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is None or os.path.realpath(file).startswith(_INSTALLED)


def _in_python(module: str) -> bool:
    # What a class of a compiled module keeps cannot be seen.
    file = getattr(sys.modules.get(module), "__file__", None)
    return module == "__main__" or (file or "").endswith(".py") or module not in sys.modules


def _is_rule(value: Any) -> bool:
    return isinstance(value, jax.custom_jvp | jax.custom_vjp)  # derivative rules beside the code


def _fields(value: Any) -> dict[str, Any] | None:
    """The settings of an object; None where it has none to look at."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    slots = [
        name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))
    ]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    moves = isinstance(value, io.IOBase | Iterator)  # what it gives next depends on its past
    return found if _in_python(type(value).__module__) and not moves else None


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _filled(cell: Any) -> bool:
    try:
        return bool(cell.cell_contents is not cell)
    except ValueError:
        return False


def _code_text(function: Callable[..., Any]) -> str:
    digest = hashlib.sha256()
    _hash_code(digest, function.__code__)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{function.__qualname__} (code of Python {python}, sha256 {digest.hexdigest()[:32]})"


def _hash_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _hash_code(digest, constant)
        elif isinstance(constant, frozenset):
            digest.update(repr(sorted(constant, key=repr)).encode())
        else:
            digest.update(repr(constant).encode())


def _globals(code: types.CodeType) -> list[str]:
    """The global names that a function reads, those of the functions inside it too."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_globals(constant))
    return sorted(names)
