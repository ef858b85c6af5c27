"""How small a Huffman code would make a packed tree: the order-0 entropy of its symbols."""

import math
from typing import Any

import jax
import numpy as np

from jaxcompress.core.packed import Masked, QTensor, is_packed, packed_bytes
from jaxcompress.formats import unpack_bits


def entropy_bytes(packed: Any) -> int:
    """Bytes of a packed tree if every symbol of a leaf took its order-0 entropy.

    What Deep Compression's Huffman code of each leaf approaches from above, its tables not counted:

      codes      count * H bits, H = -sum_c p_c log2 p_c over the codes of the leaf
      positions  n * H(nnz / n) bits, the entropy of a mask of n elements that are kept
                 independently; or what is stored, where that is less (N:M, constant fan-in)
      the rest   scales, codebooks and arrays that are not quantized: as stored

    No bound for coders that see more than one symbol at a time: rows that repeat can be smaller.

    Args:
      packed: a tree of arrays, `QTensor` and `Masked`; `(params, grids)` counts both.

    Source: Han et al. 2016, Deep Compression, arXiv 1510.00149, section 4.

    >>> from jaxcompress import formats, quantize
    >>> comp = quantize.weights(formats.integer(4))
    >>> half = np.where(np.arange(1024) % 2, 1.0, -1.0).astype(np.float32)
    >>> entropy_bytes(comp.pack(half, comp.init(half)))  # a bit for each of two codes, and a scale
    132
    """
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    return math.ceil(sum(map(_leaf_bytes, leaves)))


def _leaf_bytes(leaf: Any) -> float:
    if isinstance(leaf, Masked):
        # H(p) = -p log2 p - (1 - p) log2 (1 - p)
        counts = np.array([leaf.nnz, leaf.size - leaf.nnz])
        positions = min(_bits(counts) / 8, packed_bytes(leaf.positions))
        inner = leaf.values
        if isinstance(inner, QTensor):
            return positions + _codes_bytes(inner, leaf.nnz) + packed_bytes(inner.qparams)
        return positions + packed_bytes(inner)
    if isinstance(leaf, QTensor):
        return _codes_bytes(leaf, leaf.size) + packed_bytes(leaf.qparams)
    return packed_bytes(leaf)


def _codes_bytes(leaf: QTensor, count: int) -> float:
    # Rows that keep the shape fill whole bytes: all codes are one row of the bytes.
    codes = unpack_bits(leaf.codes.reshape(-1), leaf.format.bits, count)
    return _bits(np.bincount(np.asarray(codes))) / 8


def _bits(counts: np.ndarray) -> float:
    """Entropy of all symbols, given how often each occurs, in bits."""
    found = counts[counts > 0].astype(np.float64)
    return float((found * np.log2(found.sum() / found)).sum())
