"""An ONNX graph in the making: nodes and constants, each once, and the file they become."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

OPSET = 19
"""Standard operators are of this version where it has them; int8 QDQ pairs load up to it."""
MICROSOFT = "com.microsoft"
_IR_VERSION = 10  # what every runtime since the middle of 2024 reads
_MOST_BYTES = 2**31 - 1  # of a protobuf message


class Node(NamedTuple):
    """One operation; names of values, "" for an input left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    domain: str
    scope: str


class Port(NamedTuple):
    """An input or output of the file: name, dtype, sizes (int, or the name of a dimension)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]


class Graph:
    """Collects nodes in order; equal nodes and equal constants are there once.

    Attributes:
      opset: the least version that has all operators so far.
      scope: where the operations that come now stand in the network.
    """

    def __init__(self):
        self.opset, self.scope = OPSET, ""
        self._nodes: dict[Any, Node] = {}
        self._constants: dict[Any, str] = {}
        self._arrays: dict[str, tuple[np.ndarray, str]] = {}
        self._belongs: dict[str, dict[str, str]] = {}  # constant -> packed leaf -> why not packed
        self._names = 0

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """The name of an operation's result, or a tuple of names if there are several.

        Attributes that are None are left out.
        """
        given = tuple((k, v) for k, v in attributes.items() if v is not None)
        key = (op, tuple(inputs), domain, outputs, given)
        if key not in self._nodes:
            names = tuple(self._name() for _ in range(outputs))
            self._nodes[key] = Node(op, tuple(inputs), names, given, domain, self.scope)
        names = self._nodes[key].outputs
        return names[0] if outputs == 1 else names

    def constant(
        self, array: Any, *, stored: str = "", of: Any = None, leaves: frozenset[str] = frozenset()
    ) -> str:
        """The name of a constant; `stored` "int4" or "uint4" packs two numbers in a byte.

        `leaves` are the paths of the packed leaves that it belongs to, for `leaf_bytes`.

        Equal constants are one, save those `of` different things: runtimes that rewrite what
        belongs to one operation (a zero point) would change it for others, or refuse the file.
        """
        leaves = getattr(array, "leaves", leaves)
        why, array = getattr(array, "why", ""), np.asarray(array)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        key = (array.dtype.name, array.shape, stored, digest, of)
        if key not in self._constants:
            name = self._constants[key] = self._name()
            self._arrays[name] = (array, stored)
        name = self._constants[key]
        if leaves:
            self._belongs.setdefault(name, {}).update(dict.fromkeys(leaves, why))
        return name

    def leaf_bytes(
        self, outputs: Sequence[str], sizes: Mapping[str, int]
    ) -> dict[str, tuple[int, str]]:
        """Packed leaf -> bytes of the constants that are in the file for it, and why it is not
        packed there ("" if it is). Leaves share a constant as their `sizes` are."""
        used = {value for node in self.live(outputs) for value in node.inputs}
        found: dict[str, tuple[int, str]] = {}
        for name, leaves in self._belongs.items():
            array, stored = self._arrays[name]
            taken = array.nbytes // (2 if stored else 1) if name in used else 0
            whole = max(sum(sizes[path] for path in leaves), 1)
            for path, why in leaves.items():
                before, reason = found.get(path, (0, ""))
                share = taken * sizes[path] // whole
                found[path] = before + share, reason or (why if name in used else "")
        return found

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def result(self, value: str, name: str) -> None:
        """Gives a value the name of an output."""
        key = ("Identity", (value,), "", name)
        self._nodes[key] = Node("Identity", (value,), (name,), (), "", "")

    def live(self, outputs: Sequence[str]) -> list[Node]:
        """The nodes that the results need, in order."""
        wanted, kept = set(outputs), []
        for node in reversed(self._nodes.values()):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.inputs)
        return kept[::-1]

    def model(self, inputs: Sequence[Port], outputs: Sequence[Port], *, name: str) -> Any:
        """The checked `onnx.ModelProto`.

        Raises:
          ImportError: the package onnx is missing.
          ValueError: over 2 GiB.
        """
        onnx = require_onnx()
        nodes = self.live([port.name for port in outputs])
        used = {value for node in nodes for value in node.inputs}
        arrays = [(n, *stored) for n, stored in self._arrays.items() if n in used]
        total = sum(a.nbytes // (2 if stored else 1) for _, a, stored in arrays)
        if total > _MOST_BYTES:
            raise ValueError(
                f"an ONNX file holds at most 2 GiB, the constants have {total:,} bytes"
            )
        graph = onnx.helper.make_graph(
            [_node_proto(onnx, node) for node in nodes],
            name,
            [_port_proto(onnx, port) for port in inputs],
            [_port_proto(onnx, port) for port in outputs],
            [_tensor_proto(onnx, *item) for item in arrays],
        )
        versions = [onnx.helper.make_opsetid("", self.opset)]
        if any(node.domain for node in nodes):
            versions.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        model = onnx.helper.make_model(
            graph, opset_imports=versions, producer_name="jaxcompress", ir_version=_IR_VERSION
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def require_onnx() -> Any:
    """The package onnx.

    Raises:
      ImportError: it is missing; with the pip line.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(
            'export.onnx needs the package onnx: pip install "jaxcompress[export]"'
        ) from error
    return onnx


def _node_proto(onnx: Any, node: Node) -> Any:
    proto = onnx.helper.make_node(
        node.op, node.inputs, node.outputs, domain=node.domain or None, **dict(node.attributes)
    )
    proto.name = "/".join(filter(None, (node.scope, node.outputs[0])))  # must be unique
    return proto


def _tensor_proto(onnx: Any, name: str, array: np.ndarray, stored: str) -> Any:
    if not stored:
        return onnx.numpy_helper.from_array(array, name)
    kind = {"int4": onnx.TensorProto.INT4, "uint4": onnx.TensorProto.UINT4}[stored]
    nibbles = array.reshape(-1).astype(np.uint8) & 15
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    assert len(packed) == math.ceil(array.size / 2)
    return onnx.helper.make_tensor(name, kind, array.shape, packed, raw=True)


def _port_proto(onnx: Any, port: Port) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return onnx.helper.make_tensor_value_info(port.name, kind, port.shape)
