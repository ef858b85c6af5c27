"""What a file is that `export.save` did not write, and what to do with it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

_MAGIC = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive (a checkpoint of torch.save or numpy.savez)",
    b"\x80\x02": "a pickle (a checkpoint of torch.save)",
    b"\x93NUM": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
}
_FLOATS = (
    "take the float checkpoint that it was made from: `jaxcompress quantize CHECKPOINT OUT "
    "--format int4` packs one in safetensors"
)
# Endings of names that only these tools write; all of a row must be there.
_TOOLS = (
    ((".qweight", ".qzeros", ".g_idx"), "a GPTQ checkpoint"),
    ((".qweight", ".qzeros"), "an AWQ or GPTQ checkpoint"),
    ((".weight_packed", ".weight_scale"), "a compressed-tensors checkpoint"),
    ((".weight.absmax",), "a bitsandbytes checkpoint"),
    ((".weight_scale_inv",), "a checkpoint of float8 blocks (as DeepSeek's)"),
    ((".weight_scale",), "a compressed-tensors or ModelOpt checkpoint"),
)


def other_kind(head: bytes) -> str | None:
    """What a file is that is no safetensors file, by its first bytes, with what to do."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {kind}, no safetensors file: {_FLOATS}"
    return None


def described(path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> str:
    """What a safetensors file of others is, by the names of its tensors, with what to do."""
    names = list(names)
    if "stablehlo" in metadata:
        return "it is a program that export.stablehlo wrote: read it with export.load_stablehlo"
    for ends, kind in _TOOLS:
        if all(any(name.endswith(end) for name in names) for end in ends):
            return f"it is {kind}, whose codes are laid out in another way: {_FLOATS}"
    of = f" (format {metadata['format']!r})" if metadata.get("format") else ""
    return (
        f"it is a plain safetensors file of {len(names)} tensors{of}, not packed by this program: "
        f"`jaxcompress quantize {path} OUT --format int4` writes a packed one"
    )
