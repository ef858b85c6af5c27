"""The loss of a language model on TinyStories, its own stories, and calibration without data.

Eldan and Li, TinyStories (2023), https://arxiv.org/abs/2305.07759: 790 stories of the validation
set as tokens of stories260K, in `tinystories_val_tok512.npz` under `data.data_dir()`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evaluate import as_partial, by_length
from experiments.models import llama, weights
from experiments.models.stories260k import BOS, CONTEXT

FILE = "tinystories_val_tok512.npz"
LENGTHS = (256, 320, 384, CONTEXT)  # tokens of a batch: stories are padded to the next one

_CONTENT = "tokens [sum of lengths] and offsets [stories + 1], story i = tokens[o[i] : o[i + 1]]"


def load_stories() -> list[np.ndarray]:
    """The validation stories, each int32 [its length], the first token `BOS`.

    Raises:
      FileNotFoundError: the file is not under `data_dir()`.
      ValueError: it is truncated or corrupt.
    """
    path, arrays = weights.read_npz(FILE, content=_CONTENT)
    tokens, offsets = (arrays.get(name, np.zeros(0, np.int32)) for name in ("tokens", "offsets"))
    vocabulary = llama.STORIES_260K.vocabulary
    whole = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(tokens)
    if not whole or np.diff(offsets).min() < 2 or not np.all(tokens[offsets[:-1]] == BOS):
        raise ValueError(f"{path} is corrupt: its offsets do not cut its tokens into stories")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(
            f"{path} is corrupt: tokens in {tokens.min()}..{tokens.max()}, not 0..{vocabulary - 1}"
        )
    return np.split(tokens.astype(np.int32), offsets[1:-1])


def mean_loss(
    predict_fn: Callable[[jax.Array], jax.Array],
    stories: Sequence[np.ndarray],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """The mean loss in nats of the next token, over all predicted tokens of all stories.

    L = -sum over stories and t of log p(x[t + 1] | x[0..t]) / number of predictions. Each story
    stands on its own. Of longer ones the first `CONTEXT` predictions count, since the network was
    not trained on more. stories260K has 1.409 on the 790 validation stories.

    Stories are batched by length and padded, so that a handful of programs is compiled. Give
    weights as `jax.tree_util.Partial(apply_fn, params)`: other weights then use the same programs.

    Args:
      predict_fn: tokens, int32 [B, T], to logits [B, T, vocabulary]; causal.
      stories: integers, at least two each.
      batch_size: stories per step.
      progress: called after each batch with the stories done and the stories in all.

    Raises:
      ValueError: no stories, or one with nothing to predict; a loss that is not finite.
    """
    if not stories or min(map(len, stories)) < 2:
        raise ValueError("stories must be sequences of at least two tokens, and at least one")
    predict = as_partial(predict_fn)
    total, count, done = 0.0, 0, 0
    for tokens, targets, size in _batches(stories, batch_size):
        total += float(_loss_sum(predict, tokens, targets))
        count += int((targets >= 0).sum())
        done += size
        if progress is not None:
            progress(done, len(stories))
    if not np.isfinite(total):
        raise ValueError(f"the loss is {total}: the logits hold values that are not finite")
    return total / count


def _batches(
    stories: Sequence[np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields tokens and targets, int32 [batch_size, a length of LENGTHS]; target -1 is padding."""
    cut = [story[: CONTEXT + 1] for story in stories]
    for chosen, length in by_length([len(story) - 1 for story in cut], LENGTHS, size=batch_size):
        tokens = np.zeros((batch_size, length), np.int32)
        targets = np.full((batch_size, length), -1, np.int32)
        for row, story in enumerate(cut[number] for number in chosen):
            tokens[row, : len(story) - 1] = story[:-1]
            targets[row, : len(story) - 1] = story[1:]
        yield tokens, targets, len(chosen)


@jax.jit
def _loss_sum(predict: Callable, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum of log p(target), in float32, where the target is not negative."""
    log_p = jax.nn.log_softmax(predict(tokens).astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets >= 0, chosen, 0.0))


def generate(
    params: Any, *, count: int, length: int, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """Stories by stories260K itself: each token is drawn given those before it, from `BOS` on.

    A story that ends is followed by `BOS` and another one. At temperature 0 the likeliest token is
    taken.

    Args:
      params: of `llama.apply_fn()`, float.
      count: number of sequences.
      length: tokens of each, `BOS` included.
      seed: of the draws.
      temperature: the logits are divided by it.

    Returns:
      Tokens, int32 [count, length].

    Raises:
      ValueError: a count or length below 1, or a negative temperature.
    """
    if count < 1 or length < 1 or temperature < 0:
        raise ValueError(
            "count and length must be positive and temperature not negative, got "
            f"{count}, {length}, {temperature}"
        )
    keys = jax.random.split(jax.random.key(seed), length)
    return np.asarray(_generate(params, keys, jnp.float32(temperature), count=count))


@functools.partial(jax.jit, static_argnames="count")
def _generate(params: Any, keys: jax.Array, temperature: jax.Array, *, count: int) -> jax.Array:
    step_fn = llama.apply_cached()

    def step(carry, inputs):
        token, cache = carry
        position, key = inputs
        logits, cache = step_fn(params, token[:, None], cache, position)
        logits = logits[:, 0].astype(jnp.float32)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        new = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        return (new, cache), token

    cache = llama.empty_cache(batch=count, length=len(keys))
    first = jnp.full((count,), BOS, jnp.int32)
    positions = jnp.arange(len(keys), dtype=jnp.int32)
    return jax.lax.scan(step, (first, cache), (positions, keys))[1].T  # [T, B] -> [B, T]


def calibration_tokens(params: Any, count: int, *, length: int = 256, seed: int = 0) -> np.ndarray:
    """Tokens to calibrate a quantizer with: int32 [count, length], drawn by the network itself.

    Nothing of the stories that `mean_loss` is measured on goes into a calibration this way, and no
    other data are needed. Sampled at temperature 1, as in Liu et al., LLM-QAT: Data-Free
    Quantization Aware Training (2023), https://arxiv.org/abs/2305.17888.

    Args:
      params: of `llama.apply_fn()`, float.
      count: number of sequences.
      length: tokens of each.
      seed: of the draws.
    """
    return generate(params, count=count, length=length, seed=seed)
