"""Damaged and hostile variants of a packed checkpoint, each from a seed.

`mutated(raw, index, seed)` gives a kind, the bytes, and whether they are sealed: a file whose
checksum fits may hold other numbers than the original, all others must load as the original or not
at all.
"""

import contextlib
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.export import container
from jaxcompress.export.checkpoint import zstandard_frame

Rng = np.random.Generator

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**47, 2**63, 10**30, -(2**40))
JUNK = (
    None,
    True,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "-1",
    [],
    [[]],
    {},
    {"a": []},
    "\ud800",
)
DTYPES = (*container.DTYPES, "I3", "f32", "F4", "")
WORDS = (
    *("int4", "int8", "uint4", "int9", "kmeans4", "kmeans9", "nf4", "ternary", "mxfp4", "nvfp4"),
    *(
        "q1.10",
        "q99999.-99990",
        "pot4",
        "apot8_7",
        "apot3_9",
        "float8_e4m3",
        "",
        "int4|",
        "codebook",
    ),
    *("float32", "bfloat16", "float64", "int32", "bitmask", "csr:0", "csr:1", "csr:-1", "csr:9"),
    *("groups:1:4:0", "groups:0:2:0", "groups:2:4:-1", "groups:1:99999:0", "groups:1:4:9"),
    *("3x4", "x128x128", "x0", "-3x-4", "1_0", "٣", "0x5", "5x0x99999999999", "1x" * 40 + "1"),
)


class Mutant(NamedTuple):
    kind: str
    data: bytes
    sealed: bool  # the checksum fits


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def join(text: str, data: bytes) -> bytes:
    """A file with any header."""
    head = text.encode("utf-8", "surrogatepass")
    return len(head).to_bytes(8, "little") + head + data


def seal(header: dict[str, Any], data: bytes) -> bytes:
    """A file whose checksum fits, as far as the header still has a place for it."""
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("crc32", None)
        plain = json.dumps(header, separators=(",", ":")).encode()
        header["__metadata__"]["crc32"] = f"{zlib.crc32(data, zlib.crc32(plain)):08x}"
    return join(json.dumps(header), data)


def flip(raw: bytes, rng: Rng, first: int = 0, last: int | None = None, count: int = 1) -> bytes:
    """Some bits of a span turned over."""
    out = bytearray(raw)
    for _ in range(count):
        out[rng.integers(first, len(raw) if last is None else last)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _start(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def _spans(raw: bytes, rng: Rng) -> bytes:
    a, b, c = np.sort(rng.integers(0, len(raw) + 1, 3))
    return raw[:a] + raw[b:c] + raw[a:b] + raw[c:]


def _lose(raw: bytes, rng: Rng) -> bytes:
    a = int(rng.integers(len(raw)))
    b = min(len(raw), a + int(rng.integers(1, 64)))
    return (
        raw[:a] + [b"", b"\0" * (b - a), rng.bytes(b - a), raw[a:b] * 2][rng.integers(4)] + raw[b:]
    )


def _length(raw: bytes, rng: Rng) -> bytes:
    number = int(rng.choice([0, 1, 7, _start(raw) - 9, _start(raw), len(raw), 2**32, 2**63]))
    return number.to_bytes(8, "little") + raw[8:]


BYTES: dict[str, Callable[[bytes, Rng], bytes]] = {
    "flip_header": lambda raw, rng: flip(raw, rng, 8, _start(raw)),
    "flip_payload": lambda raw, rng: flip(raw, rng, _start(raw)),
    "flips": lambda raw, rng: flip(raw, rng, count=int(rng.integers(2, 50))),
    "truncate": lambda raw, rng: raw[: rng.integers(len(raw))],
    "extend": lambda raw, rng: raw + rng.bytes(int(rng.integers(1, 100))),
    "swap_spans": _spans,
    "lose_span": _lose,
    "header_length": _length,
}


def _any(rng: Rng, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def _array(header: dict[str, Any], rng: Rng) -> None:
    """Changes what the header says of one array."""
    name = _any(rng, *(key for key in header if key != "__metadata__"))
    entry = header[name]
    key = _any(rng, "shape", "data_offsets", "dtype", "extra", "gone", "name", "junk")
    if key in ("shape", "data_offsets"):
        numbers = list(entry[key])
        if rng.random() < 0.3 or not numbers:
            numbers.append(_any(rng, *NUMBERS))
        else:
            numbers[rng.integers(len(numbers))] = _any(rng, *NUMBERS, *JUNK)
        entry[key] = _any(rng, numbers, numbers[::-1], numbers[:1], *JUNK)
    elif key == "dtype":
        entry[key] = _any(rng, *DTYPES, *JUNK)
    elif key == "extra":
        entry["more"] = _any(rng, *JUNK)
    elif key == "gone":
        del entry[_any(rng, *entry)]
    elif key == "name":
        header[_any(rng, name + "x", "", "/", "a/b/c", "activations.scale")] = header.pop(name)
    else:
        header[name] = _any(rng, *JUNK, entry | {"shape": [1] * 40})


def _metadata(header: dict[str, Any], rng: Rng) -> None:
    """Changes one string of the metadata."""
    found = header["__metadata__"]
    key = _any(rng, *found)
    change = rng.integers(5)
    if change == 0:
        found[key] = _any(rng, *JUNK, "9", "2")
    elif change == 1:
        del found[key]
    elif change == 2:
        found[_any(rng, "leaf:", "leaf:no", "leaf:bias", key + "x")] = found.pop(key)
    else:
        parts = found[key].split(_any(rng, "|", "|", ";"))
        at = rng.integers(len(parts))
        number = str(_any(rng, *NUMBERS))
        sizes = "x".join(str(_any(rng, *NUMBERS)) for _ in range(rng.integers(1, 4)))
        parts[at] = _any(rng, number, sizes, *WORDS)
        found[key] = "|".join(parts)


def _document(header: dict[str, Any], rng: Rng) -> None:
    """Changes the form of the whole."""
    if rng.random() < 0.5:
        header["__metadata__"] = _any(rng, *JUNK, {}, {"jaxcompress": "3"})
    else:
        header[_any(rng, "new", "")] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


EDITS = (_array, _array, _metadata, _metadata, _metadata, _document)


def _texts(raw: bytes, rng: Rng) -> bytes:
    """Headers that no dict has: keys twice, deep nesting, other texts."""
    header, data = split(raw)
    text = json.dumps(header)
    deep = int(10 ** rng.uniform(1, 5))
    key = json.dumps(_any(rng, *header))
    return join(
        _any(
            rng,
            f"{text[:-1]}, {key}: {json.dumps(_any(rng, *header.values()))}}}",
            f'{text[:-1]}, "deep": {"[" * deep}{"]" * deep}}}',
            f"{text[:-1]}, {key}: " + '{"a":' * deep + "1" + "}" * deep + "}",
            "[" * deep,
            text[:-1] + ', "n": ' + "9" * deep + "}",
            text + text,
            "[]",
            "",
            " " * deep,
            text.replace('"F32"', '"f32"'),
            "\ufeff" + text,
            text.replace("0", "0.0", int(rng.integers(1, 9))),
        ),
        data,
    )


def crafted(rng: Rng) -> bytes:
    """A small file, well formed and sealed, that says it is enormous."""
    huge = int(_any(rng, 2**20, 2**24, 2**28, 2**30, 2**31, 2**40, 10**13))
    u8 = lambda n: np.zeros(n, np.uint8)
    f32 = np.ones(1, np.float32)
    one, four = f32.reshape(1, 1), np.ones((1, 1, 1, 1), np.float32)
    mask = {"w.mask.pointers": np.array([0, 1], np.uint8), "w.values": f32}
    column = np.zeros(1, np.min_scalar_type(huge - 1))
    cases = {
        f"|||{huge}|float32|1|csr:0": mask | {"w.mask.indices": column},
        f"|||1x{huge}|float32|1|csr:1": mask | {"w.mask.indices": column},
        f"|||{huge}x4|float32|0|groups:0:4:1": {"w.mask.offsets": u8(0), "w.values": f32[:0]},
        f"|||4x{huge}|float32|0|groups:0:2:1": {"w.mask.offsets": u8(0), "w.values": f32[:0]},
        f"|||0x{huge}|float32|0|groups:1:2:1": {"w.mask.offsets": u8(0), "w.values": f32[:0]},
        f"|||{huge}|float32|0": {"w.mask": u8(0), "w.values": f32[:0]},
        f"int4||{huge}|2|float32": {"w.codes": u8(1), "w.scale": one},
        f"int4||x{huge}|2|float32": {"w.codes": u8(1), "w.scale": one},
        f"int4||x{huge}x{huge}|1x2|float32": {"w.codes": u8((1, 1)), "w.scale": four},
        f"int4|||0x{huge}|float32": {"w.codes": u8((0, huge // 2)), "w.scale": one},
        f"int1|||{huge}|float32|1|csr:0": mask | {"w.mask.indices": column, "w.codes": u8(1)},
    }  # fmt: skip
    scheme = _any(rng, *cases)
    metadata = {"jaxcompress": "3", "leaf:w": scheme}
    return container.encode(cases[scheme], metadata)[0]


def frame(size: int, content: bytes, repeated: int) -> bytes:
    """A Zstandard frame that says `size`: a raw block, and so many of 128 KiB of zeros."""
    block = lambda kind, count, last: (count << 3 | kind << 1 | last).to_bytes(3, "little")
    head = zstandard_frame.MAGIC + b"\xe0" + size.to_bytes(8, "little")
    zeros = (block(1, 2**17, 0) + b"\0") * repeated
    return head + block(0, len(content), 0) + content + zeros + block(0, 0, 1)


def _bomb(raw: bytes, rng: Rng) -> bytes:
    """A frame of a few kB that holds, or says that it holds, far more."""
    repeated = int(10 ** rng.uniform(0, 4))
    true = len(raw) + repeated * 2**17
    window = zstandard_frame.MAGIC + b"\xc0\xff" + frame(len(raw), raw, 0)[5:]  # of 3.75 TB
    header = raw[: min(len(raw), 2**16)]
    length = (repeated * 2**17).to_bytes(8, "little")
    zeros = jax.ShapeDtypeStruct((repeated * 2**17,), np.uint8)
    text = json.dumps(container.layout({"w": zeros}, {})[0]).encode()
    big = len(text).to_bytes(8, "little") + text
    return _any(
        rng,
        frame(true, raw, repeated),
        frame(int(_any(rng, 0, len(raw), true - 1, true + 1, 2**40, 2**64 - 2)), header, repeated),
        frame(8 + repeated * 2**17, length, repeated),
        frame(len(big) + repeated * 2**17, big, repeated),
        window,
    )


def _pack(raw: bytes, rng: Rng) -> bytes:
    return zstandard_frame.compress([raw], f"zstd:{int(rng.integers(1, 4))}")


def mutated(raw: bytes, index: int, seed: int) -> Mutant:
    """The variant with a number, always the same."""
    rng = np.random.default_rng((seed, index))
    group = index % 8
    if group < 2:
        kind = _any(rng, *BYTES)
        return Mutant(kind, BYTES[kind](raw, rng), False)
    if group == 2:
        kind = _any(rng, "flips", "truncate", "extend", "swap_spans", "lose_span")
        if rng.random() < 0.5:
            return Mutant(f"zstd_{kind}", BYTES[kind](_pack(raw, rng), rng), False)
        return Mutant(f"{kind}_zstd", _pack(BYTES[kind](raw, rng), rng), False)
    if group == 3:
        if rng.random() < 0.5:
            return Mutant("zstd_bomb", _bomb(raw, rng), False)
        return Mutant("texts", _texts(raw, rng), False)
    header, data = split(raw)
    if group == 4:
        _any(rng, *EDITS)(header, rng)
        return Mutant("header", join(json.dumps(header), data), False)
    if group == 5 and rng.random() < 0.5:
        out = crafted(rng)
        return Mutant("crafted", _pack(out, rng) if rng.random() < 0.3 else out, True)
    if group == 6:
        return Mutant(
            "sealed_payload", seal(header, flip(data, rng, count=int(rng.integers(1, 9)))), True
        )
    for _ in range(rng.integers(1, 3)):
        with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):  # edited twice
            _any(rng, *EDITS[:5])(header, rng)
    out = seal(header, data)
    return Mutant("sealed_header", _pack(out, rng) if rng.random() < 0.2 else out, True)
