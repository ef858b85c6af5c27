"""The layout of a packed file: which arrays it has, where they lie, how large it will be."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.core.packed import Grid, is_packed
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.storage import container
from jaxcompress.core.storage.leaves import disassemble, disassemble_grids
from jaxcompress.core.storage.scheme import Scheme, table_text

VERSION = "4"
ROOT = "(array)"  # the name of a tree that is one array
TAKEN = ("jaxcompress", "crc32", "activations", "leaves")


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      arrays: by name; of shapes and dtypes where the tree was of those.
      header: of the file, see container.py.
      entries: {name of an array: where it lies in the data}, in order.
      size: of the file.
    """

    arrays: dict[str, Any]
    header: dict[str, Any]
    entries: dict[str, container.Entry]
    size: container.FileSize


def contents(
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Contents:
    """What `export.save` writes of a packed tree, or of its shapes and dtypes.

    Raises:
      ValueError, TypeError: as `export.save`.
    """
    flat = leaves_with_paths(params, is_leaf=is_packed)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(params, is_leaf=is_packed)):
        flat = [(ROOT, leaf) for _, leaf in flat]
    refuse_names([name for name, _ in flat])
    arrays, grids = disassemble_grids(activations or {})
    schemes: dict[str, Scheme] = {}
    for name, leaf in flat:
        parts, schemes[name] = disassemble(name, leaf)
        if clash := set(parts) & set(arrays):
            raise ValueError(f"two leaves are named {sorted(clash)[0]!r}")
        arrays |= parts
    found = laid_out(arrays, schemes, {**(metadata or {}), **grids}, own=metadata or {})
    return found


def laid_out(
    arrays: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    metadata: Mapping[str, str],
    *,
    own: Mapping[str, str],
) -> Contents:
    """The layout of arrays whose leaves have these schemes.

    Raises:
      ValueError, TypeError: `own`, the metadata of the caller, are no strings, or of a taken name.
    """
    for key, value in own.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata must be strings, got {key!r}: {value!r}")
        if key in TAKEN or key.startswith("leaf:"):
            raise ValueError(f"metadata key {key!r} is taken by the file format")
    # A large array that is not packed says all about itself under its own name.
    listed = {
        name: scheme
        for name, scheme in schemes.items()
        if scheme.packed
        or container.is_small(arrays[name])
        or arrays[name].dtype != np.dtype(scheme.dtype)  # codes of nibbles
    }
    text = {"leaves": table_text(listed)} if listed else {}
    header, entries = container.layout(
        arrays, {"jaxcompress": VERSION, **metadata, **text}, pooled=True
    )
    first = len(container.seal(header, 0))
    payload = sum(entry.last - entry.first for entry in entries.values())
    size = container.FileSize(first + payload, first, payload)
    return Contents(dict(arrays), header, entries, size)


def file_bytes(
    params: Any,
    *,
    activations: Mapping[str, Grid] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Bytes of the file that `export.save` writes, exactly, from shapes and dtypes alone.

    >>> import jax.numpy as jnp
    >>> file_bytes({"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)})
    272
    """
    return contents(params, activations=activations, metadata=metadata).size.file_bytes


def refuse_names(names: list[str]) -> None:
    """Raises ValueError for names of leaves that cannot stand in one file."""
    known = set(names)
    for name in names:
        if not name:
            raise ValueError("a leaf is named '', which a file cannot hold; rename it")
        if (
            name == "__metadata__" or name.startswith("activations.")
            or name.startswith(container.POOL) and name[len(container.POOL) :] in container.DTYPES
        ):  # fmt: skip
            raise ValueError(f"the name {name!r} is taken by the file format; rename the leaf")
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in known:
                raise ValueError(f"leaf {name!r} lies below leaf {parent!r}; rename one")
