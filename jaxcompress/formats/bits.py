"""Codes in uint8: b bits each, or 5 trits per byte; no bit wasted inside a row."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

TRIT = 1.6  # bits of a code 0, 1 or 2: five of them make a byte, 3**5 = 243


def lanes(bits: float) -> int:
    """Length of the smallest run of codes that fills whole bytes: 2 of 4 bits, 8 of 3, 5 trits.

    >>> lanes(4), lanes(3), lanes(1.6)
    (2, 8, 5)
    """
    _check_bits(bits)
    return 5 if bits == TRIT else 8 // math.gcd(8, int(bits))


def row_bytes(count: int, bits: float) -> int:
    """Bytes of one row of `count` codes: only the last byte may hold unused bits.

    >>> row_bytes(10, 3), row_bytes(11, 1.6)
    (4, 3)
    """
    return -(-count // 5) if bits == TRIT else -(-count * int(bits) // 8)


def signed(codes: Array, bits: int) -> Array:
    """Two's complement codes of `bits` bits as int32.

    >>> print(signed(jnp.array([1, 7, 8, 15], jnp.uint8), 4))
    [ 1  7 -8 -1]
    """
    half = 2 ** (bits - 1)
    return (codes.astype(jnp.int32) ^ half) - half


def _check_bits(bits: float) -> None:
    if bits != TRIT and not (1 <= bits <= 16 and bits == int(bits)):
        raise ValueError(f"bits must be 1 to 16 or {TRIT} (trits), got {bits}")


@functools.partial(jax.jit, static_argnames="bits")
def pack_bits(codes: Array, bits: float) -> Array:
    """Packs unsigned codes [..., n] into uint8 [..., row_bytes(n, bits)].

    Code k of a row takes the bits k * bits to (k + 1) * bits of the row, lowest bit first. With
    bits 1.6, codes 0, 1, 2: a byte is c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4.
    Codes must be below 2**bits; higher bits are cut off.

    >>> print(pack_bits(jnp.array([1, 2, 15], jnp.uint8), 4))
    [33 15]
    """
    *lead, count = codes.shape
    run, size = lanes(bits), row_bytes(count, bits)
    if bits == 8:
        return codes.astype(jnp.uint8)
    groups = -(-count // run)
    if groups * run != count:
        codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, groups * run - count)])
    codes = codes.reshape(*lead, groups, run)
    if bits in (2, 4):
        return _pack_nibbles(codes.astype(jnp.uint8), int(bits))
    pack = _pack_trits if bits == TRIT else functools.partial(_pack_run, bits=int(bits))
    return jnp.stack(pack(codes), axis=-1).reshape(*lead, groups * row_bytes(run, bits))[..., :size]


def _pack_nibbles(codes: Array, bits: int) -> Array:
    # One run is one word of 8 / bits bytes: contiguous reads, which the general path lacks.
    words = {2: jnp.uint32, 4: jnp.uint16}[bits]
    wide = jax.lax.bitcast_convert_type(codes & jnp.uint8(2**bits - 1), words)
    packed = wide
    for lane in range(1, 8 // bits):
        packed = packed | (wide >> words(lane * (8 - bits)))
    return packed.astype(jnp.uint8)


def _pack_trits(codes: Array) -> list[Array]:
    weights = (1, 3, 9, 27, 81)
    small = codes.astype(jnp.uint8)
    return [sum(small[..., k] * jnp.uint8(w) for k, w in enumerate(weights))]  # type: ignore


def _pack_run(codes: Array, *, bits: int) -> list[Array]:
    wide = codes.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    run = codes.shape[-1]
    columns = [jnp.zeros(codes.shape[:-1], jnp.uint32) for _ in range(run * bits // 8)]
    for lane in range(run):
        first, last = lane * bits // 8, ((lane + 1) * bits - 1) // 8
        for byte in range(first, last + 1):
            shift = lane * bits - 8 * byte
            value = wide[..., lane]
            columns[byte] = columns[byte] | (value << shift if shift >= 0 else value >> -shift)
    return [column.astype(jnp.uint8) for column in columns]


@functools.partial(jax.jit, static_argnames=("bits", "count"))
def unpack_bits(packed: Array, bits: float, count: int) -> Array:
    """The inverse of `pack_bits`: uint8 [..., bytes] to codes [..., count] (uint8 or uint16).

    Raises:
      ValueError: the last axis does not hold exactly the bytes of `count` codes.
    """
    *lead, size = packed.shape
    run, expected = lanes(bits), row_bytes(count, bits)
    if size != expected:
        raise ValueError(
            f"packed rows of {count} codes of {bits} bits have {expected} bytes, got {size}"
        )
    if bits == 8:
        return packed
    groups = -(-count // run)
    unit = row_bytes(run, bits)
    wide = jnp.pad(packed, [(0, 0)] * len(lead) + [(0, groups * unit - size)])
    wide = wide.reshape(*lead, groups, unit)
    codes = _unpack_trits(wide) if bits == TRIT else _unpack_run(wide, int(bits), run)
    flat = jnp.stack(codes, axis=-1).reshape(*lead, groups * run)[..., :count]
    return flat.astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def _unpack_trits(wide: Array) -> list[Array]:
    byte = wide[..., 0].astype(jnp.uint32)
    # floor(byte / 3**k) as a multiplication: exact for bytes with 16 bits of the reciprocal
    parts = [byte] + [(byte * jnp.uint32(-(-(2**16) // 3**k))) >> 16 for k in range(1, 6)]
    return [parts[k] - 3 * parts[k + 1] for k in range(5)]


def _unpack_run(wide: Array, bits: int, run: int) -> list[Array]:
    wide = wide.astype(jnp.uint32)
    codes = []
    for lane in range(run):
        first, last = lane * bits // 8, ((lane + 1) * bits - 1) // 8
        value = jnp.zeros(wide.shape[:-1], jnp.uint32)
        for byte in range(first, last + 1):
            shift = 8 * byte - lane * bits
            part = wide[..., byte]
            value = value | (part << shift if shift >= 0 else part >> -shift)
        codes.append(value & jnp.uint32(2**bits - 1))
    return codes
