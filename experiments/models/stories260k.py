"""stories260K: a language model of 260,032 parameters that tells short stories, and its tokens.

The weights are those of https://huggingface.co/karpathy/tinyllamas (MIT), trained on TinyStories:
Eldan and Li, TinyStories: How Small Can Language Models Be (2023),
https://arxiv.org/abs/2305.07759. They lie in one file under `data.data_dir()`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import weights
from experiments.models.llama import STORIES_260K, Llama

FILE = "stories260k.npz"
BOS = 1  # begins every story
CONTEXT = 512  # tokens that the network was trained to see at once

_CONTENT = (
    "config, emb, norm, an, fn, tok_pieces and q, k, v, o, w1, w2, w3 as [layer, out, in], "
    "from stories260K.pt of https://huggingface.co/karpathy/tinyllamas"
)
# Names in the file of the parts of a layer.
_PARTS = {
    "attention_norm/scale": "an",
    "mlp_norm/scale": "fn",
    "mlp/gate/kernel": "w1",
    "mlp/down/kernel": "w2",
    "mlp/up/kernel": "w3",
} | {f"attention/{name}/kernel": name for name in "qkvo"}


def load_pretrained() -> dict[str, Any]:
    """Loads the trained weights as parameters of `llama.apply_fn()`, float32.

    Raises:
      FileNotFoundError: `stories260k.npz` is not under `data_dir()`.
      ValueError: it is truncated, corrupt, or of another network.
    """
    path, arrays = weights.read_npz(FILE, content=_CONTENT)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Llama(STORIES_260K).init, jax.random.key(0), tokens)["params"]
    find = functools.partial(_array, arrays)
    return weights.fill(shapes, find, path=path, network="stories260K")


def load_pieces() -> list[bytes]:
    """The bytes that each of the 512 tokens stands for; control tokens stand for none.

    Raises:
      FileNotFoundError, ValueError: as `load_pretrained`.
    """
    path, arrays = weights.read_npz(FILE, content=_CONTENT)
    try:
        pieces = [bytes.fromhex(str(piece)) for piece in arrays["tok_pieces"]]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is corrupt: no tok_pieces in hexadecimal ({error})") from error
    return [_meaning(piece) for piece in pieces]


def decode(tokens: Iterable[int], pieces: list[bytes]) -> str:
    """The text of tokens.

    >>> decode([1, 2, 0, 2], [b" the", b"", b" end"])
    'end the end'
    """
    text = b"".join(pieces[token] for token in tokens)
    return text.decode(errors="replace").removeprefix(" ")


def _meaning(piece: bytes) -> bytes:
    byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
    if byte:
        return bytes.fromhex(byte[1].decode())
    return b"" if piece in (b"<unk>", b"\n<s>\n", b"\n</s>\n") else piece


def _array(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """The leaf `name` out of the file, kernels as [in, out]; None if it is not there."""
    layer = re.fullmatch(r"layer_(\d+)/(.*)", name)
    if layer is None:
        return arrays.get({"embedding/embedding": "emb", "norm/scale": "norm"}.get(name, ""))
    stacked, index = arrays.get(_PARTS[layer[2]]), int(layer[1])
    if stacked is None or stacked.ndim < 2 or len(stacked) != STORIES_260K.layers:
        return None
    return stacked[index].T  # [out, in] -> [in, out]; vectors stay
