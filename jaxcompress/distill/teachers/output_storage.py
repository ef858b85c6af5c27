"""How a cache stores a teacher's logits: whole, or the likeliest classes and one rest."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dense:
    """Outputs of any shape as they are.

    Attributes:
      dtype: "float32", exact, or "float16", half the bytes and 11 significant bits.

    Raises:
      ValueError: another dtype.
    """

    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f'dtype must be "float32" or "float16", got {self.dtype!r}')

    def row(self, shape: tuple[int, ...]) -> np.dtype:
        """The dtype of what is stored of one example with outputs of this shape."""
        return np.dtype((self.dtype, shape))

    def encode(self, outputs: np.ndarray) -> np.ndarray:
        """float32 outputs [n, ...] as they are stored."""
        with np.errstate(over="ignore"):
            stored = outputs.astype(self.dtype)
        lost = np.isinf(stored) & np.isfinite(outputs)
        if lost.any():
            raise ValueError(
                f"an output of {outputs[lost][0]} is beyond float16, 65504; store float32"
            )
        return stored

    def decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Outputs [n, ...] in the stored dtype."""
        del shape
        return np.asarray(stored)


@dataclass(frozen=True)
class TopK:
    """The k largest logits, their classes, and the weight of all the others together.

    What is read back is float32 logits [n, classes]: the k exact, the others equal among
    themselves and together as likely as they were at `temperature`. So
    `top_k_kd(..., k=k, temperature=temperature)` is that of the whole logits.

    Attributes:
      k: at least 1.
      temperature: of the loss.

    Raises:
      ValueError: k is below 1, or the temperature not above 0.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self):
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(f"k must be at least 1 and temperature above 0, got {self}")

    def row(self, shape: tuple[int, ...]) -> np.dtype:
        """The dtype of what is stored of one example with outputs of this shape."""
        if len(shape) != 1 or shape[0] < self.k:
            raise ValueError(
                f"k={self.k}: outputs must be [examples, classes >= k], got {list(shape)} for one "
                "example"
            )
        number = "<u2" if shape[0] <= 2**16 else "<u4"
        return np.dtype(
            [("logit", "<f4", (self.k,)), ("class", number, (self.k,)), ("other", "<f4")]
        )

    def encode(self, outputs: np.ndarray) -> np.ndarray:
        """float32 outputs [n, classes] as they are stored."""
        order = np.argsort(-outputs, axis=-1, kind="stable")
        best, rest = order[:, : self.k], order[:, self.k :]
        stored = np.zeros(len(outputs), self.row(outputs.shape[1:]))
        stored["logit"] = np.take_along_axis(outputs, best, axis=-1)
        stored["class"] = best
        if rest.shape[1]:
            others = np.take_along_axis(outputs, rest, axis=-1).astype(np.float64)
            stored["other"] = self._equal(others)
            # Rounding must not lift the others above the k.
            stored["other"] = np.minimum(stored["other"], stored["logit"][:, -1])
        return stored

    def decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """float32 logits [n, classes]."""
        outputs = np.repeat(stored["other"][:, None], shape[0], axis=1)
        np.put_along_axis(outputs, stored["class"].astype(np.int64), stored["logit"], axis=1)
        return outputs

    def _equal(self, others: np.ndarray) -> np.ndarray:
        # z with (classes - k) exp(z / T) = sum of exp(z_c / T)
        z = others / self.temperature
        top = z.max(axis=1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            mean = np.log(np.exp(z - top).mean(axis=1))
        return self.temperature * (top[:, 0] + mean)


Storage = Dense | TopK
