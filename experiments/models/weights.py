"""Trained weights in files: `.npz` under `data.data_dir()`, and arrays put into a tree with checks.

Nothing is executed: NumPy reads without pickles.
"""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import DATA_VARIABLE, data_dir
from jaxcompress.core.paths import path_str

# What numpy.load raises for bytes that are not a whole .npz; TypeError for a lone .npy.
_READ_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read_npz(name: str, *, content: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Reads all arrays of `data_dir()/name`.

    Args:
      name: of the file.
      content: what it holds, for the message.

    Returns:
      The path and the arrays.

    Raises:
      FileNotFoundError: there is no such file; the message says what to provide.
      ValueError: it is truncated or corrupt.
    """
    path = data_dir() / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist and cannot be downloaded: set {DATA_VARIABLE} to a folder "
            f"that holds {name} ({content})"
        )
    return path, load_npz(path)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Raises:
      ValueError: it is truncated or corrupt.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except _READ_ERRORS as error:
        raise ValueError(f"{path} is truncated or corrupt, not an .npz file ({error})") from error


def fill(
    shapes: Any, find: Callable[[str], np.ndarray | None], *, path: Path, network: str
) -> dict[str, Any]:
    """The tree of `shapes` with the arrays that `find` gives for the path of each leaf, float32.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`, e.g. of `eval_shape(model.init, ...)`.
      find: 'layer_0/mlp/up/kernel' -> array, or None where the file has none.
      path: of the file, for the messages.
      network: its name, for the messages.

    Raises:
      ValueError: an array is missing, of another shape, or holds NaN or Inf.
    """

    def leaf(key_path: Any, want: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_str(key_path)
        array = find(name)
        have = "nothing" if array is None else array.shape
        if array is None or have != want.shape:
            raise ValueError(f"{path} is not {network}: {name}: {have}, not {want.shape}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{path} is corrupt: {name} holds values that are not finite")
        return jnp.asarray(array, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
