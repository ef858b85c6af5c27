"""Codes of b bits in uint8: little-endian along the last axis, no bit wasted inside a row."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


def row_bytes(count: int, bits: int) -> int:
    """Bytes of one row of `count` codes: only the last byte may hold unused bits.

    >>> row_bytes(10, 3)
    4
    """
    return -(-count * bits // 8)


def _lanes(bits: int) -> tuple[int, int]:
    # The smallest run of codes that fills whole bytes: 2 codes of 4 bits, 8 of 3, 4 of 6.
    lanes = 8 // math.gcd(8, bits)
    return lanes, lanes * bits // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")


@functools.partial(jax.jit, static_argnames="bits")
def pack_bits(codes: Array, bits: int) -> Array:
    """Packs unsigned codes [..., n] into uint8 [..., ceil(n * bits / 8)].

    Code k of a row takes the bits k * bits to (k + 1) * bits of the row, lowest bit first.
    Codes must be below 2**bits; higher bits are cut off.

    >>> print(pack_bits(jnp.array([1, 2, 15], jnp.uint8), 4))
    [33 15]
    """
    _check_bits(bits)
    *lead, count = codes.shape
    if bits == 8:
        return codes.astype(jnp.uint8)
    lanes, unit = _lanes(bits)
    groups = -(-count // lanes)
    wide = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, groups * lanes - count)])
    wide = wide.reshape(*lead, groups, lanes).astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    columns = [jnp.zeros((*lead, groups), jnp.uint32) for _ in range(unit)]
    for lane in range(lanes):
        first, last = lane * bits // 8, ((lane + 1) * bits - 1) // 8
        for byte in range(first, last + 1):
            shift = lane * bits - 8 * byte
            value = wide[..., lane]
            value = value << shift if shift >= 0 else value >> -shift
            columns[byte] = columns[byte] | value
    packed = jnp.stack(columns, axis=-1).astype(jnp.uint8).reshape(*lead, groups * unit)
    return packed[..., : row_bytes(count, bits)]


@functools.partial(jax.jit, static_argnames=("bits", "count"))
def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """The inverse of `pack_bits`: uint8 [..., bytes] to codes [..., count] (uint8 or uint16).

    Raises:
      ValueError: the last axis does not hold exactly the bytes of `count` codes.
    """
    _check_bits(bits)
    *lead, size = packed.shape
    if size != row_bytes(count, bits):
        raise ValueError(
            f"packed rows of {count} codes of {bits} bits have {row_bytes(count, bits)} bytes, "
            f"got {size}"
        )
    if bits == 8:
        return packed
    lanes, unit = _lanes(bits)
    groups = -(-count // lanes)
    wide = jnp.pad(packed, [(0, 0)] * len(lead) + [(0, groups * unit - size)])
    wide = wide.reshape(*lead, groups, unit).astype(jnp.uint32)
    codes = []
    for lane in range(lanes):
        first, last = lane * bits // 8, ((lane + 1) * bits - 1) // 8
        value = jnp.zeros((*lead, groups), jnp.uint32)
        for byte in range(first, last + 1):
            shift = 8 * byte - lane * bits
            part = wide[..., byte]
            value = value | (part << shift if shift >= 0 else part >> -shift)
        codes.append(value & jnp.uint32(2**bits - 1))
    flat = jnp.stack(codes, axis=-1).reshape(*lead, groups * lanes)[..., :count]
    return flat.astype(jnp.uint8 if bits <= 8 else jnp.uint16)
