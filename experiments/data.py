"""The data of the experiments: 8x8 digits (in scikit-learn) and CIFAR-10 (official binary files).

Everything that is not part of a package lies in one folder, `data_dir()`: what the environment
variable `JAXCOMPRESS_DATA` names, else `~/.cache/jaxcompress`. What is missing there is downloaded
from its public address once, with its checksum.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import download

DATA_VARIABLE = "JAXCOMPRESS_DATA"

CIFAR10_ARCHIVE = download.Remote(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    algorithm="md5",
    digest="c32a1d4ab5d03f1284b67883e8d87530",
)
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
CIFAR10_MEAN = (0.485, 0.456, 0.406)
CIFAR10_STD = (0.229, 0.224, 0.225)

_RECORDS = 10_000  # in each file
_RECORD_BYTES = 1 + 3 * 32 * 32  # the label, then the red, green and blue planes
_DIGITS_TEST = 500


class Digits(NamedTuple):
    """The 1,797 handwritten 8x8 digits of scikit-learn, split."""

    train_images: np.ndarray  # float32 [1297, 8, 8, 1]
    train_labels: np.ndarray  # int32 [1297]
    test_images: np.ndarray  # float32 [500, 8, 8, 1]
    test_labels: np.ndarray  # int32 [500]


def data_dir() -> Path:
    """The folder of data and weights: `$JAXCOMPRESS_DATA`, else `~/.cache/jaxcompress`."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "jaxcompress"


def load_digits_split(seed: int, *, standardise: bool = False) -> Digits:
    """Loads the digits: 500 test images that never change, 1,297 training images.

    The test split is stratified and the same for every seed, so that results of different seeds
    are measured on the same images; `seed` sets the order of the training images alone.

    Args:
      seed: of the training order.
      standardise: subtract the mean and divide by the standard deviation of all training pixels;
        without it images lie in [0, 1].

    Raises:
      ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "load_digits_split needs scikit-learn: pip install 'jaxcompress[experiments]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_DIGITS_TEST, stratify=labels, random_state=0
    )
    train = np.random.default_rng(seed).permutation(np.sort(train))
    test = np.sort(test)
    if standardise:
        mean, std = images[train].mean(dtype=np.float64), images[train].std(dtype=np.float64)
        images = ((images - mean) / std).astype(np.float32)
    return Digits(images[train], labels[train], images[test], labels[test])


def load_cifar10(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Reads CIFAR-10 from `data_dir()/cifar-10-batches-bin`, downloading the archive if need be.

    Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009),
    https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
      split: "train" (50,000 images) or "test" (10,000).

    Returns:
      Images, uint8 [N, 32, 32, 3], and labels, int32 [N], in the order of the files.

    Raises:
      FileNotFoundError: a file is neither there nor downloadable; the message says what to set.
      ValueError: an unknown split, or a file that is truncated or corrupt.
    """
    if split not in CIFAR10_FILES:
        raise ValueError(f"split must be one of {sorted(CIFAR10_FILES)}, got {split!r}")
    paths = [data_dir() / CIFAR10_FOLDER / name for name in CIFAR10_FILES[split]]
    if not all(path.exists() for path in paths):
        _unpack_cifar10(data_dir())
    batches = [_read_cifar10_file(path) for path in paths]
    return (
        np.concatenate([images for images, _ in batches]),
        np.concatenate([labels for _, labels in batches]),
    )


def cifar10_normalise(images: jax.typing.ArrayLike) -> jax.Array:
    """Maps uint8 pixels [..., 3] to the float32 inputs of the pretrained ResNets.

    (x / 255 - mean) / std, with one mean and standard deviation per colour. Works inside jit,
    where four times fewer bytes travel.

    Raises:
      TypeError: the images are not uint8 (they may be normalised already).

    >>> print(cifar10_normalise(np.array([[0, 0, 0]], np.uint8)).round(2))
    [[-2.12 -2.04 -1.8 ]]
    """
    images = jnp.asarray(images)
    if images.dtype != jnp.uint8:
        raise TypeError(f"images must be uint8 pixels in 0..255, got {images.dtype}")
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = np.asarray(CIFAR10_MEAN, np.float32).reshape(shape)
    std = np.asarray(CIFAR10_STD, np.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std


def _unpack_cifar10(folder: Path) -> None:
    """Fills `folder/cifar-10-batches-bin` from the archive in `folder`, or from the public one."""
    archive = folder / Path(CIFAR10_ARCHIVE.url).name
    kept = archive.exists()  # put there by hand: verified, used, and left alone
    if kept:
        download.verify(archive, CIFAR10_ARCHIVE)
    else:
        remedy = (
            f"set {DATA_VARIABLE} to a folder that holds {CIFAR10_FOLDER}/ with "
            "data_batch_1.bin ... data_batch_5.bin and test_batch.bin, or the archive itself"
        )
        download.fetch(CIFAR10_ARCHIVE, archive, remedy=remedy)
    names = [name for files in CIFAR10_FILES.values() for name in files]
    members = [f"{CIFAR10_FOLDER}/{name}" for name in names]
    download.extract(archive, folder / CIFAR10_FOLDER, members=members)
    if not kept:
        archive.unlink()


def _read_cifar10_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one official binary file: 10,000 records of a label byte and 3x32x32 pixel bytes."""
    expected = _RECORDS * _RECORD_BYTES
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} is truncated or corrupt: {size} bytes, expected {expected}")
    records = np.fromfile(path, np.uint8).reshape(_RECORDS, _RECORD_BYTES)
    labels = records[:, 0]
    if labels.max() > 9:
        raise ValueError(f"{path} is corrupt: label {labels.max()}, expected 0..9")
    planes = records[:, 1:].reshape(-1, 3, 32, 32)  # [N, C, H, W]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int32)
