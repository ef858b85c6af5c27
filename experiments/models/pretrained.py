"""Where the trained CIFAR ResNets come from: a file under `data_dir()`, else a public checkpoint.

The weights are those of https://github.com/akamaster/pytorch_resnet_cifar10 (BSD-2). A file
`resnet<depth>_cifar10.npz` holds them with PyTorch's names and layouts (`layer1.0.conv1.weight`,
OIHW) and is read with NumPy alone. Where there is none, the checkpoint is downloaded and converted
to that file; only this needs PyTorch.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments import download
from experiments.data import DATA_VARIABLE, data_dir
from experiments.models.weights import load_npz
from jaxcompress.core.files import replacing

_REPOSITORY = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"

# The file names carry the first eight digits.
_SHA256 = {
    20: "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    32: "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    44: "014dd6541728a1c700b1642ab640e211dc6eb8ed507d70697458dc8f8a0ae2e4",
    56: "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
}
CHECKPOINTS = {
    depth: download.Remote(f"{_REPOSITORY}resnet{depth}-{digest[:8]}.th", "sha256", digest)
    for depth, digest in _SHA256.items()
}


def weights_file(depth: int) -> Path:
    """Returns the path of `resnet<depth>_cifar10.npz`, made from the public checkpoint if need be.

    Looked for under `data_dir()`, in this order: the `.npz`; the checkpoint (`.th`) put there by
    hand; its public address.

    Raises:
      FileNotFoundError: none of them can be had; the message says what to do.
      ValueError: an unknown depth, or a checkpoint that is truncated or corrupt.
    """
    if depth not in CHECKPOINTS:
        raise ValueError(f"depth must be one of {tuple(CHECKPOINTS)}, got {depth}")
    path = data_dir() / f"resnet{depth}_cifar10.npz"
    if path.exists():
        return path
    remote = CHECKPOINTS[depth]
    remedy = f"provide {path.name} under {DATA_VARIABLE}"
    if importlib.util.find_spec("torch") is None:
        raise FileNotFoundError(
            f"{path} does not exist, and reading the public checkpoint {remote.url} needs PyTorch: "
            f"pip install torch, or {remedy}"
        )
    checkpoint = path.with_name(Path(remote.url).name)
    if checkpoint.exists():
        download.verify(checkpoint, remote)
    else:
        download.fetch(remote, checkpoint, remedy=remedy)
    arrays = _read_checkpoint(checkpoint)
    with replacing(path) as target:
        np.savez(target, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def read_variables(path: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Reads an `.npz` of PyTorch names and layouts as Flax leaves by path.

    'layer1.0.conv1.weight' [O, I, H, W] is ('params', 'layer1_0', 'conv1', 'kernel') [H, W, I, O].

    Raises:
      ValueError: the file is truncated or corrupt, or holds a value that is not finite.
    """
    arrays = load_npz(path)
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{path} is corrupt: {name} holds values that are not finite")
    return dict(_from_torch(name, array) for name, array in arrays.items())


def _read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Reads {"state_dict": {"module.<name>": tensor}}, without the counters of later PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {
        name.removeprefix("module."): tensor.numpy()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _from_torch(name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    *modules, leaf = re.sub(r"^layer(\d)\.(\d+)", r"layer\1_\2", name).split(".")
    if modules and modules[-1].startswith("bn"):
        collection, leaf = _BATCH_NORM.get(leaf, ("params", leaf))
    else:
        collection, leaf = "params", "kernel" if leaf == "weight" else leaf
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)  # [out, in, H, W] -> [H, W, in, out]
    elif array.ndim == 2:
        array = array.T  # [out, in] -> [in, out]
    return (collection, *modules, leaf), array
